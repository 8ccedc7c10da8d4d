"""Plots by matplotlib's Agg canvas, which leave the user's backend alone."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from ddaebm_jax.errors import one_line
from ddaebm_jax.files import written_atomically

# Approximate longer side of a grid of images.
_GRID_PIXELS = 640

# Panels of a run's curves: title, pattern of the metrics whose group is the label of
# a curve, and scale.
_PANELS = (
    ("energy: loss", r"energy/(loss)", {"value": "linear"}),
    ("generator: loss", r"generator/(loss)", {"value": "linear"}),
    ("mean energy f(x, t)", r"energy/(real|fake)", {"value": "linear"}),
    (
        "gap f(real, t) − f(generated, t)",
        r"energy/gap_(t\d+)",
        {"value": "symlog", "linthresh": 0.1},
    ),
    ("gradient norm", r"(\w+)/grad_norm", {"value": "log"}),
    (
        "evaluation",
        r"evaluation/(?!num_)(.+)",
        {"value": "symlog", "linthresh": 0.01},
    ),
)
_MOST_CURVES = 10  # In a panel: so many colours are told apart.
_FEW_POINTS = 40  # Curves of so few points show each of them.


def _side_output(plot: Callable[..., None]) -> Callable[..., None]:
    """Turns the failure of a plot into a warning: it ends no command."""

    @functools.wraps(plot)
    def drawn(path: Path, *args: Any, **kwargs: Any) -> None:
        try:
            plot(path, *args, **kwargs)
        except Exception as error:
            logging.warning("%s cannot be drawn: %s", path, one_line(error))

    return drawn


@contextlib.contextmanager
def _figure(
    path: Path, columns: int, side: float = 3.2, title: str = "", rows: int = 1
) -> Iterator[list]:
    """Yields axes, row by row; then writes them as a PNG, atomically.

    In matplotlib's own style: the user's may need LaTeX or fonts that are not here.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(
            figsize=(side * columns, side * rows + 0.3), layout="constrained"
        )
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, columns, squeeze=False).ravel())
        if title:
            figure.suptitle(title, fontsize=10, parse_math=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            figure.savefig(file, dpi=110, format="png")


def _scatter(axis: Any, points: np.ndarray, title: str, extent: float) -> None:
    axis.plot(points[:, 0], points[:, 1], ".", markersize=1.2, alpha=0.5, color="k")
    _show_square(axis, title, extent)


def _show_square(axis: Any, title: str, extent: float) -> None:
    limits = (-extent, extent)
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=5)


def _normalized(
    log_density: Float[np.ndarray, "side side"], extent: float
) -> Float[np.ndarray, "side side"]:
    """Returns a density of integral 1 over the grid; NaN where the log is NaN or ∞."""
    logs = np.where(log_density < np.inf, log_density, np.nan).astype(np.float64)
    weights = np.exp(logs - _largest(logs))
    mass = np.nansum(weights) * (2 * extent / logs.shape[0]) ** 2
    return weights / mass if mass else np.full_like(weights, np.nan)


