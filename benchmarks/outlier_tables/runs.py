"""The runs of the benchmark: a line of figures for each set, seed and detector.

Lines are appended as they are done, and a run that has one is not repeated.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import reference
from ddaebm_jax.config.fields import leaves
from ddaebm_jax.data import table_source
from ddaebm_jax.data.tabular import Standardizer, Table
from ddaebm_jax.errors import InputError, listed, one_line
from ddaebm_jax.evaluation import outliers, scores
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.training import many
from outlier_tables.baselines import DETECTORS
from outlier_tables.sets import OutlierTable, Split, split


def _reference(
    experiment: Experiment, variables: Players, rows: np.ndarray
) -> np.ndarray:
    """Returns the log density of the reference alone: what the network starts from."""
    known = reference.read(variables.energy)
    if known is None:
        return np.full(len(rows), np.nan)
    x, level = jnp.asarray(rows), jnp.zeros(len(rows), jnp.int32)
    density = reference.at_level(known, experiment.schedule, level)
    return np.asarray(reference.log_density(density, x))


def _score(
    name: str, experiment: Experiment, variables: Players, rows: np.ndarray
) -> np.ndarray:
    """Returns one of `scores.SCORES`; those that are fitted see training rows."""
    fitted = scores.fit_rows(experiment.source) if name in scores.FITTED else None
    return scores.fit_scores(experiment, variables, [name], fitted)(rows)[name]


# Scores of a trained model: (experiment, averaged networks, standardised rows) → one a
# row, larger for inliers. A run is trained once for all of them.
OURS: dict[str, Callable[..., np.ndarray]] = {
    **{name.replace(" ", "_"): partial(_score, name) for name in scores.SCORES},
    "reference": _reference,
}
DEFAULT = scores.TABLE_SCORE.replace(" ", "_")


class Job(NamedTuple):
    """One line of a results file."""

    set: str
    seed: int
    detector: str


def job_of(record: dict[str, Any]) -> Job:
    """Returns which line of a results file a record is."""
    return Job(*(record[field] for field in Job._fields))


def read_results(path: Path, config: ml_collections.ConfigDict) -> dict[Job, Any]:
    """Returns the lines of a results file; none if it is not there.

    A last line without an end, which a stopped command leaves, is cut off.

    Raises:
      InputError: if the file is none of results, a line cannot be read or is there
        twice, or it holds runs of another config.
    """
    if not path.exists():
        return {}
    found: dict[Job, Any] = {}
    try:
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        lines = whole.decode().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no file of results ({one_line(error)}); name another --results"
        ) from error
    if rest and not lines:
        raise InputError(f"{path} holds no line of results; name another --results")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            saved = record.get("config")
            job = None if saved else job_of(record)
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}: line {number} is no line of results ({one_line(error)}); "
                "delete it, or name another --results"
            ) from error
        if saved:
            _check_config(path, saved, config)
        elif job in found:
            raise InputError(f"{path}: line {number} is there twice; delete one")
        else:
            found[job] = record
    if rest:
        logging.warning("%s: cutting off its last line, which has no end", path)
        os.truncate(path, len(whole) + 1)
    return found


def _check_config(path: Path, saved: Any, config: ml_collections.ConfigDict) -> None:
    current = json.loads(json.dumps(config.to_dict()))
    # Fields that the file's version did not have yet have the base's values.
    default = json.loads(json.dumps(dict(leaves(config_lib.base()))))
    old = default | dict(leaves(config_lib.without_removed(saved)))
    differing = config_lib.differences(old, current)
    differing.pop("seed", None)
    if differing:
        pairs = [f"{k} {old!r} → {new!r}" for k, (old, new) in differing.items()]
        raise InputError(
            f"{path} holds runs of another config ({listed(pairs, 4)}); name another "
            "--results, or give that config"
        )


def append(path: Path, *records: dict[str, Any]) -> None:
    """Adds lines to a results file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def run_baseline(table: OutlierTable, job: Job) -> dict[str, Any]:
    """Fits and tests one of `baselines.DETECTORS`; returns its line."""
    parts, started = split(table, job.seed), time.monotonic()
    standardizer = Standardizer.fit(parts.train)
    # In double precision: some mixtures cannot be fitted in single.
    try:
        rows = [
            standardizer.transform(part, job.set).astype(np.float64)
            for part in (parts.train, parts.test)
        ]
        found, error = DETECTORS[job.detector](*rows, job.seed), None
    except Exception as failure:  # The library's, or of rows beyond float32.
        found, error = None, one_line(failure)
    return line(job, parts, found, time.monotonic() - started, error)


