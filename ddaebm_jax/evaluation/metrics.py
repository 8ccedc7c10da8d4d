"""Metrics of a trained model, by kind of data."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from ddaebm_jax import density
from ddaebm_jax.data import images, tabular, test_rows
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import detectors, digits, inference, outliers, plane, scores
from ddaebm_jax.evaluation.image_quality import Meter
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players


def evaluate(
    experiment: Experiment,
    variables: Players,
    meter: Meter | None = None,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Returns a trained model's metrics, as plain JSON values.

    Of a synthetic distribution: modes found and share of high-quality samples (where
    it is a mixture), sliced 2-Wasserstein distance to held-out data (beside that of
    two real sets), Jensen-Shannon divergence of the densities on a grid. Of a table
    with outliers: AUROC of f(x, 0), of the other scores (of those that are fitted to
    held-out inliers on the other ones, `num_unseen_inliers`), and of four baselines on
    the same split. Of images: energies of held-out images and samples, and the AUROC
    between the two. Beside an AUROC stands of how many scores it is. Of labelled images
    those of `digits.evaluate_digits`; with a meter those of `Meter.measure`. As many
    samples as evaluation.num_samples unless told otherwise.
    """
    num = num_samples or experiment.config.evaluation.num_samples
    if experiment.source.distribution is not None:
        return _evaluate_plane(experiment, variables, num)
    if experiment.source.holds_images:
        return _evaluate_images(experiment, variables, num, meter)
    return _evaluate_table(experiment, variables)


def _evaluate_plane(
    experiment: Experiment, variables: Players, num: int
) -> dict[str, Any]:
    source, truth = experiment.source, experiment.source.distribution
    samples = inference.draw_samples(experiment, variables, num)
    seed = inference.HELD_OUT_SEED
    held_out, others = source.held_out(num, seed), source.held_out(num, seed + 1)
    metrics: dict[str, Any] = {}
    if truth.modes is not None:
        coverage = plane.mode_coverage(samples, truth.modes, truth.mode_std)
        metrics["modes_found"] = coverage.modes_found
        metrics["modes"] = len(truth.modes)
        metrics["high_quality"] = coverage.high_quality

    def distance(points: np.ndarray) -> float:
        key = jax.random.key(plane.PROJECTION_SEED)
        return plane.sliced_wasserstein(points, held_out, key)

    points = density.grid_points(truth.extent, truth.cells)
    log_truth = density.evaluate_in_chunks(jax.jit(truth.log_density), points)
    log_model = inference.energies(experiment, variables, points)
    return metrics | {
        "sliced_wasserstein": distance(samples),
        "sliced_wasserstein_of_data": distance(others),
        "jensen_shannon": plane.jensen_shannon(log_truth, log_model),
    }


def _evaluate_table(experiment: Experiment, variables: Players) -> dict[str, Any]:
    def energies(rows: np.ndarray) -> np.ndarray:
        return inference.energies(experiment, variables, rows)

    table = experiment.source.table
    inlier_energies = energies(test_rows(table, tabular.INLIER))
    metrics = {
        "train_energy_mean": float(energies(table.train).mean()),
        "test_energy_mean": float(inlier_energies.mean()),
    }
    outlier_rows = test_rows(table, tabular.OUTLIER)
    if len(outlier_rows):
        metrics["num_test_inliers"] = len(inlier_energies)
        metrics["num_test_outliers"] = len(outlier_rows)
        metrics["auroc"] = outliers.auroc(inlier_energies, energies(outlier_rows))
        metrics |= _other_scores(experiment, variables)
        seed = experiment.config.seed
        baselines = detectors.table_scores(table.train, table.test, seed)
        is_outlier = table.test_labels == tabular.OUTLIER
        for name, own in baselines.items():
            metrics[f"auroc_{name}"] = outliers.auroc(own[~is_outlier], own[is_outlier])
    return metrics


def _other_scores(experiment: Experiment, variables: Players) -> dict[str, Any]:
    """Returns the AUROC of a table's scores other than the energy."""
    table = experiment.source.table
    is_outlier = table.test_labels == tabular.OUTLIER
    inliers = np.flatnonzero(~is_outlier)
    unseen = inliers[scores.unseen_places(len(inliers))]
    fitted = scores.fit_rows(experiment.source)
    metrics: dict[str, Any] = {"num_unseen_inliers": len(unseen)}
    for name in scores.SCORES[1:]:
        kept = unseen if name in scores.FITTED else inliers
        try:
            score = scores.fit_scores(experiment, variables, (name,), fitted)
            values = score(table.test)[name]
            auroc = outliers.auroc(values[kept], values[is_outlier])
            metrics[f"auroc_{name}"] = auroc
        except InputError as error:
            logging.warning("no AUROC of the score '%s': %s", name, error)
    return metrics


def _evaluate_images(
    experiment: Experiment, variables: Players, num: int, meter: Meter | None
) -> dict[str, Any]:
    image_set = experiment.source.image_set
    labelled = image_set.train_labels is not None
    held_out = experiment.source.held_out(num, inference.HELD_OUT_SEED)
    # Without labels only energies are compared, with as many held-out images.
    num_kept = num if labelled else len(held_out)
    num_drawn = num_kept if meter is None else num
    kept: list[np.ndarray] = []
    chunks = inference.draw_images(experiment, variables, num_drawn)
    stream = _keeping(chunks, kept, num_kept)
    metrics: dict[str, Any] = {} if meter is None else meter.measure(stream)
    for _ in stream:
        pass
    samples = np.concatenate(kept)
    real = inference.energies(experiment, variables, held_out)
    fake = inference.energies(experiment, variables, samples[: len(real)])
    metrics |= {
        "held_out_energy_mean": float(real.mean()),
        "samples_energy_mean": float(fake.mean()),
        # 0.5: the energy cannot tell them apart.
        "auroc_held_out_against_samples": outliers.auroc(real, fake),
        "num_held_out_energies": len(real),
        "num_samples_energies": len(fake),
    }
    if labelled:
        metrics |= digits.evaluate_digits(
            samples,
            images.stack(image_set.train),
            image_set.train_labels,
            images.stack(image_set.test),
            image_set.test_labels,
            experiment.config.seed,
        )
    return metrics


def _keeping(
    chunks: Iterator[np.ndarray], kept: list[np.ndarray], num: int
) -> Iterator[np.ndarray]:
    """Yields chunks of images, and appends the first `num` images to `kept`."""
    for chunk in chunks:
        kept.append(chunk[: max(num, 0)])
        num -= len(chunk)
        yield chunk
