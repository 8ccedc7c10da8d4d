"""The figures and pictures of a trained model, by kind of data."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from ddaebm_jax import density, sampling
from ddaebm_jax import sharding as parallel
from ddaebm_jax.data import images, tabular, test_rows
from ddaebm_jax.evaluation import digits, image_quality, ood, plots
from ddaebm_jax.evaluation import plane as synthetic
from ddaebm_jax.models import Players

# Seeds of what evaluation draws: the same for every model, so that figures compare.
_SAMPLE_SEED, _HELD_OUT_SEED, _PROJECTION_SEED = 1_001, 1_002, 1_003

_PICTURE_POINTS = 5_000
_PICTURE_CELLS = 400
_ROWS_AT_A_TIME = 20_000

# Of images: samples of the grid, of the denoising steps, and of the histogram.
_GRID_IMAGES, _STEP_IMAGES, _HISTOGRAM_IMAGES = 100, 8, 500


class Pictures(NamedTuple):
    """What a model looks like.

    Attributes:
      files: name → PNG file.
      histograms: name → numbers whose distribution is of interest.
    """

    files: dict[str, Path]
    histograms: dict[str, np.ndarray]


def draw_samples(
    experiment: Any, variables: Players, num_samples: int, seed: int = _SAMPLE_SEED
) -> np.ndarray:
    """Draws samples of the data, in the units in which the networks see them.

    Args:
      experiment: what the config describes (`experiments.Experiment`).
      variables: of the networks, usually the averages.
      num_samples: how many.
      seed: sample i depends on (seed, i) only.
    """
    drawer = sampling.sample
    return np.concatenate(
        list(_draw(experiment, variables, num_samples, seed, drawer, axis=0))
    )


def draw_levels(
    experiment: Any, variables: Players, num_samples: int, seed: int = _SAMPLE_SEED
) -> np.ndarray:
    """Draws samples with the way they took: x_T, …, x_0, each [num_samples, …]."""
    drawer = sampling.sample_trajectory
    parts = _draw(experiment, variables, num_samples, seed, drawer, axis=1)
    return np.concatenate(list(parts), axis=1)


def draw_images(
    experiment: Any, variables: Players, num_samples: int, seed: int = _SAMPLE_SEED
) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
    """Yields samples of images a chunk at a time; see `draw_samples`."""
    drawer = sampling.sample
    for part in _draw(experiment, variables, num_samples, seed, drawer, axis=0):
        yield np.asarray(images.to_uint8(part))


def _draw(
    experiment: Any,
    variables: Players,
    num_samples: int,
    seed: int,
    drawer: Any,
    axis: int,
) -> Iterator[np.ndarray]:
    """Draws a chunk at a time; each is taken to the host before the next."""
    mesh = evaluation_mesh(experiment)
    chunk = parallel.whole_rows(mesh, min(num_samples, rows_at_a_time(experiment)))
    generator = jax.device_put(variables.generator, parallel.replicated(mesh))
    for first in range(0, num_samples, chunk):
        drawn = _draw_chunk(
            drawer,
            experiment.networks,
            experiment.game.latent,
            parallel.replicated(mesh),
            experiment.schedule,
            generator,
            jax.random.key(seed),
            parallel.split_rows(mesh, np.arange(first, first + chunk, dtype=np.int32)),
        )
        wanted = min(chunk, num_samples - first)
        yield np.asarray(drawn)[(slice(None),) * axis + (slice(wanted),)]


def evaluation_mesh(experiment: Any) -> Mesh:
    """Returns the devices over which sampling and scoring are split."""
    return parallel.mesh_for_evaluation(experiment.config.parallel.num_devices)


def rows_at_a_time(experiment: Any) -> int:
    """Returns how many examples one call of a network takes in evaluation."""
    if experiment.source.holds_images:
        return experiment.config.evaluation.batch_size
    return _ROWS_AT_A_TIME


# The networks are functions and so static: one program for all calls of a run.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw_chunk(drawer, networks, latent, whole, schedule, generator, key, rows):
    num = len(rows)
    drawn = drawer(schedule, networks, generator, key, num, latent, rows)
    # Every device holds all of them, so that every process can read them.
    return jax.lax.with_sharding_constraint(drawn, whole)


@partial(jax.jit, static_argnums=(0, 1))
def _energies(networks, whole, params, x):
    if x.dtype == jnp.uint8:
        x = images.to_float(x)
    found = density.energy_at_data(networks, params, x)
    return jax.lax.with_sharding_constraint(found, whole)


def energies(experiment: Any, variables: Players, x: np.ndarray | Array) -> np.ndarray:
    """Returns f(x, 0) of rows, a chunk at a time; images may be uint8."""
    mesh = evaluation_mesh(experiment)
    whole = parallel.replicated(mesh)
    params = jax.device_put(variables.energy, whole)

    def one(part: np.ndarray) -> Array:
        rows = parallel.split_rows(mesh, part)
        return _energies(experiment.networks, whole, params, rows)[: len(part)]

    chunk = rows_at_a_time(experiment)
    return np.asarray(density.evaluate_in_chunks(one, np.asarray(x), chunk))


def open_meter(experiment: Any) -> image_quality.Meter | None:
    """Opens what measures images by Inception's features, if the config wants it.

    Raises:
      InputError: as `image_quality.open_meter`.
    """
    settings = experiment.config.evaluation
    if not settings.inception:
        return None
    mesh = evaluation_mesh(experiment)
    return image_quality.open_meter(settings, experiment.source.image_set, mesh)


def evaluate(
    experiment: Any,
    variables: Players,
    meter: image_quality.Meter | None = None,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Returns a trained model's figures.

    Of a synthetic distribution: modes found and share of high-quality samples (where
    it is a mixture), sliced 2-Wasserstein distance to held-out data (beside that of
    two real sets), Jensen-Shannon divergence of the densities on a grid. Of a table
    with outliers: AUROC of f(x, 0), and of four baselines on the same split. Of
    images: energies of held-out images and samples, and how well they tell the two
    apart; of labelled ones what a classifier sees in the samples (`digits`); with a
    meter what `image_quality` says.

    Args:
      experiment: what the config describes (`experiments.Experiment`).
      variables: of the networks, usually the averages.
      meter: of images; see `open_meter`.
      num_samples: how many are drawn; None: evaluation.num_samples.
    """
    num = num_samples or experiment.config.evaluation.num_samples
    if experiment.source.distribution is not None:
        return _evaluate_plane(experiment, variables, num)
    if experiment.source.holds_images:
        return _evaluate_images(experiment, variables, num, meter)
    return _evaluate_table(experiment, variables)


