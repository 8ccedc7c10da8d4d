"""Pictures of a trained model, by kind of data."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from ddaebm_jax import density
from ddaebm_jax.data import Source, images, tabular, test_rows
from ddaebm_jax.evaluation import digits, inference, plots
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players

if TYPE_CHECKING:  # Commands that draw nothing do without it.
    import matplotlib.figure

_PLANE_POINTS = 5_000
_PLANE_CELLS = 400
_GRID_IMAGES, _TRAJECTORY_IMAGES, _HISTOGRAM_IMAGES = 100, 8, 500
_MOST_BYTES = 2**28
_PAIR_ROWS, _PAIR_COLUMNS = 5, 10
# Around the points of a plane, in their range.
_MARGIN = 0.125
_PANEL_IMAGES, _PANEL_POINTS, _PANEL_CELLS = 16, 2_000, 200


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
    axes, and energies of held-out rows; of two columns also their density. Of images:
    a grid of samples, the denoising steps, and the energies of held-out images and
    samples; of labelled images, which are small sets, also samples above the training
    images nearest to them. The step, of training, goes into titles and file names.
    """
    source = experiment.source
    if source.holds_images:
        draw, names = _draw_images, ("samples", "steps", "energies")
        if source.image_set.train_labels is not None:
            names += ("nearest",)
    elif source.distribution is None:
        draw, names = _draw_table, ("table",)
        names += ("plane",) if source.event_shape == (2,) else ()
    else:
        draw, names = _draw_plane, ("plane", "steps")
    files = {name: directory / f"{name}_{step:08d}.png" for name in names}
    title = f"{source.name}, step {step}"
    return Pictures(files, draw(experiment, variables, title, *files.values()))


def figure(
    experiment: Experiment, variables: Players, title: str
) -> "matplotlib.figure.Figure":
    """Returns the picture that tells most of a model.

    Of 2-D data: data, samples, the true density if it is known, and the model's, in the
    data's own units. Of other tables: standardised rows and samples on the data's
    principal axes, and energies of held-out rows. Of images: a grid of samples.
    """
    source = experiment.source
    if source.event_shape == (2,):
        return _plane_figure(experiment, variables, title)
    if source.table is not None:
        return _table_figure(experiment, variables, title)
    drawn = inference.draw_samples(experiment, variables, _GRID_IMAGES)
    return plots.plot_images(source.to_own_units(drawn), title)


def _plane_figure(
    experiment: Experiment, variables: Players, title: str
) -> "matplotlib.figure.Figure":
    source, log_truth = experiment.source, None
    if source.distribution is not None:
        data = source.held_out(_PLANE_POINTS, inference.HELD_OUT_SEED)
        box = _plane_box(source, data)
    else:
        data = source.to_own_units(source.table.train)
        low, high = data.min(axis=0), data.max(axis=0)
        margin = np.where(high > low, _MARGIN * (high - low), 1.0)
        box = tuple(zip(low - margin, high + margin, strict=True))
    grid = _grid(box, _PLANE_CELLS)
    shape = _PLANE_CELLS, _PLANE_CELLS
    if source.distribution is not None:
        log_density = jax.jit(source.distribution.log_density)
        points = grid.astype(np.float32)
        log_truth = density.evaluate_in_chunks(log_density, points)
        log_truth = np.asarray(log_truth).reshape(shape)
    points = source.from_own_units(grid)
    log_model = inference.energies(experiment, variables, points).reshape(shape)
    samples = inference.draw_samples(experiment, variables, _PLANE_POINTS)
    samples = source.to_own_units(samples)
    return plots.plot_plane(data, samples, log_truth, log_model, box, title)


def _grid(box: plots.Box, cells: int) -> Float[np.ndarray, "points 2"]:
    """Returns the centres of cells×cells parts of a box, the first slowest."""
    lines = (np.linspace(*ends, 2 * cells + 1)[1::2] for ends in box)
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)


def _plane_box(source: Source, data: np.ndarray) -> plots.Box:
    """Returns where the data are, not the square on which densities are compared."""
    reach = (1 + 2 * _MARGIN) * float(np.abs(data).max())
    return plots.square(min(source.distribution.extent, reach))


