"""Outlier detection on MNIST: each digit left out of training in turn.

  pip install -e '.[mnist]'
  python benchmarks/mnist_outliers.py --workdir=/tmp/mnist_outliers \
      --config.data.image_size=16 --config.model.reference=32 \
      --config.train.num_steps=2000 --config.evaluation.num_samples=500

Ten runs of the recipe, each without one digit, which every score of the run and five
detectors of pixels then tell from held-out images of the nine others. Runs and figures
already in the directory are taken up, not repeated. AUROC and average precision (of the
digit left out) are printed as tables.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ddaebm_jax.commands.ood import detect
from ddaebm_jax.evaluation.outlier_sets import HELD_OUT_CLASSES
from ddaebm_jax.files import write_json_atomically
from ddaebm_jax.training import loop, run_directory

_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "mnist.py"
_CONFIG = config_flags.DEFINE_config_file("config", str(_RECIPE), "The recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
_DIGITS = flags.DEFINE_list("digits", list("0123456789"), "Digits to leave out.")
_METRICS = {"AUROC": "auroc", "Average precision": "aupr_out"}


def main(argv: list[str]) -> None:
    """Trains, measures and prints."""
    del argv
    found: dict[str, Any] = {}
    for digit in _DIGITS.value:
        found[digit] = _figures(int(digit))
        for title, metric in _METRICS.items():
            print(f"\n**{title}**\n\n{_table(found, metric)}", flush=True)


def _figures(digit: int) -> dict[str, Any]:
    """Returns score → metric → value with its interval, of a run without a digit."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.data.held_out_classes = (digit,)
    config.train.picture_every = 0
    config.train.tensorboard = False
    workdir = Path(_WORKDIR.value) / str(digit)
    run_directory.check(workdir, config)  # Refuses a run of another config.
    figures = workdir / "outliers.json"
    if not figures.exists():
        if not (workdir / run_directory.REPORT_FILE).exists():
            loop.train(config, workdir)
        folder = detect(workdir, [HELD_OUT_CLASSES], baselines=True)
        report = json.loads((folder / "report.json").read_text())
        write_json_atomically(figures, report["figures"][HELD_OUT_CLASSES])
    return json.loads(figures.read_text())


def _table(found: dict[str, Any], metric: str) -> str:
    """Returns a row a digit, the best of each in bold, and the means."""
    scores, runs = list(next(iter(found.values()))), found.values()
    values = np.array([[run[s][metric]["value"] for s in scores] for run in runs])
    lines = [["left out", *scores], ["---"] * (len(scores) + 1)]
    for name, row in zip([*found, "**mean**"], [*values, values.mean(0)], strict=True):
        cells = [f"**{v:.3f}**" if v == row.max() else f"{v:.3f}" for v in row]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    app.run(main)
