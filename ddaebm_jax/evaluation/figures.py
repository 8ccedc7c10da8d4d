"""The figures and pictures of a trained model, by kind of data."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddaebm_jax import density, sampling, writers
from ddaebm_jax.data import tabular, test_rows
from ddaebm_jax.evaluation import ood, synthetic
from ddaebm_jax.models import Players

# Seeds of what evaluation draws: the same for every model, so that figures compare.
_SAMPLE_SEED, _HELD_OUT_SEED, _PROJECTION_SEED = 1_001, 1_002, 1_003

_PICTURE_POINTS = 5_000
_PICTURE_CELLS = 400


def draw_samples(
    experiment: Any, variables: Players, num_samples: int, seed: int = _SAMPLE_SEED
) -> np.ndarray:
    """Draws samples of the data, in the units in which the networks see them.

    Args:
      experiment: what the config describes (`train.Experiment`).
      variables: of the networks, usually the averages.
      num_samples: how many.
      seed: sample i depends on (seed, i) only.
    """
    return np.asarray(draw_levels(experiment, variables, num_samples, seed)[-1])


def draw_levels(
    experiment: Any, variables: Players, num_samples: int, seed: int = _SAMPLE_SEED
) -> np.ndarray:
    """Draws samples with the way they took: x_T, …, x_0."""
    levels = _trajectory(
        experiment.networks,
        num_samples,
        experiment.game.latent,
        experiment.schedule,
        _local(variables.generator),
        jax.random.key(seed),
    )
    return np.asarray(levels)


# The networks are functions and so static: one program for all calls of a run.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _trajectory(networks, num_samples, latent, schedule, generator, key):
    return sampling.sample_trajectory(
        schedule, networks, generator, key, num_samples, latent
    )


@partial(jax.jit, static_argnums=0)
def _energies(networks, params, x):
    return density.energy_at_data(networks, params, x)


def _local(variables: Any) -> Any:
    """Takes replicated variables to one device: evaluation is not sharded."""
    return jax.tree.map(np.asarray, variables)


def energies(experiment: Any, variables: Players, x: np.ndarray | Array) -> np.ndarray:
    """Returns f(x, 0) of rows, a chunk at a time."""
    params = _local(variables.energy)
    return np.asarray(
        density.evaluate_in_chunks(
            lambda part: _energies(experiment.networks, params, part), jnp.asarray(x)
        )
    )


def evaluate(experiment: Any, variables: Players) -> dict[str, Any]:
    """Returns a trained model's figures.

    Of a synthetic distribution: modes found and share of high-quality samples (where
    it is a mixture), sliced 2-Wasserstein distance to held-out data (beside that of
    two real sets), Jensen-Shannon divergence of the densities on a grid. Of a table
    with outliers: AUROC of f(x, 0), and of four baselines on the same split.

    Args:
      experiment: what the config describes (`train.Experiment`).
      variables: of the networks, usually the averages.
    """
    if experiment.source.distribution is not None:
        return _evaluate_plane(experiment, variables)
    return _evaluate_table(experiment, variables)


def _evaluate_plane(experiment: Any, variables: Players) -> dict[str, Any]:
    truth, settings = experiment.source.distribution, experiment.config.evaluation
    num = settings.num_samples
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


def draw_pictures(
    experiment: Any, variables: Players, directory: Path, step: int
) -> dict[str, Path]:
    """Draws a model's pictures into a directory.

    In the plane: data, samples and the density side by side, and a strip of the
    denoising steps. Of a table: rows and samples on the data's principal axes, and
    energies of held-out rows. The same noise each time, so that pictures compare.

    Returns:
      name → file.
    """
    title = f"{experiment.source.name}, step {step}"
    source = experiment.source
    if source.distribution is None:
        return {"table": _draw_table(experiment, variables, directory, step, title)}
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
    writers.plot_plane(
        paths["plane"],
        data,
        levels[-1],
        values.reshape(_PICTURE_CELLS, _PICTURE_CELLS),
        shown,
        title,
    )
    writers.plot_levels(paths["steps"], levels, max(shown, 3.0), title)
    return paths


def _draw_table(
    experiment: Any, variables: Players, directory: Path, step: int, title: str
) -> Path:
    table = experiment.source.table
    path = directory / f"table_{step:08d}.png"
    sets = {
        "held-out inliers": test_rows(table, tabular.INLIER),
        "outliers": test_rows(table, tabular.OUTLIER),
    }
    writers.plot_table(
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
