"""Pictures of a trained model, by kind of data."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ddaebm_jax import density
from ddaebm_jax.data import images, tabular, test_rows
from ddaebm_jax.evaluation import digits, inference, plots
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

_PLANE_POINTS = 5_000
_PLANE_CELLS = 400
_GRID_IMAGES, _TRAJECTORY_IMAGES, _HISTOGRAM_IMAGES = 100, 8, 500
_PAIR_ROWS, _PAIR_COLUMNS = 5, 10


class Pictures(NamedTuple):
    """PNG files, and numbers whose distribution is of interest, both by name."""

    files: dict[str, Path]
    histograms: dict[str, np.ndarray]


def draw_pictures(
    experiment: Experiment, variables: Players, directory: Path, step: int
) -> Pictures:
    """Draws a model's pictures into a directory, with the same noise each time.

    In the plane: data, samples, the true density and the model's side by side, and a
    strip of the denoising steps. Of a table: rows and samples on the data's principal
    axes, and energies of held-out rows. Of images: a grid of samples, the denoising
    steps, and the energies of held-out images and samples; of labelled images, which
    are small sets, also samples above the training images nearest to them. The step,
    of training, goes into titles and file names.
    """
    source = experiment.source
    if source.holds_images:
        draw, names = _draw_images, ("samples", "steps", "energies")
        if source.image_set.train_labels is not None:
            names += ("nearest",)
    elif source.distribution is None:
        draw, names = _draw_table, ("table",)
    else:
        draw, names = _draw_plane, ("plane", "steps")
    files = {name: directory / f"{name}_{step:08d}.png" for name in names}
    title = f"{source.name}, step {step}"
    return Pictures(files, draw(experiment, variables, title, *files.values()))


def _draw_plane(
    experiment: Experiment, variables: Players, title: str, plane: Path, steps: Path
) -> dict[str, np.ndarray]:
    source = experiment.source
    data = source.held_out(_PLANE_POINTS, inference.HELD_OUT_SEED)
    # Where the data are, not the whole square on which densities are compared.
    shown = min(source.distribution.extent, 1.25 * float(np.abs(data).max()))
    trajectories = inference.draw_trajectories(experiment, variables, _PLANE_POINTS)
    levels = np.swapaxes(trajectories, 0, 1)
    grid = density.grid_points(shown, _PLANE_CELLS)
    log_truth = density.evaluate_in_chunks(
        jax.jit(source.distribution.log_density), grid
    )
    log_model = inference.energies(experiment, variables, grid)
    logs = (
        np.asarray(values).reshape(_PLANE_CELLS, _PLANE_CELLS)
        for values in (log_truth, log_model)
    )
    plots.plot_plane(plane, data, levels[-1], *logs, shown, title)
    plots.plot_levels(steps, levels, max(shown, 3.0), title)
    return {}


def _draw_images(
    experiment: Experiment,
    variables: Players,
    title: str,
    grid: Path,
    steps: Path,
    histograms: Path,
    nearest: Path | None = None,
) -> dict[str, np.ndarray]:
    source = experiment.source
    samples = inference.draw_samples(experiment, variables, _HISTOGRAM_IMAGES)
    shown = np.asarray(images.to_uint8(samples[:_GRID_IMAGES]))
    plots.plot_images(grid, shown)
    if nearest is not None:
        train = images.stack(source.image_set.train, timeout=source.timeout)
        shown = shown[: _PAIR_ROWS * _PAIR_COLUMNS]
        places, _ = digits.nearest(shown, train)
        rows = _PAIR_ROWS, _PAIR_COLUMNS, *shown.shape[1:]
        pairs = np.stack([shown.reshape(rows), train[places].reshape(rows)], axis=1)
        pairs = pairs.reshape(-1, *shown.shape[1:])
        plots.plot_images(nearest, pairs, columns=_PAIR_COLUMNS)
    # A row for each sample, from noise to image.
    rows = inference.draw_trajectories(experiment, variables, _TRAJECTORY_IMAGES)
    pixels = np.asarray(images.to_uint8(rows.reshape(-1, *rows.shape[2:])))
    plots.plot_images(steps, pixels, columns=rows.shape[1])
    held_out = source.held_out(_HISTOGRAM_IMAGES, inference.HELD_OUT_SEED)
    values = {
        "held-out images": inference.energies(experiment, variables, held_out),
        "samples": inference.energies(experiment, variables, samples),
    }
    plots.plot_histograms(histograms, values, title)
    return {f"energy/{name}": v for name, v in values.items()}


def _draw_table(
    experiment: Experiment, variables: Players, title: str, path: Path
) -> dict[str, np.ndarray]:
    table = experiment.source.table
    sets = {
        "held-out inliers": test_rows(table, tabular.INLIER),
        "outliers": test_rows(table, tabular.OUTLIER),
    }
    plots.plot_table(
        path,
        table.train,
        inference.draw_samples(experiment, variables, len(table.train)),
        {
            name: inference.energies(experiment, variables, rows)
            for name, rows in sets.items()
            if len(rows)
        },
        title,
    )
    return {}
