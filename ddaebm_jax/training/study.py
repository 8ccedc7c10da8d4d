"""The runs of an ablation study: every variation of a recipe with every seed.

Each finished run is a line of `ablation.jsonl`, under a key of its config and data, and
is not repeated.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import files, progress
from ddaebm_jax.config import fields as fields_lib
from ddaebm_jax.config.variations import Fields, varied
from ddaebm_jax.data import open_source
from ddaebm_jax.errors import DivergedError, InputError, one_line
from ddaebm_jax.evaluation import metrics, pictures
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.models import Players
from ddaebm_jax.training import dispatch, loop, many, pilot, processes, reports
from ddaebm_jax.training.trained_run import load_run

RECORDS_FILE = "ablation.jsonl"

_LARGEST_FILE = 2**28
_GAP = "energy/gap_t"

Record = dict[str, Any]


def run(
    config: ml_collections.ConfigDict,
    variations: Mapping[str, Fields],
    seeds: Sequence[int],
    workdir: Path,
) -> dict[str, list[Record]]:
    """Train and measure what has no record yet; return the records of all runs.

    Runs on points and tables train together, the seeds of a variation at once, and
    their records are written together, so that a killed study repeats a variation as a
    whole. Runs on images train one by one, each in a run directory of its own.

    Args:
      config: the recipe.
      variations: see `config.variations`.
      seeds: of the runs.
      workdir: the study's directory, new or to go on with.

    Returns:
      variation → a record for each seed: `fields`, `seed`, `figures` (of
      `metrics.evaluate`, finite numbers), `seconds` of training or None, `fault` (why
      there are no figures) or None, and `key`.

    Raises:
      InputError: for data that cannot be opened, or a directory of something else.
    """
    processes.check_devices()
    dispatch.use_compilation_cache(config.compilation_cache)
    config = config_lib.with_absolute_paths(config)
    done = _open_records(workdir / RECORDS_FILE)
    source = open_source(config.data, config.seed)
    train = _train_one_by_one if source.holds_images else _train_together
    found = {}
    for name, fields in variations.items():
        configs = [varied(config, fields, seed) for seed in seeds]
        keys = [run_key(one, source.metadata()) for one in configs]
        due = {k: c for k, c in zip(keys, configs, strict=True) if k not in done}
        if due:
            with progress.phase(f"{name}: {len(due)} runs"):
                for records in train(due, workdir, name):
                    for record in records:
                        record |= {"variation": name, "fields": fields}
                        done[record["key"]] = record
                    lines = (json.dumps(record) + "\n" for record in done.values())
                    files.write_text_atomically(workdir / RECORDS_FILE, "".join(lines))
        found[name] = [done[key] | {"fields": fields} for key in keys]
    return found


def run_key(config: ml_collections.ConfigDict, data: Any) -> str:
    """Return the key of a run: a hash of its config, but for paths, and of its data."""
    leaves = dict(fields_lib.leaves(config.to_dict()))
    kept = {f: v for f, v in leaves.items() if f not in fields_lib.PATHS}
    text = json.dumps([kept, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def panels(workdir: Path, records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Return what `plots.plot_panels` shows of each variation that has a model."""
    found = {}
    for name, runs in records.items():
        paths = [_panel_path(workdir, record["key"]) for record in runs]
        if path := next(filter(Path.exists, paths), None):
            found[name] = files.read_npz(path, _LARGEST_FILE)
    return found


def _open_records(path: Path) -> dict[str, Record]:
    """Return the records of a study by their keys; a new study gets an empty file."""
    others = [found for found in path.parent.iterdir() if found.name != "lock"]
    if not path.exists() and others:
        raise InputError(
            f"--workdir={path.parent} is not empty and holds no {path.name}, so it is "
            "not a study; name a new directory"
        )
    path.touch()
    done = {}
    for number, line in enumerate(files.read_text(path, _LARGEST_FILE).splitlines(), 1):
        try:
            record = json.loads(line)
            done[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is no record ({one_line(error)}); delete it, "
                "and its run is repeated"
            ) from error
    return done