def _largest(values: np.ndarray) -> float:
    """Returns the largest of the finite values, 0 where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0


@_side_output
def plot_plane(
    path: Path,
    data: np.ndarray,
    samples: np.ndarray,
    log_truth: Float[np.ndarray, "side side"],
    log_model: Float[np.ndarray, "side side"],
    extent: float,
    title: str,
) -> None:
    """Draws data, samples, the true density and the model's, exp f(·, 0), in a row.

    Points are [n, 2]. The log densities lie on a square grid over [−extent, extent]²,
    whose first axis is that of the first coordinate. Both are normalised on it and
    share one scale, which ends at 1.5 times the largest true density, or before.
    """
    truth, model = (_normalized(logs, extent) for logs in (log_truth, log_model))
    high = max(_largest(truth), min(_largest(model), 1.5 * _largest(truth)))
    with _figure(path, 4, title=title) as axes:
        _scatter(axes[0], data, "data", extent)
        _scatter(axes[1], samples, "samples", extent)
        names = "true density", "model's density  exp f(·, 0) / Z"
        for axis, name, values in zip(axes[2:], names, (truth, model), strict=True):
            image = axis.imshow(
                values.T,
                origin="lower",
                extent=(-extent, extent, -extent, extent),
                cmap="magma",
                vmin=0.0,
                vmax=high,
            )
            _show_square(axis, name, extent)
        bar = axis.figure.colorbar(
            image,
            cax=axis.inset_axes((1.04, 0.0, 0.05, 1.0)),
            extend="max" if _largest(model) > high else "neither",
        )
        bar.set_label("density (per unit area)", fontsize=9)
        bar.ax.tick_params(labelsize=8)


@_side_output
def plot_levels(path: Path, levels: np.ndarray, extent: float, title: str) -> None:
    """Draws a strip of the denoising steps x_T … x_0, [T+1, n, 2]."""
    with _figure(path, len(levels), side=2.6, title=title) as axes:
        last = len(levels) - 1
        for place, (axis, points) in enumerate(zip(axes, levels, strict=True)):
            _scatter(axis, points, f"$x_{{{last - place}}}$", extent)


@_side_output
def plot_table(
    path: Path,
    data: np.ndarray,
    samples: np.ndarray,
    energies: Mapping[str, np.ndarray],
    title: str,
) -> None:
    """Draws rows and samples, [n, d], on the data's principal axes, and energies.

    Energies are f(x, 0) of sets of rows, by the sets' names.
    """
    centre = data.mean(axis=0)
    axes_of_data = np.linalg.svd(data - centre, full_matrices=False)[2][:2].T
    with _figure(path, 2, side=4.0, title=title) as (left, right):
        for points, name, colour in ((data, "data", "k"), (samples, "samples", "C1")):
            flat = (points - centre) @ axes_of_data
            second = flat[:, 1] if flat.shape[1] > 1 else np.zeros(len(flat))
            left.plot(
                flat[:, 0], second, ".", ms=2.5, alpha=0.6, color=colour, label=name
            )
        left.set(title="on the data's principal axes", xticks=[], yticks=[])
        left.legend()
        _histograms(right, energies)


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


@_side_output
def plot_histograms(path: Path, energies: Mapping[str, np.ndarray], title: str) -> None:
    """Draws the distributions of several sets' energies over each other."""
    with _figure(path, 1, side=4.5, title=title) as (axis,):
        _histograms(axis, energies)


@_side_output
def plot_roc(
    path: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str
) -> None:
    """Draws ROC curves, by name, over each other; see `outliers.roc_curve`."""
    with _figure(path, 1, side=4.5, title=title) as (axis,):
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


@_side_output
def plot_curves(path: Path, lines: Iterable[Mapping[str, Any]], title: str) -> None:
    """Draws a run's metrics against steps; nothing where there are none.

    Losses, mean energies, gaps by t, gradient norms, and figures of evaluations, with
    the last value in the legend. Values that are not finite leave gaps.

    Args:
      path: of the PNG.
      lines: of metrics.jsonl; of several for one step and metric the last counts.
      title: of the picture.
    """
    curves = _by_metric(lines)
    if not curves:
        return
    last = max(step for values in curves.values() for step in values)
    with _figure(path, 3, side=3.6, title=f"{title}: metrics by step", rows=2) as axes:
        for axis, (name, pattern, scale) in zip(axes, _PANELS, strict=True):
            matches = [re.fullmatch(pattern, metric) for metric in curves]
            found = {m[1]: curves[m[0]] for m in matches if m}
            if not found:
                axis.set_axis_off()
                continue
            axis.set_yscale(**scale)  # First: margins are of the scale.
            _draw_curves(axis, found)
            of = f" ({_MOST_CURVES} of {len(found)})" * (len(found) > _MOST_CURVES)
            axis.set_title(name + of, fontsize=10)
            axis.set_xlim(0, 1.02 * max(1, last))
            axis.locator_params("x", nbins=6, integer=True)
            axis.tick_params(labelsize=8, which="both")
            axis.grid(alpha=0.3)


def _draw_curves(axis: Any, curves: Mapping[str, Mapping[int, float]]) -> None:
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


@_side_output
def plot_images(path: Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes a grid of uint8 images [n, height, width, 1 or 3], row by row, as a PNG.

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
    save_image(path, grid.repeat(times, axis=0).repeat(times, axis=1))


def save_images(folder: Path, images: np.ndarray) -> None:
    """Writes uint8 images [n, height, width, channels] as PNG files, by number."""
    digits = len(str(len(images) - 1))
    for i, image in enumerate(images):
        save_image(folder / f"{i:0{digits}}.png", image)


def save_image(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 image [height, width, channels] as a PNG, atomically."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    with written_atomically(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


@_side_output
def plot_samples(path: Path, samples: np.ndarray, extent: float, title: str) -> None:
    """Draws points [n, 2] in [−extent, extent]²."""
    with _figure(path, 1, side=4.5) as (axis,):
        _scatter(axis, samples, title, extent)