def _draw_plane(
    experiment: Experiment, variables: Players, title: str, plane: Path, steps: Path
) -> dict[str, np.ndarray]:
    source = experiment.source
    plots.write(plane, figure, experiment, variables, title)
    data = source.held_out(_PLANE_POINTS, inference.HELD_OUT_SEED)
    half = max(_plane_box(source, data)[0][1], 3.0)
    trajectories = inference.draw_trajectories(experiment, variables, _PLANE_POINTS)
    levels = np.swapaxes(trajectories, 0, 1)
    plots.write(steps, plots.plot_levels, levels, plots.square(half), title)
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
    # By one program, if it does not take too much memory to keep all levels.
    size = 4 * math.prod((*source.event_shape, experiment.schedule.num_steps + 1))
    num, fits = _HISTOGRAM_IMAGES, _HISTOGRAM_IMAGES * size <= _MOST_BYTES
    rows = num if fits else _TRAJECTORY_IMAGES
    rows = inference.draw_trajectories(experiment, variables, rows)
    samples = rows[:, -1]
    if not fits:
        samples = inference.draw_samples(experiment, variables, num)
    # A row for each sample, from noise to image.
    rows = rows[:_TRAJECTORY_IMAGES]
    shown = source.to_own_units(samples[:_GRID_IMAGES])
    plots.write_grid(grid, shown)
    if nearest is not None:
        train = images.stack(source.image_set.train)
        shown = shown[: _PAIR_ROWS * _PAIR_COLUMNS]
        places, _ = digits.nearest(shown, train)
        cells = _PAIR_ROWS, _PAIR_COLUMNS, *shown.shape[1:]
        pairs = np.stack([shown.reshape(cells), train[places].reshape(cells)], axis=1)
        pairs = pairs.reshape(-1, *shown.shape[1:])
        plots.write_grid(nearest, pairs, _PAIR_COLUMNS)
    pixels = source.to_own_units(rows.reshape(-1, *rows.shape[2:]))
    plots.write_grid(steps, pixels, rows.shape[1])
    held_out = source.held_out(_HISTOGRAM_IMAGES, inference.HELD_OUT_SEED)
    values = {
        "held-out images": inference.energies(experiment, variables, held_out),
        "samples": inference.energies(experiment, variables, samples),
    }
    plots.write(histograms, plots.plot_histograms, values, title)
    return {f"energy/{name}": v for name, v in values.items()}


def _draw_table(
    experiment: Experiment,
    variables: Players,
    title: str,
    table: Path,
    plane: Path | None = None,
) -> dict[str, np.ndarray]:
    plots.write(table, _table_figure, experiment, variables, title)
    if plane is not None:
        plots.write(plane, figure, experiment, variables, title)
    return {}


def _table_figure(
    experiment: Experiment, variables: Players, title: str
) -> "matplotlib.figure.Figure":
    table = experiment.source.table
    samples = inference.draw_samples(experiment, variables, len(table.train))
    energies = _held_out_energies(experiment, variables)
    return plots.plot_table(table.train, samples, energies, title)


def _held_out_energies(
    experiment: Experiment, variables: Players
) -> dict[str, np.ndarray]:
    table = experiment.source.table
    sets = {
        "held-out inliers": test_rows(table, tabular.INLIER),
        "outliers": test_rows(table, tabular.OUTLIER),
    }
    return {
        name: inference.energies(experiment, variables, rows)
        for name, rows in sets.items()
        if len(rows)
    }


def panel(experiment: Experiment, variables: Players) -> dict[str, np.ndarray]:
    """Returns what a row of `plots.plot_panels` shows of a model.

    Of images: `images`, uint8. In the plane: `samples`, `log_density` [side, side] and
    its `box`. Of a table: `samples`, `data`, and energies of held-out
    sets of rows, by their names.
    """
    source = experiment.source
    if source.holds_images:
        drawn = inference.draw_samples(experiment, variables, _PANEL_IMAGES)
        return {"images": source.to_own_units(drawn)}
    samples = inference.draw_samples(experiment, variables, _PANEL_POINTS)
    if source.distribution is None:
        train = source.table.train[:_PANEL_POINTS]
        energies = _held_out_energies(experiment, variables)
        return {"samples": samples, "data": train, **energies}
    data = source.held_out(_PANEL_POINTS, inference.HELD_OUT_SEED)
    box = _plane_box(source, data)
    grid = source.from_own_units(_grid(box, _PANEL_CELLS))
    logs = inference.energies(experiment, variables, grid)
    logs = logs.reshape(_PANEL_CELLS, _PANEL_CELLS)
    return {"samples": samples, "log_density": logs, "box": np.asarray(box)}
