"""Plots show what they are given, and are written atomically."""

import os
from pathlib import Path

import numpy as np
import pytest
from cli import call, environment
from PIL import Image

from ddaebm_jax.commands import common
from ddaebm_jax.data.tfds_images import import_tensorflow
from ddaebm_jax.evaluation import plots


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), np.float32)


def test_the_picture_of_the_plane_shows_where_the_density_is(tmp_path: Path):
    """A bright density in one corner shows in that corner of the third panel."""
    points = np.random.default_rng(0).normal(size=(500, 2))
    log_density = np.full((40, 40), -50.0)
    log_density[30:, 30:] = 0.0  # large first and second coordinate: top right
    path = tmp_path / "plane.png"
    plots.plot_plane(path, points, points, log_density, 2.0, "title")
    pixels = _pixels(path)
    height, width = pixels.shape
    panel = pixels[int(0.2 * height) : int(0.95 * height), int(0.7 * width) :]
    rows, columns = np.nonzero((panel > 150) & (panel < 254))  # Bright, not white.
    assert np.median(rows) < 0.5 * panel.shape[0]
    assert np.median(columns) > 0.5 * panel.shape[1]


@pytest.mark.parametrize(("columns", "shape"), [(None, (2, 2)), (3, (1, 3))])
def test_a_grid_of_images_is_enlarged_and_bordered(columns, shape, tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 1), np.uint8)
    plots.plot_images(tmp_path / "grid.png", images, columns)
    pixels = _pixels(tmp_path / "grid.png")
    times = pixels.shape[0] // (shape[0] * 5 + 1)
    assert pixels.shape == (times * (shape[0] * 5 + 1), times * (shape[1] * 6 + 1))
    small = pixels[::times, ::times]
    np.testing.assert_array_equal(small.repeat(times, 0).repeat(times, 1), pixels)
    for place in range(shape[0] * shape[1]):
        top, left = 1 + place // shape[1] * 5, 1 + place % shape[1] * 6
        cell = images[place, :, :, 0] if place < 3 else 255
        assert (small[top : top + 4, left : left + 5] == cell).all()
        assert (small[top - 1] == 255).all() and (small[:, left - 1] == 255).all()


def plot(path: str) -> None:
    """A command that draws something, and imports matplotlib for it."""
    backend_given = "MPLBACKEND" in os.environ

    def command(_: object) -> None:
        if backend_given:
            import_tensorflow()  # Keras imports matplotlib, too.
        plots.plot_samples(Path(path), np.eye(2), 2.0, "title")

    common.run(command, ["main"])


@pytest.mark.parametrize(
    "settings",
    [
        {"MPLBACKEND": "module://matplotlib_inline.nosuch"},
        {"MPLCONFIGDIR": "/proc/nosuch"},
        {"MATPLOTLIBRC": "{folder}"},
    ],
)
def test_settings_for_others_spoil_no_picture(settings: dict, tmp_path: Path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nnonsense\nbackend: no")
    settings = {k: v.format(folder=tmp_path) for k, v in settings.items()}
    (result,) = call(plot, [str(tmp_path / "a.png")], env=environment() | settings)
    assert result.code == 0 and "cannot be drawn" not in result.err
    assert _pixels(tmp_path / "a.png").std() > 5


def test_a_picture_that_cannot_be_drawn_is_only_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    plots.plot_roc(tmp_path / "file" / "a.png", {}, "title")
    plots.plot_images(tmp_path / "a.png", np.zeros((0, 1, 1, 1), np.uint8))
    assert [m.split(" cannot be drawn: ")[0] for m in caplog.messages] == [
        str(tmp_path / name) for name in ("file/a.png", "a.png")
    ]
