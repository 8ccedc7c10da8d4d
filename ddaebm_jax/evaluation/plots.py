"""Plots by matplotlib's Agg canvas, which leave the user's backend alone."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from ddaebm_jax.data import image_files
from ddaebm_jax.errors import one_line
from ddaebm_jax.files import written_atomically

if TYPE_CHECKING:  # Commands that draw nothing do without it.
    from matplotlib.figure import Figure

Box = tuple[tuple[float, float], tuple[float, float]]
"""Low and high ends of both coordinates that a picture shows."""

# Approximate longer side of a grid of images.
_GRID_PIXELS = 640

# Panels of a run's curves: title, pattern of the metrics whose group is the label of
# a curve, and scale.
_GAPS = (
    "gap f(real, t) − f(generated, t)",
    r"energy/gap_(t\d+)",
    {"value": "symlog", "linthresh": 0.1},
)
_PANELS = (
    ("energy: loss", r"energy/(loss)", {"value": "linear"}),
    ("generator: loss", r"generator/(loss)", {"value": "linear"}),
    ("mean energy f(x, t)", r"energy/(real|fake)", {"value": "linear"}),
    _GAPS,
    ("gradient norm", r"(\w+)/grad_norm", {"value": "log"}),
    ("evaluation", r"evaluation/(?!num_)(.+)", {"value": "symlog", "linthresh": 0.01}),
    ("noise of the levels", r"levels/noise_(\d+)", {"value": "log"}),
)
_WIDE = 20  # Values of so wide a range are on a logarithmic axis.
_MOST_CURVES = 10  # In a panel: so many colours are told apart.
_FEW_POINTS = 40  # Curves of so few points show each of them.


def write(path: Path, plot: Callable[..., "Figure | None"], *args: Any) -> None:
    """Writes the figure of plot(*args), if it has one, as a PNG, atomically.

    A failure is only warned of: it does not end the command.
    """
    with _warned_of(path):
        import matplotlib.style

        figure = plot(*args)
        if figure is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with matplotlib.style.context("default"), written_atomically(path) as file:
                figure.savefig(file, dpi=110, format="png")


@contextlib.contextmanager
def _warned_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logging.warning("%s cannot be drawn: %s", path, one_line(error))


@contextlib.contextmanager
def _axes(
    columns: int, side: float = 3.2, title: str = "", rows: int = 1
) -> Iterator[list]:
    """Yields a new figure's axes, row by row.

    In matplotlib's own style: the user's may need LaTeX or fonts that are not here.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        size = side * columns, side * rows + 0.3
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, columns, squeeze=False).ravel())
        if title:
            figure.suptitle(title, fontsize=10, parse_math=False)


def _scatter(axis: Any, points: np.ndarray, title: str, box: Box) -> None:
    axis.plot(points[:, 0], points[:, 1], ".", markersize=1.2, alpha=0.5, color="k")
    _show_box(axis, title, box)


def _show_box(axis: Any, title: str, box: Box) -> None:
    width, height = (high - low for low, high in box)
    axis.set(xlim=box[0], ylim=box[1], aspect=width / height)  # A square.
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=5)


def _normalized(
    log_density: Float[np.ndarray, "side side"], box: Box
) -> Float[np.ndarray, "side side"]:
    """Returns a density of integral 1 over the grid; NaN where the log is NaN or ∞."""
    logs = np.where(log_density < np.inf, log_density, np.nan).astype(np.float64)
    weights = np.exp(logs - _largest(logs))
    area = math.prod(high - low for low, high in box)
    mass = np.nansum(weights) * area / logs.size
    return weights / mass if mass else np.full_like(weights, np.nan)


