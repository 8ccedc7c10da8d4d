"""Out-of-distribution detection by a trained run's energy: `--mode=ood`."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8

from ddaebm_jax import modes, writers
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import ood, outlier_sets, scores
from ddaebm_jax.files import write_json_atomically, write_text_atomically

# The run's own held-out images, and the images of the classes it never saw.
HELD_OUT, HELD_OUT_CLASSES = "test", "held_out_classes"


def detect(
    workdir: str | Path,
    outliers: Sequence[str],
    inliers: str = HELD_OUT,
    checkpoint: str = "latest",
    seed: int = 0,
    num_draws: int = 10,
    baselines: bool = False,
    limit: int = 10_000,
) -> Path:
    """Measures how well scores of a run tell inliers from outliers.

    Scores: `scores.ood_scores`; figures: `ood.detection`. Writes a folder `ood` (a
    free name) into the run directory: `report.json`, `report.txt` (the table),
    `scores.npz` (every set's scores), and for each set of outliers `<set>_roc.png`
    and `<set>_energy.png`.

    Args:
      workdir: the run directory, of images.
      outliers: names of sets: `held_out_classes`, or as in `outlier_sets`.
      inliers: `test`, the run's own held-out images; or as in `outlier_sets`.
      checkpoint: as in `modes.load_run`.
      seed: of the noise of the scores, of shuffled and noise images, of the bootstrap
        and of the baselines.
      num_draws: noise draws a level of the score over t.
      baselines: fit four standard detectors to the training images' pixels, too.
      limit: most images of a set; 0: all.

    Returns:
      The folder.

    Raises:
      InputError: for a run without images, or sets that cannot be opened.
    """
    for flag, value, least in (("num_draws", num_draws, 1), ("limit", limit, 0)):
        if value < least:
            raise InputError(f"--{flag} is {value}; at least {least} is needed")
    if not outliers:
        raise InputError(
            "--out is empty; name sets of outliers, for example --out=inverted,noise; "
            f"built in: {', '.join((*outlier_sets.BUILT_IN, HELD_OUT_CLASSES))}"
        )
    twice = sorted({name for name in outliers if outliers.count(name) > 1})
    if twice:
        raise InputError(f"--out names {twice[0]} twice; name each set once")
    needs_data = baselines or inliers == HELD_OUT or HELD_OUT_CLASSES in outliers
    run = modes.load_run(workdir, needs_data, checkpoint)
    if not run.experiment.source.holds_images:
        raise InputError(
            f"--mode=ood is for runs of images, and data.name of {workdir} is "
            f"'{run.experiment.config.data.name}'; --mode=evaluate gives the AUROC of "
            "a table"
        )
    known = _open(run, inliers, None, seed, limit)
    # Everything is opened before anything is computed.
    sets = {name: _open(run, name, known, seed, limit) for name in outliers}
    scorers = _scorers(run, seed, num_draws, baselines)
    inlier_scores = scorers(known)
    found = {name: scorers(pixels) for name, pixels in sets.items()}
    detections = {
        name: {
            score: ood.detection(inlier_scores[score], values, seed)
            for score, values in of_set.items()
        }
        for name, of_set in found.items()
    }
    report = {
        "step": run.step,
        "checkpoint": checkpoint,
        "inliers": {"name": inliers, "num_images": len(known)},
        "outliers": {name: len(pixels) for name, pixels in sets.items()},
        "num_draws": num_draws,
        "seed": seed,
        "interval": "95%, percentile bootstrap of the test images",
        "figures": {
            name: {
                score: {field: one._asdict() for field, one in d._asdict().items()}
                for score, d in of_set.items()
            }
            for name, of_set in detections.items()
        },
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }
    folder = modes.free_path(run.workdir / "ood")
    folder.mkdir()
    write_json_atomically(folder / "report.json", report)
    table = ood.format_detections(detections)
    write_text_atomically(folder / "report.txt", table + "\n")
    _save_scores(folder / "scores.npz", {inliers: inlier_scores, **found})
    _draw(folder, inliers, inlier_scores, found, f"step {run.step}")
    logging.info("wrote %s", folder)
    return folder


def _open(
    run: modes.Run,
    name: str,
    inliers: UInt8[np.ndarray, "n height width channels"] | None,
    seed: int,
    limit: int,
) -> UInt8[np.ndarray, "m height width channels"]:
    source, data = run.experiment.source, run.experiment.config.data
    if name == HELD_OUT and inliers is None:
        test = source.image_set.test
        # Not the first ones: files in order of names may be of one kind.
        order = np.random.default_rng(seed).permutation(len(test))
        return images.stack(images.Subset(test, np.sort(order[: limit or len(test)])))
    if name == HELD_OUT_CLASSES:
        left_out = source.image_set.left_out
        if left_out is None:
            raise InputError(
                "--out=held_out_classes, but this run left no class out; train one "
                "with --config.data.held_out_classes='(9,)'"
            )
        return images.stack(left_out, limit or None)
    if inliers is None and name in ("inverted", "shuffled"):
        raise InputError(
            f"--in={name} is made from inliers, and so it can only be in --out"
        )
    none = np.zeros((limit or 10_000, *source.event_shape), np.uint8)
    return outlier_sets.open_outliers(
        name,
        none if inliers is None else inliers,
        source.event_shape,
        data,
        seed,
        limit,
    )


def _scorers(
    run: modes.Run, seed: int, num_draws: int, baselines: bool
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns images → scores by name."""
    experiment = run.experiment
    variables = jax.device_put(run.variables.energy, jax.devices()[0])
    others = {}
    if baselines:
        logging.info("fitting the baselines to the training images")
        others = ood.fit_baselines(
            images.stack(experiment.source.image_set.train), seed
        )

    def score(pixels: np.ndarray) -> dict[str, np.ndarray]:
        ours = scores.ood_scores(
            experiment.networks,
            experiment.schedule,
            variables,
            pixels,
            seed,
            num_draws,
            experiment.config.evaluation.batch_size,
        )
        return ours | {name: function(pixels) for name, function in others.items()}

    return score


def _save_scores(path: Path, found: dict[str, dict[str, np.ndarray]]) -> None:
    np.savez(
        path,
        **{
            f"{_slug(name)}/{_slug(score)}": values
            for name, of_set in found.items()
            for score, values in of_set.items()
        },
    )


def _slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "set"


def _draw(
    folder: Path,
    inliers: str,
    inlier_scores: dict[str, np.ndarray],
    found: dict[str, dict[str, np.ndarray]],
    title: str,
) -> None:
    for name, of_set in found.items():
        stem = modes.free_path(folder / f"{_slug(name)}_roc.png").stem
        stem = stem.removesuffix("_roc")
        curves = {
            score: ood.roc_curve(inlier_scores[score], values)
            for score, values in of_set.items()
        }
        writers.plot_roc(folder / f"{stem}_roc.png", curves, f"{name}, {title}")
        writers.plot_histograms(
            folder / f"{stem}_energy.png",
            {inliers: inlier_scores["energy"], name: of_set["energy"]},
            title,
        )


def read_table(folder: Path) -> str:
    """Returns the table that `detect` wrote into a folder."""
    return (folder / "report.txt").read_text().rstrip()


def names(value: str | Any) -> list[str]:
    """Splits a flag's comma-separated names."""
    return [part.strip() for part in value.split(",") if part.strip()]