def _evaluate_plane(experiment: Any, variables: Players, num: int) -> dict[str, Any]:
    truth, settings = experiment.source.distribution, experiment.config.evaluation
    samples = draw_samples(experiment, variables, num)
    held_out = experiment.source.held_out(num, _HELD_OUT_SEED)
    others = experiment.source.held_out(num, _HELD_OUT_SEED + 1)
    figures: dict[str, Any] = {}
    if truth.modes is not None:
        coverage = synthetic.mode_coverage(samples, truth.modes, truth.mode_std)
        figures["modes_found"] = coverage.modes_found
        figures["modes"] = len(truth.modes)
        figures["high_quality"] = coverage.high_quality
    distance = jax.jit(
        lambda a, b: synthetic.sliced_wasserstein(
            a, b, jax.random.key(_PROJECTION_SEED), settings.num_projections
        )
    )
    figures["sliced_wasserstein"] = float(distance(samples, held_out))
    figures["sliced_wasserstein_of_data"] = float(distance(others, held_out))
    points = density.grid_points(truth.extent, truth.cells)
    log_truth = density.evaluate_in_chunks(jax.jit(truth.log_density), points)
    log_model = energies(experiment, variables, points)
    figures["jensen_shannon"] = float(
        synthetic.jensen_shannon(log_truth, jnp.asarray(log_model))
    )
    return figures


def _evaluate_table(experiment: Any, variables: Players) -> dict[str, Any]:
    table = experiment.source.table
    inliers = energies(experiment, variables, test_rows(table, tabular.INLIER))
    outlier_rows = test_rows(table, tabular.OUTLIER)
    figures: dict[str, Any] = {
        "train_energy_mean": float(energies(experiment, variables, table.train).mean()),
        "test_energy_mean": float(inliers.mean()),
    }
    if len(outlier_rows):
        outliers = energies(experiment, variables, outlier_rows)
        figures["auroc"] = ood.auroc(inliers, outliers)
        baselines = ood.baseline_aurocs(
            table.train, table.test, table.test_labels, experiment.config.seed
        )
        figures |= {f"auroc_{name}": value for name, value in baselines.items()}
    return figures


