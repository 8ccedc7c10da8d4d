"""Plots show what they are given, and are written atomically."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import call, environment
from matplotlib.figure import Figure
from PIL import Image
from runs import small

from ddaebm_jax.commands import common
from ddaebm_jax.data.tfds_images import import_tensorflow
from ddaebm_jax.evaluation import plots
from ddaebm_jax.training import reports


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), np.float32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, in order."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def noted(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted)
    return figures


@pytest.mark.parametrize("height", [0.5, 1.2, 3.0])
def test_both_densities_of_the_plane_are_normalised_on_one_scale(
    height: float, tmp_path: Path, drawn: list[Figure], caplog: Any
):
    """The model's mass is on 1/height of the truth's cells; elsewhere f is −∞."""
    points = np.random.default_rng(0).normal(size=(500, 2))
    truth, model = np.full((60, 60), -1e3), np.full((60, 60), -np.inf)
    truth[:30, :20] = 7.0  # Small first and second coordinate: bottom left.
    model[60 - round(30 / height) :, 40:] = -70.0  # Top right.
    model[0, 0] = np.nan
    inputs = points, points, truth, model, plots.square(2.0), "title"
    plots.write(tmp_path / "a.png", plots.plot_plane, *inputs)
    assert not caplog.messages and _pixels(tmp_path / "a.png").std() > 5
    panels = drawn[0].axes[:4]
    for panel in panels:
        assert panel.get_aspect() == 1.0 and panel.get_xlim() == (-2.0, 2.0)
        assert len(panel.get_xticklabels()) >= 3 <= len(panel.get_yticklabels())
    images = [panel.images[0] for panel in panels[2:]]
    for image, corner in zip(images, (np.s_[:20, :30], np.s_[40:, :]), strict=True):
        density = image.get_array().filled(0.0)
        assert density.sum() * (4.0 / 60) ** 2 == pytest.approx(1.0)
        assert density[corner].sum() == pytest.approx(density.sum())
    assert images[0].get_clim() == images[1].get_clim()
    largest = images[0].get_array().max()
    expected = largest * min(max(height, 1.0), 1.5)
    assert images[0].get_clim() == (0.0, pytest.approx(expected))


def test_energies_that_are_not_finite_are_left_out_of_histograms(
    tmp_path: Path, drawn: list[Figure], caplog: Any
):
    some = np.array([-np.inf, np.nan, 1.0, 2.0, 3.0], np.float32)
    sets = {"real": np.zeros(3), "fake": some, "far": np.full(4, np.inf)}
    plots.write(tmp_path / "a.png", plots.plot_histograms, sets, "title")
    assert not caplog.messages
    (axis,) = drawn[0].axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [
        "real",
        "fake (2 not finite left out)",
        "far (4 not finite left out)",
    ]
    assert all(np.isfinite(bar.get_height()) for bar in axis.patches)


def _curves(figure: Figure) -> dict[str, dict[str, tuple[list, list]]]:
    """Returns panel → label without its value → steps and values."""
    return {
        axis.get_title(): {
            line.get_label().split("  ")[0]: tuple(map(list, line.get_data()))
            for line in axis.lines
        }
        for axis in figure.axes
        if axis.axison
    }


def test_curves_show_each_metric_by_step(tmp_path: Path, drawn: list[Figure]):
    """Whatever is missing, out of order, repeated, or no finite number."""
    lines = [
        {"step": 20, "energy/loss": 1.0, "energy/real": 3, "energy/gap_t1": -0.5},
        {"step": 10, "energy/loss": np.inf, "energy/fake": 2.0, "other": "text"},
        {"step": 20, "energy/loss": 4.0, "posterior/grad_norm": 0.5},
        {"step": 10, "evaluation/fid": 9.0, "evaluation/num_samples": 5},
        {"step": 20, "final/fid": 8.0, "final/shares": [0.5, 0.5]},
    ]
    plots.write(tmp_path / "a.png", plots.plot_curves, iter(lines), "title")
    found = _curves(drawn[0])
    np.testing.assert_equal(
        found.pop("energy: loss"), {"loss": ([10, 20], [np.nan, 4.0])}
    )
    assert found == {
        "mean energy f(x, t)": {"real": ([20], [3]), "generated": ([10], [2.0])},
        "gap f(real, t) − f(generated, t)": {"t1": ([20], [-0.5])},
        "gradient norm": {"posterior": ([20], [0.5])},
        "evaluation": {"fid": ([10, 20], [9.0, 8.0])},
    }
    plots.write(tmp_path / "none.png", plots.plot_curves, iter([]), "title")
    assert not (tmp_path / "none.png").exists()


def test_of_many_metrics_some_are_drawn_and_all_evaluations(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    monkeypatch.setattr(reports, "_DRAWN_BYTES", 2_000)
    kept = reports.Reports(tmp_path, small(), holds_images=False)
    kept.draw_curves("title")  # Before the first line.
    for step in range(1, 1001):
        kept.write(step, {"energy/loss": float(step)})
        if step % 100 == 0:
            kept.write(step, {"evaluation/fid": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": null, "energy/loss": 1.0}\n{"step": 7, "ener')
    kept.draw_curves("title")
    assert not caplog.messages and len(drawn) == 1
    found = _curves(drawn[0])
    steps, values = found["energy: loss"]["loss"]
    assert 30 < len(steps) < 60 and steps == values and steps[-1] > 950
    assert found["evaluation"]["fid"][0] == list(range(100, 1001, 100))


@pytest.mark.parametrize(("columns", "shape"), [(None, (2, 2)), (3, (1, 3))])
def test_a_grid_of_images_is_enlarged_and_bordered(columns, shape, tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 1), np.uint8)
    plots.write_grid(tmp_path / "grid.png", images, columns)
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
        box = plots.square(2.0)
        plots.write(Path(path), plots.plot_samples, np.eye(2), box, "title")

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
    plots.write(tmp_path / "file" / "a.png", plots.plot_roc, {}, "title")
    plots.write_grid(tmp_path / "a.png", np.zeros((0, 1, 1, 1), np.uint8))
    (tmp_path / "metrics.jsonl").mkdir()
    reports.Reports(tmp_path, small(), holds_images=False).draw_curves("title")
    assert [m.split(" cannot be drawn: ")[0] for m in caplog.messages] == [
        str(tmp_path / name) for name in ("file/a.png", "a.png", "curves.png")
    ]


def test_a_study_is_drawn_with_the_gaps_that_are_known(
    tmp_path: Path, drawn: list[Figure], caplog: Any
):
    """A row for each model; those of earlier versions have no gaps."""
    image = {"images": np.zeros((4, 8, 8, 1), np.uint8)}
    curves = {"steps": np.array([5, 10]), "gaps": np.array([[1.0, np.nan], [2.0, 3.0]])}
    empty = {"steps": np.empty(0), "gaps": np.empty(0)}
    wide = image | curves | {"gaps": np.array([[-0.2], [70.0]])}
    rows = {"new": image | curves, "old": image, "empty": image | empty, "w": wide}
    plots.write(tmp_path / "a.png", plots.plot_panels, rows, "title")
    assert not caplog.messages
    new, old, unknown, wide = drawn[0].axes[1::2]
    # A symmetric log scale would leave an axis within a decade without ticks.
    assert (new.get_yscale(), wide.get_yscale()) == ("linear", "symlog")
    found = [line.get_ydata() for line in new.lines]
    np.testing.assert_array_equal(found, [[1.0, 2.0], [np.nan, 3.0]])
    assert not old.axison and not unknown.axison


@pytest.mark.parametrize(
    ("values", "scale"), [([1.0, 2.0, 8.0], "linear"), ([1e-4, 1e-3, 1e-2], "log")]
)
def test_figures_against_values(
    values: list[float], scale: str, tmp_path: Path, drawn: list[Figure], caplog: Any
):
    found = {"a": np.array([[1.0, 0.1], [2.0, np.nan], [3.0, 0.2]])}
    plots.write(
        tmp_path / "a.png", plots.plot_against, "game.gamma", values, found, "title"
    )
    assert not caplog.messages
    (axis,) = drawn[0].axes
    assert axis.get_xscale() == scale
    np.testing.assert_array_equal(axis.lines[0].get_xydata().T, [values, [1, 2, 3]])