def _largest(values: np.ndarray) -> float:
    """Returns the largest of the finite values, 0 where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0


def plot_plane(
    data: np.ndarray,
    samples: np.ndarray,
    log_truth: Float[np.ndarray, "side side"] | None,
    log_model: Float[np.ndarray, "side side"],
    box: Box,
    title: str,
) -> "Figure":
    """Draws data, samples, the true density and the model's, exp f(·, 0), in a row.

    Points are [n, 2]. The log densities lie on a grid over the box, whose first axis is
    that of the first coordinate. They are normalised on it and share one scale, which
    ends at 1.5 times the largest true density, or before. Without a truth its panel is
    left out.
    """
    model = _normalized(log_model, box)
    panels, high = {"model's density  exp f(·, 0) / Z": model}, _largest(model)
    if log_truth is not None:
        truth = _normalized(log_truth, box)
        panels = {"true density": truth} | panels
        high = max(min(high, 1.5 * _largest(truth)), _largest(truth))
    with _axes(2 + len(panels), title=title) as axes:
        _scatter(axes[0], data, "data", box)
        _scatter(axes[1], samples, "samples", box)
        for axis, (name, values) in zip(axes[2:], panels.items(), strict=True):
            image = axis.imshow(
                values.T,
                origin="lower",
                extent=(*box[0], *box[1]),
                cmap="magma",
                vmin=0.0,
                vmax=high,
            )
            _show_box(axis, name, box)
        bar = axis.figure.colorbar(
            image,
            cax=axis.inset_axes((1.04, 0.0, 0.05, 1.0)),
            extend="max" if _largest(model) > high else "neither",
        )
        bar.set_label("density (per unit area)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return axes[0].figure


def square(half: float) -> Box:
    """Returns the box [−half, half]²."""
    return ((-half, half), (-half, half))


def plot_levels(levels: np.ndarray, box: Box, title: str) -> "Figure":
    """Draws a strip of the denoising steps x_T … x_0, [T+1, n, 2]."""
    with _axes(len(levels), side=2.6, title=title) as axes:
        last = len(levels) - 1
        for place, (axis, points) in enumerate(zip(axes, levels, strict=True)):
            _scatter(axis, points, f"$x_{{{last - place}}}$", box)
    return axes[0].figure


def plot_table(
    data: np.ndarray,
    samples: np.ndarray,
    energies: Mapping[str, np.ndarray],
    title: str,
) -> "Figure":
    """Draws rows and samples, [n, d], on the data's principal axes, and energies.

    Energies are f(x, 0) of sets of rows, by the sets' names.
    """
    with _axes(2, side=4.0, title=title) as (left, right):
        _on_principal_axes(left, data, samples)
        _histograms(right, energies)
    return left.figure


def _on_principal_axes(axis: Any, data: np.ndarray, samples: np.ndarray) -> None:
    centre = data.mean(axis=0)
    axes_of_data = np.linalg.svd(data - centre, full_matrices=False)[2][:2].T
    for points, name, colour in ((data, "data", "k"), (samples, "samples", "C1")):
        flat = (points - centre) @ axes_of_data
        second = flat[:, 1] if flat.shape[1] > 1 else np.zeros(len(flat))
        axis.plot(flat[:, 0], second, ".", ms=2.5, alpha=0.6, color=colour, label=name)
    axis.set(title="on the data's principal axes", xticks=[], yticks=[])
    axis.legend()


def _histograms(axis: Any, energies: Mapping[str, np.ndarray]) -> None:
    finite = {
        name: values[np.isfinite(values)].astype(np.float64)
        for name, values in energies.items()
    }
    some = [values for values in finite.values() if len(values)] or [np.zeros(1)]
    # Outliers reach far down: cut there, so that the bulk of all sets compares.
    low = min(np.quantile(values, 0.05) for values in some)
    high = max(values.max() for values in some)
    bins = np.linspace(low, max(high, low + 1e-6 * max(1.0, abs(low))), 40)
    for name, values in finite.items():
        left_out = len(energies[name]) - len(values)
        label = f"{name} ({left_out} not finite left out)" if left_out else name
        cut, density = np.maximum(values, low), len(values) > 0
        axis.hist(cut, bins, alpha=0.6, density=density, label=label)
    axis.set(title="energy f(x, 0); larger is more likely", yticks=[])
    axis.legend()


def plot_histograms(energies: Mapping[str, np.ndarray], title: str) -> "Figure":
    """Draws the distributions of several sets' energies over each other."""
    with _axes(1, side=4.5, title=title) as (axis,):
        _histograms(axis, energies)
    return axis.figure


