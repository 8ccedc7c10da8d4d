"""Plots show what they are given, and are written atomically."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_other_pictures_are_drawn(tmp_path: Path):
    rng = np.random.default_rng(0)
    plots.plot_levels(tmp_path / "a.png", rng.normal(size=(5, 100, 2)), 3.0, "t")
    plots.plot_table(
        tmp_path / "b.png",
        rng.normal(size=(50, 4)),
        rng.normal(size=(50, 4)),
        {"inliers": rng.normal(size=50), "outliers": rng.normal(size=50) - 5},
        "t",
    )
    plots.plot_table(
        tmp_path / "c.png",
        rng.normal(size=(50, 1)),
        rng.normal(size=(50, 1)),
        {"inliers": np.zeros(50)},
        "t",
    )
    plots.plot_samples(tmp_path / "d.png", rng.normal(size=(50, 2)), 3.0, "t")
    plots.plot_histograms(tmp_path / "e.png", {"one": rng.normal(size=50)}, "t")
    for name in "abcde":
        assert _pixels(tmp_path / f"{name}.png").std() > 5
    assert not list(tmp_path.glob("*.partial"))


def test_a_roc_curve_above_chance_lies_above_the_diagonal(tmp_path: Path):
    path = tmp_path / "new" / "roc.png"
    rate = np.linspace(0, 1, 50)
    curves = {"good": (rate, np.sqrt(rate)), "bad": (rate, rate**2)}
    plots.plot_roc(path, curves, "title")
    both = _pixels(path)
    plots.plot_roc(path, {"good": curves["good"]}, "title")
    changed = np.argwhere(abs(both - _pixels(path)) > 60)
    assert len(changed) and np.median(changed[:, 0]) > both.shape[0] / 2
    assert [file.name for file in path.parent.iterdir()] == ["roc.png"]


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
