"""Out-of-distribution detection by a trained run's energy: `--mode=ood`."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from ddaebm_jax.commands import modes
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import outliers as outlier_detection
from ddaebm_jax.evaluation import plots
from ddaebm_jax.evaluation.outlier_sets import (
    BUILT_IN,
    DERIVED,
    HELD_OUT,
    HELD_OUT_CLASSES,
)
from ddaebm_jax.files import (
    write_json_atomically,
    write_text_atomically,
    written_atomically,
)


def detect(
    workdir: str | Path,
    outliers: Sequence[str],
    inliers: str = HELD_OUT,
    checkpoint: str = "latest",
    seed: int = 0,
    num_draws: int = 10,
    baselines: bool = False,
    limit: int = 10_000,
    skip_corrupt: bool = False,
) -> Path:
    """Measures how well scores of a run tell inliers from outliers.

    Scores: `inference.outlier_scores`; metrics: `outliers.detection`. Writes a folder
    `ood` (a free name) into the run directory: `report.json`, `report.txt` (the
    table), `scores.npz` (of every set, `in/<score>` and `out/<set>/<score>`), and for
    each set of outliers `<set>_roc.png` and `<set>_energy.png`.

    Args:
      workdir: the run directory, of images.
      outliers: names of sets: `held_out_classes`, or as in `outlier_sets`.
      inliers: `test`, the run's own held-out images; or as in `outlier_sets`.
      checkpoint: as in `modes.load_run`.
      seed: of the noise of the scores, of what is drawn, of the choice where a set has
        more than `limit` images, of the bootstrap and of the baselines.
      num_draws: noise draws a level of the score over t.
      baselines: fit four standard detectors to the training images' pixels, too.
      limit: most images of a set; 0: all.
      skip_corrupt: leave a folder's images out that are of no use.

    Returns:
      The folder, which the first of several processes writes.

    Raises:
      InputError: for a run without images, or sets that cannot be opened.
    """
    started = time.monotonic()
    _check(outliers, inliers, num_draws, limit)
    needs_data = baselines or not {HELD_OUT, HELD_OUT_CLASSES}.isdisjoint(
        (inliers, *outliers)
    )
    run = modes.load_run(workdir, needs_data, checkpoint)
    config = run.experiment.config
    if not run.experiment.source.holds_images:
        raise InputError(
            f"--mode=ood is for runs of images, and data.name of {workdir} is "
            f"'{config.data.name}'; --mode=evaluate gives the AUROC of a table"
        )
    if config.data.name in (inliers, *outliers):
        raise InputError(
            f"'{config.data.name}' is what this run was trained on; its held-out "
            "images are --in=test"
        )
    config.data.skip_corrupt = skip_corrupt
    measured = outlier_detection.measure(
        run.experiment,
        run.variables,
        inliers,
        outliers,
        seed,
        num_draws,
        limit,
        baselines,
    )
    num_inliers = len(measured.inlier_scores["energy"])
    report = {
        "step": run.step,
        "checkpoint": checkpoint,
        "inliers": {"name": inliers, "num_images": num_inliers},
        "outliers": {
            name: len(scores["energy"])
            for name, scores in measured.outlier_scores.items()
        },
        "num_draws": num_draws,
        "seed": seed,
        "interval": "95%, percentile bootstrap of the test images",
        "figures": _plain(measured.detections),
        **modes.circumstances(run.experiment, started),
    }
    folder = modes.free_path(run.workdir / "ood")
    if jax.process_index() != 0:
        return folder
    folder.mkdir()
    write_json_atomically(folder / "report.json", report)
    table = outlier_detection.format_detections(measured.detections)
    write_text_atomically(folder / "report.txt", table + "\n")
    _save(folder, inliers, measured, f"step {run.step}")
    logging.info("wrote %s", folder)
    return folder


def _check(outliers: Sequence[str], inliers: str, num_draws: int, limit: int) -> None:
    """Refuses what can be refused before a run is loaded."""
    for flag, value, least in (("num_draws", num_draws, 1), ("limit", limit, 0)):
        if value < least:
            raise InputError(f"--{flag} is {value}; at least {least} is needed")
    if not outliers:
        raise InputError(
            "--out is empty; name sets of outliers, for example --out=inverted,noise; "
            f"built in: {', '.join((*BUILT_IN, HELD_OUT_CLASSES))}"
        )
    names = (inliers, *outliers)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--in and --out name {twice[0]} twice; name each set once")
    if HELD_OUT in outliers:
        raise InputError(
            f"--out has {HELD_OUT}, the run's own held-out images; it is for --in"
        )
    if inliers in DERIVED:
        raise InputError(
            f"--in={inliers} is made from inliers, and so it can only be in --out"
        )


def _plain(
    detections: dict[str, dict[str, outlier_detection.Detection]],
) -> dict[str, Any]:
    """Figures as JSON values: set → score → figure → value, low and high."""
    return {
        name: {
            score: {figure: one._asdict() for figure, one in found._asdict().items()}
            for score, found in of_set.items()
        }
        for name, of_set in detections.items()
    }


def _save(
    folder: Path,
    inliers: str,
    measured: outlier_detection.Measured,
    title: str,
) -> None:
    """Writes all scores, and two pictures for each set of outliers."""
    of_inliers = measured.inlier_scores
    arrays = {f"in/{_slug(score)}": values for score, values in of_inliers.items()}
    taken: set[str] = set()
    for number, (name, found) in enumerate(measured.outlier_scores.items()):
        slug = _slug(name)
        slug = slug if slug not in taken else f"{slug}_{number}"
        taken.add(slug)
        arrays |= {f"out/{slug}/{_slug(score)}": v for score, v in found.items()}
        curves = {
            score: outlier_detection.roc_curve(of_inliers[score], values)
            for score, values in found.items()
        }
        plots.plot_roc(folder / f"{slug}_roc.png", curves, f"{name}, {title}")
        plots.plot_histograms(
            folder / f"{slug}_energy.png",
            {f"in: {inliers}": of_inliers["energy"], f"out: {name}": found["energy"]},
            title,
        )
    with written_atomically(folder / "scores.npz") as file:
        np.savez(file, **arrays)


def _slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "set"