def plot_roc(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str
) -> "Figure":
    """Draws ROC curves, by name, over each other; see `outliers.roc_curve`."""
    with _axes(1, side=4.5, title=title) as (axis,):
        axis.plot((0, 1), (0, 1), ":", color="0.6")
        for name, (fpr, tpr) in curves.items():
            axis.plot(fpr, tpr, label=name)
        axis.set(
            xlabel="outliers that pass",
            ylabel="inliers that pass",
            xlim=(0, 1),
            ylim=(0, 1),
            aspect="equal",
        )
        axis.legend(loc="lower right")
    return axis.figure


def plot_curves(lines: Iterable[Mapping[str, Any]], title: str) -> "Figure | None":
    """Draws a run's metrics against steps; nothing where there are none.

    Losses, mean energies, gaps by t, gradient norms, and figures of evaluations, with
    the last value in the legend. Values that are not finite leave gaps.

    Args:
      lines: of metrics.jsonl; of several for one step and metric the last counts.
      title: of the picture.
    """
    curves = _by_metric(lines)
    if not curves:
        return None
    last = max(step for values in curves.values() for step in values)
    groups = []
    for name, pattern, scale in _PANELS:
        matches = [re.fullmatch(pattern, metric) for metric in curves]
        groups.append((name, {m[1]: curves[m[0]] for m in matches if m}, scale))
    *groups, levels = groups
    groups += [levels] * bool(levels[1])  # Only where they move.
    columns, title = -(-len(groups) // 2), f"{title}: metrics by step"
    with _axes(columns, side=3.6, title=title, rows=2) as axes:
        axes[-1].set_axis_off()
        for axis, (name, found, scale) in zip(axes, groups, strict=False):
            axis.set_axis_on()
            if not found:
                axis.set_axis_off()
                continue
            _draw_curves(axis, name, found, scale)
            axis.set_xlim(0, 1.02 * max(1, last))
    return axes[0].figure


def _draw_curves(
    axis: Any,
    title: str,
    curves: Mapping[str, Mapping[int, float]],
    scale: Mapping[str, Any],
) -> None:
    axis.set_yscale(**scale)  # First: margins are of the scale.
    of = f" ({_MOST_CURVES} of {len(curves)})" * (len(curves) > _MOST_CURVES)
    axis.set_title(title + of, fontsize=10)
    axis.locator_params("x", nbins=6, integer=True)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(alpha=0.3)
    labels = []
    for name, values in list(curves.items())[:_MOST_CURVES]:
        steps = sorted(values)
        name = "generated" if name == "fake" else name
        labels.append(f"{name}  {values[steps[-1]]:.3g}")
        axis.plot(
            steps,
            [values[step] for step in steps],
            marker="." if len(steps) <= _FEW_POINTS else "",
            linewidth=1.0,
            alpha=0.8,
            label=labels[-1],
        )
    low, high = axis.get_ylim()
    if sum(low <= tick <= high for tick in axis.get_yticks()) < 2:
        axis.set_yscale("linear")  # Within a decade the others have no ticks.
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=2 if max(map(len, labels)) < 30 else 1,
        fontsize=7.5,
        labelspacing=0.3,
        frameon=False,
    )