def line(
    job: Job, parts: Split, found: np.ndarray | None, seconds: float, error: str | None
) -> dict[str, Any]:
    """Returns the line of a run with these scores; without any it counts as chance."""
    from sklearn.metrics import average_precision_score

    is_outlier = parts.is_outlier
    record = job._asdict() | {
        "train": len(parts.train),
        "columns": parts.train.shape[1],
        "inliers": int((~is_outlier).sum()),
        "outliers": int(is_outlier.sum()),
        "auroc": 0.5,
        "average_precision": float(is_outlier.mean()),
        "seconds": round(seconds, 3),
    }
    if found is not None and np.isnan(found).any():
        error = error or f"{int(np.isnan(found).sum())} scores are NaN"
    if error:
        return record | {"error": error}
    # scikit-learn's average precision takes no infinite scores.
    finite = np.clip(np.asarray(found, np.float64), -1e300, 1e300)
    return record | {
        "auroc": outliers.auroc(found[~is_outlier], found[is_outlier]),
        "average_precision": float(average_precision_score(is_outlier, -finite)),
    }


def experiment_of(
    config: ml_collections.ConfigDict, train: np.ndarray, name: str, seed: int
) -> Experiment:
    """Returns what a recipe describes for these training rows, and nothing else."""
    config = config.copy_and_resolve_references()
    config.seed, config.data.path = seed, name
    standardizer = Standardizer.fit(train, config.data.whiten)
    rows = standardizer.transform(train, name)
    columns = tuple(f"column_{j}" for j in range(train.shape[1]))
    # Without test rows: what training cannot see it cannot use.
    table = Table(columns, rows, rows[:0], None, standardizer)
    return experiment_lib.build_from(config, table_source(config.data.name, table))


def run_ours(
    config: ml_collections.ConfigDict,
    runs: Sequence[tuple[OutlierTable, int]],
    detectors: Sequence[str],
    together: int,
) -> Iterator[dict[str, Any]]:
    """Trains a model for each table and seed; yields a line for each of its scores.

    Runs of one width train together (`many.train`). One whose losses are not finite
    has an error in its lines.
    """
    groups: dict[tuple[int, ...], list[tuple[OutlierTable, int, Experiment]]] = {}
    for table, seed in runs:
        train = split(table, seed).train
        one = experiment_of(config, train, table.name, seed)
        groups.setdefault(one.source.event_shape, []).append((table, seed, one))
    for group in groups.values():
        yield from _run_group(group, detectors, together)


def _run_group(
    group: list[tuple[OutlierTable, int, Experiment]],
    detectors: Sequence[str],
    together: int,
) -> Iterator[dict[str, Any]]:
    experiments = [experiment for _, _, experiment in group]
    # One program scores all runs of the same levels.
    networks: dict[Any, Any] = {}
    trained = many.train(experiments, together)
    for (table, seed, _), run in zip(group, trained, strict=True):
        process = run.experiment.config.diffusion
        own = process.time_eps, process.times
        own = networks.setdefault(own, run.experiment.networks)
        experiment = run.experiment._replace(networks=own)
        parts = split(table, seed)
        rows = experiment.source.table.standardizer.transform(parts.test, table.name)
        fault = None if run.fault is None else run.fault.describe()
        for detector in detectors:
            started, found, error = time.monotonic(), None, fault
            try:
                if fault is None:
                    found = OURS[detector](experiment, run.state.ema, rows)
            except InputError as failure:
                error = one_line(failure)
            seconds = run.seconds + time.monotonic() - started
            yield line(Job(table.name, seed, detector), parts, found, seconds, error)