def _evaluate_images(
    experiment: Any,
    variables: Players,
    num: int,
    meter: image_quality.Meter | None,
) -> dict[str, Any]:
    found = experiment.source.image_set
    labelled = found.train_labels is not None
    held_out = experiment.source.held_out(num, _HELD_OUT_SEED)
    # Without a judge of samples only their energies are wanted, as many as there are
    # held-out images to hold against.
    drawn = num if labelled or meter is not None else len(held_out)
    kept: list[np.ndarray] = []
    stream = _keeping(
        draw_images(experiment, variables, drawn),
        kept,
        num if labelled else len(held_out),
    )
    figures: dict[str, Any] = {}
    if meter is not None:
        figures |= meter.measure(stream)
    for _ in stream:  # What is left, to be kept.
        pass
    samples = np.concatenate(kept)
    real = energies(experiment, variables, held_out)
    fake = energies(experiment, variables, samples[: len(real)])
    figures |= {
        "held_out_energy_mean": float(real.mean()),
        "samples_energy_mean": float(fake.mean()),
        # 0.5: the energy cannot tell them apart.
        "auroc_held_out_against_samples": ood.auroc(real, fake),
    }
    if labelled:
        timeout = experiment.config.data.timeout
        figures |= digits.evaluate_digits(
            samples,
            images.stack(found.train, timeout=timeout),
            found.train_labels,
            images.stack(found.test, timeout=timeout),
            found.test_labels,
            experiment.config.seed,
        )
    return figures


def _keeping(
    chunks: Iterator[np.ndarray], kept: list[np.ndarray], most: int
) -> Iterator[np.ndarray]:
    """Passes images on, and keeps the first `most` of them."""
    missing = most
    for part in chunks:
        if missing > 0:
            kept.append(part[:missing])
            missing -= len(part)
        yield part


def draw_pictures(
    experiment: Any, variables: Players, directory: Path, step: int
) -> Pictures:
    """Draws a model's pictures into a directory.

    In the plane: data, samples and the density side by side, and a strip of the
    denoising steps. Of a table: rows and samples on the data's principal axes, and
    energies of held-out rows. Of images: a grid of samples, the denoising steps, and
    the energies of held-out images and samples. The same noise each time, so that
    pictures compare.
    """
    title = f"{experiment.source.name}, step {step}"
    source = experiment.source
    if source.holds_images:
        return _draw_images(experiment, variables, directory, step, title)
    if source.distribution is None:
        path = _draw_table(experiment, variables, directory, step, title)
        return Pictures({"table": path}, {})
    extent = source.distribution.extent
    data = source.held_out(_PICTURE_POINTS, _HELD_OUT_SEED)
    # Show what holds the data, not the whole square on which densities compare.
    shown = min(extent, 1.25 * float(np.abs(data).max()))
    levels = draw_levels(experiment, variables, _PICTURE_POINTS)
    grid = density.grid_points(shown, _PICTURE_CELLS)
    values = energies(experiment, variables, grid)
    paths = {
        "plane": directory / f"plane_{step:08d}.png",
        "steps": directory / f"steps_{step:08d}.png",
    }
    plots.plot_plane(
        paths["plane"],
        data,
        levels[-1],
        values.reshape(_PICTURE_CELLS, _PICTURE_CELLS),
        shown,
        title,
    )
    plots.plot_levels(paths["steps"], levels, max(shown, 3.0), title)
    return Pictures(paths, {})


def _draw_images(
    experiment: Any, variables: Players, directory: Path, step: int, title: str
) -> Pictures:
    samples = draw_samples(experiment, variables, _HISTOGRAM_IMAGES)
    levels = draw_levels(experiment, variables, _STEP_IMAGES)
    held_out = experiment.source.held_out(_HISTOGRAM_IMAGES, _HELD_OUT_SEED)
    values = {
        "held-out images": energies(experiment, variables, held_out),
        "samples": energies(experiment, variables, samples),
    }
    files = {
        name: directory / f"{name}_{step:08d}.png"
        for name in ("samples", "steps", "energies")
    }
    grid = np.asarray(images.to_uint8(samples[:_GRID_IMAGES]))
    plots.plot_images(files["samples"], grid)
    # A row for each sample, from noise to image.
    rows = np.swapaxes(np.asarray(images.to_uint8(levels)), 0, 1)
    plots.plot_images(
        files["steps"], rows.reshape(-1, *rows.shape[2:]), columns=len(levels)
    )
    plots.plot_histograms(files["energies"], values, title)
    return Pictures(files, {f"energy/{name}": v for name, v in values.items()})


def _draw_table(
    experiment: Any, variables: Players, directory: Path, step: int, title: str
) -> Path:
    table = experiment.source.table
    path = directory / f"table_{step:08d}.png"
    sets = {
        "held-out inliers": test_rows(table, tabular.INLIER),
        "outliers": test_rows(table, tabular.OUTLIER),
    }
    plots.plot_table(
        path,
        table.train,
        draw_samples(experiment, variables, len(table.train)),
        {
            name: energies(experiment, variables, rows)
            for name, rows in sets.items()
            if len(rows)
        },
        title,
    )
    return path