def _train_together(
    due: Mapping[str, ml_collections.ConfigDict], workdir: Path, name: str
) -> Iterator[list[Record]]:
    """Train runs at once by `vmap`; yield all their records.

    One by one where the levels of one of them cannot be found.
    """
    sources = [open_source(config.data, config.seed) for config in due.values()]
    started, failed = time.monotonic(), ""
    networks: dict[Any, Any] = {}  # One program measures all runs of the same levels.
    records: list[Record] = []
    try:
        configs = pilot.with_times(list(due.values()), sources)
        of_pilot = (time.monotonic() - started) / len(due)
        experiments = list(map(experiment_lib.build_from, configs, sources))
        trained = list(many.train(experiments, together=len(experiments)))
    except DivergedError as error:
        failed = str(error)
    if failed and len(due) > 1:
        for key, config in due.items():
            yield from _train_together({key: config}, workdir, name)
        return
    if failed:
        ((key, config),) = due.items()
        none = {"seconds": None, "figures": {}, "fault": failed}
        yield [{"key": key, "seed": config.seed} | none]
        return
    for key, run in zip(due, trained, strict=True):
        process = run.experiment.config.diffusion
        own = process.time_eps, process.times
        own = networks.setdefault(own, run.experiment.networks)
        experiment = run.experiment._replace(networks=own)
        record = {"key": key, "seed": experiment.config.seed}
        record["seconds"] = of_pilot + run.seconds
        record["times"] = list(process.times)
        record |= {"figures": {}, "fault": run.fault and run.fault.describe()}
        if run.fault is None:
            found = metrics.evaluate(experiment, run.state.ema)
            record["figures"] = _numbers(found)
            if not any(one["figures"] for one in records):
                _save_panel(workdir, key, experiment, run.state.ema, run.metrics)
        records.append(record)
    yield records


def _train_one_by_one(
    due: Mapping[str, ml_collections.ConfigDict], workdir: Path, name: str
) -> Iterator[list[Record]]:
    """Train runs in directories of their own; yield the record of each."""
    for key, config in due.items():
        variation = name.replace(" ", "_").replace("/", "_")
        folder = workdir / variation / f"{config.seed}-{key}"
        record: Record = {"key": key, "seed": config.seed, "seconds": None}
        record |= {"figures": {}, "fault": None}
        try:
            report = loop.train(config, folder)
        except DivergedError as error:
            record["fault"] = str(error)
        else:
            record["figures"] = _numbers(report["figures"])
            if report["resumed_from_step"] == 0:  # Else the time of a part only.
                record["seconds"] = report["seconds"]
            trained = load_run(folder)
            record["times"] = list(trained.experiment.config.diffusion.times)
            lines = reports.lines_to_draw(folder / reports.METRICS_FILE)
            _save_panel(workdir, key, trained.experiment, trained.variables, lines)
        yield [record]


def _numbers(figures: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the figures that are finite numbers."""
    numbers = {k: v for k, v in figures.items() if type(v) in (int, float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _panel_path(workdir: Path, key: str) -> Path:
    return workdir / "panels" / f"{key}.npz"


def _save_panel(
    workdir: Path,
    key: str,
    experiment: Experiment,
    variables: Players,
    lines: Iterable[Mapping[str, Any]],
) -> None:
    panel = pictures.panel(experiment, variables) | _curves(lines)
    path = _panel_path(workdir, key)
    path.parent.mkdir(exist_ok=True)
    with files.written_atomically(path) as file:
        np.savez_compressed(file, **panel)


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return `steps` [n] and `gaps` of the energy by t [n, T], NaN where unknown.

    Args:
      lines: of a run's metrics.
    """
    found = [line for line in lines if "energy/loss" in line]
    names = {name for line in found for name in line if name.startswith(_GAP)}
    ordered = sorted(names, key=lambda name: int(name.removeprefix(_GAP)))
    gaps = [[line.get(name, math.nan) for name in ordered] for line in found]
    return {"steps": np.array([line["step"] for line in found]), "gaps": np.array(gaps)}