def _by_metric(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Returns metric → step → value, NaN for ∞; final figures among evaluations'."""
    curves: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and type(value) in (int, float):
                name = re.sub("^final/", "evaluation/", name)
                finite = float(value) if math.isfinite(value) else math.nan
                curves.setdefault(name, {})[line["step"]] = finite
    return curves


def plot_images(images: np.ndarray, title: str) -> "Figure":
    """Draws a grid of uint8 images [n, height, width, 1 or 3]."""
    with _axes(1, side=6.0, title=title) as (axis,):
        _show_images(axis, images)
        axis.set_axis_off()
    return axis.figure


def _show_images(axis: Any, images: np.ndarray) -> None:
    grid = image_grid(images)
    axis.imshow(grid if grid.shape[2] == 3 else grid[:, :, 0], cmap="gray")


def image_grid(
    images: np.ndarray, columns: int | None = None
) -> UInt8[np.ndarray, "height width channels"]:
    """Returns uint8 images [n, height, width, channels] side by side, row by row.

    Small images are enlarged by repeating pixels, never smoothed. Without a number of
    columns the grid is square.
    """
    number, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = -(-number // columns)
    cells = np.full((rows * columns, height + 1, width + 1, channels), 255, np.uint8)
    cells[:number, 1:, 1:] = images
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    grid = cells.reshape(rows * (height + 1), columns * (width + 1), channels)
    grid = np.pad(grid, ((0, 1), (0, 1), (0, 0)), constant_values=255)
    times = max(1, round(_GRID_PIXELS / max(grid.shape[:2])))
    return grid.repeat(times, axis=0).repeat(times, axis=1)


def write_grid(path: Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes the grid of `image_grid` as a PNG; a failure is only warned of."""
    with _warned_of(path):
        image_files.write_image(path, image_grid(images, columns))


def plot_samples(samples: np.ndarray, box: Box, title: str) -> "Figure":
    """Draws points [n, 2]."""
    with _axes(1, side=4.5) as (axis,):
        _scatter(axis, samples, title, box)
    return axis.figure


def plot_panels(panels: Mapping[str, Mapping[str, np.ndarray]], title: str) -> "Figure":
    """Draws a row for each of several models, by name; see `pictures.panel`.

    With the gaps of the energy, `gaps` [n, T], after `steps` of training, [n].
    """
    columns = 2 if any("images" in panel for panel in panels.values()) else 3
    with _axes(columns, title=title, rows=len(panels)) as axes:
        for row, (name, panel) in enumerate(panels.items()):
            left, *middle, curves = axes[row * columns : (row + 1) * columns]
            panel = dict(panel)
            # Studies of earlier versions have none.
            steps, gaps = panel.pop("steps", ()), panel.pop("gaps", ())
            steps, gaps = np.asarray(steps).tolist(), np.asarray(gaps).T.tolist()
            by_t = {
                f"t{t}": dict(zip(steps, one, strict=True))
                for t, one in enumerate(gaps)
            }
            if by_t:
                _draw_curves(curves, _GAPS[0], by_t, _GAPS[2])
            else:
                curves.set_axis_off()
            if not middle:
                _show_images(left, panel["images"])
                left.set(xticks=[], yticks=[])
            elif "log_density" in panel:
                box = tuple(map(tuple, panel["box"]))
                _scatter(left, panel["samples"], "samples", box)
                density = _normalized(panel["log_density"], box)
                limits = (*box[0], *box[1])
                middle[0].imshow(density.T, origin="lower", extent=limits, cmap="magma")
                _show_box(middle[0], "density  exp f(·, 0) / Z", box)
            else:
                _on_principal_axes(left, panel.pop("data"), panel.pop("samples"))
                _histograms(middle[0], panel)
            left.set_ylabel(name, parse_math=False)
    return axes[0].figure


def plot_against(
    field: str, values: Sequence[float], figures: Mapping[str, np.ndarray], title: str
) -> "Figure":
    """Draws figures [n, 2], means and their errors, against n values of a field."""
    columns = min(4, len(figures))
    rows = -(-len(figures) // columns)
    with _axes(columns, title=title, rows=rows) as axes:
        for axis in axes[len(figures) :]:
            axis.set_axis_off()
        for axis, (name, found) in zip(axes, figures.items(), strict=False):
            mean, error = found.T
            axis.errorbar(values, mean, np.nan_to_num(error), marker=".", capsize=3)
            if 0 < _WIDE * values[0] < values[-1]:
                axis.set_xscale("log")
            axis.set_title(name, fontsize=10, parse_math=False)
            axis.set_xlabel(field, fontsize=8, parse_math=False)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
    return axes[0].figure
