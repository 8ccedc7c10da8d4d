"""Outlier detection on MNIST: each digit left out of training in turn.

  pip install -e '.[mnist]'
  python benchmarks/mnist_outliers.py --workdir=/tmp/mnist_outliers \
      --results=/tmp/mnist_outliers.jsonl \
      --config.data.image_size=16 --config.data.batch_size=16 \
      --config.diffusion.num_steps=4 --config.model.unet.patch_size=2 \
      --config.model.unet.nf=16 --config.model.unet.ch_mult="(1,2,2)" \
      --config.model.reference=4000 --config.model.reference_kind=windows \
      --config.train.num_steps=2000 --config.evaluation.num_samples=500

Ten runs, each without one digit, of a narrower network than the recipe's, whose energy
has windows as its reference. Every score of the run and five detectors of pixels then
tell the digit from held-out images of the nine others. A line of figures for each digit
and detector is appended to --results; digits that have theirs are not run again, and a
stopped run goes on from its checkpoint. AUROC and average precision (of the digit left
out), means, ranks and wins are printed as in tables.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags
from outlier_tables import report, runs

from ddaebm_jax.commands.ood import detect
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation.outlier_sets import HELD_OUT_CLASSES
from ddaebm_jax.training import loop, run_directory

_LAST = "isolation forest"  # Of a digit's lines.
_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "mnist.py"
_CONFIG = config_flags.DEFINE_config_file("config", str(_RECIPE), "The recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
_RESULTS = flags.DEFINE_string("results", None, "File of the figures.", required=True)
_DIGITS = flags.DEFINE_list("digits", list("0123456789"), "Digits to leave out.")
flags.register_validator("digits", set("0123456789").issuperset, "digits: 0 to 9")


def main(argv: list[str]) -> None:
    """Runs what is not done yet, and prints."""
    del argv
    try:
        found = _main()
    except InputError as error:
        sys.exit(f"error: {error}")
    detectors = list(dict.fromkeys(job.detector for job in found))
    seeds = [_CONFIG.value.seed]
    figures = report.collect(found.values(), _DIGITS.value, seeds, detectors)
    print(f"\n{report.markdown(figures)}")


def _main() -> dict[runs.Job, dict[str, Any]]:
    config, results = _CONFIG.value.copy_and_resolve_references(), Path(_RESULTS.value)
    found = runs.read_results(results, config)
    if not found:
        runs.append(results, {"config": config.to_dict()})
    for digit in dict.fromkeys(_DIGITS.value):
        if runs.Job(digit, config.seed, _LAST) not in found:
            records = _lines(config, digit)
            runs.append(results, *(r for r in records if runs.job_of(r) not in found))
    return runs.read_results(results, config)


def _lines(config: ml_collections.ConfigDict, digit: str) -> list[dict[str, Any]]:
    """Trains without a digit; returns a line of figures for each detector."""
    config = config.copy_and_resolve_references()
    config.data.held_out_classes = (int(digit),)
    config.train.picture_every = 0
    config.train.tensorboard = False
    workdir = Path(_WORKDIR.value) / digit
    run_directory.check(workdir, config)  # Refuses a run of another config.
    training_report = workdir / run_directory.REPORT_FILE
    if not training_report.exists():
        loop.train(config, workdir)
    folder = detect(workdir, [HELD_OUT_CLASSES], baselines=True)
    measured = json.loads((folder / "report.json").read_text())
    sizes = {
        "train": json.loads(training_report.read_text())["figures"]["num_train"],
        "columns": config.data.image_size**2 * config.data.channels,
        "inliers": measured["inliers"]["num_images"],
        "outliers": measured["outliers"][HELD_OUT_CLASSES],
    }
    return [
        runs.Job(digit, config.seed, detector)._asdict()
        | sizes
        | {
            "auroc": one["auroc"]["value"],
            "average_precision": one["aupr_out"]["value"],
        }
        for detector, one in measured["figures"][HELD_OUT_CLASSES].items()
    ]


if __name__ == "__main__":
    app.run(main)
