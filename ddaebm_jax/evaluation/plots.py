"""Plots by matplotlib's Agg canvas, which leave the user's backend alone."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddaebm_jax.errors import one_line
from ddaebm_jax.files import written_atomically

# Approximate longer side of a grid of images.
_GRID_PIXELS = 640


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
    path: Path, columns: int, side: float = 3.2, title: str = ""
) -> Iterator[list]:
    """Yields axes, one beside another; then writes them as a PNG, atomically.

    In matplotlib's own style: the user's may need LaTeX or fonts that are not here.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(side * columns, side + 0.3), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        if title:
            figure.suptitle(title, fontsize=10, parse_math=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            figure.savefig(file, dpi=110, format="png")


def _scatter(axis: Any, points: np.ndarray, title: str, extent: float) -> None:
    axis.plot(points[:, 0], points[:, 1], ".", markersize=1.2, alpha=0.5, color="k")
    axis.set(
        title=title,
        xlim=(-extent, extent),
        ylim=(-extent, extent),
        aspect="equal",
        xticks=[],
        yticks=[],
    )


@_side_output
def plot_plane(
    path: Path,
    data: np.ndarray,
    samples: np.ndarray,
    log_density: np.ndarray,
    extent: float,
    title: str,
) -> None:
    """Draws data, samples and the model's density exp f(·, 0) side by side.

    Points are [n, 2]. The log density lies on a square grid over [−extent, extent]²,
    whose first axis is that of the first coordinate.
    """
    with _figure(path, 3, title=title) as axes:
        _scatter(axes[0], data, "data", extent)
        _scatter(axes[1], samples, "samples", extent)
        axes[2].imshow(
            np.exp(log_density - log_density.max()).T,
            origin="lower",
            extent=(-extent, extent, -extent, extent),
            cmap="magma",
        )
        axes[2].set(title="density  exp f(·, 0)", xticks=[], yticks=[])


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
    # Outliers reach far down: cut there, so that the bulk of all sets compares.
    low = min(np.quantile(values, 0.05) for values in energies.values())
    high = max(values.max() for values in energies.values())
    bins = np.linspace(low, max(high, low + 1e-6), 40)
    for name, values in energies.items():
        axis.hist(np.maximum(values, low), bins, alpha=0.6, density=True, label=name)
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
