"""Out-of-distribution detection by a trained run's energy: `--mode=ood`."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

from ddaebm_jax import sharding as parallel
from ddaebm_jax.commands import common
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures, ood, outlier_sets, plots, scores
from ddaebm_jax.files import (
    write_json_atomically,
    write_text_atomically,
    written_atomically,
)
from ddaebm_jax.training.trained_run import TrainedRun, load_run

# The run's own held-out images, and the images of the classes it never saw.
HELD_OUT, HELD_OUT_CLASSES = "test", "held_out_classes"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_workdir(values)
    common.define_checkpoint(values)
    flags.DEFINE_string(
        "in",
        HELD_OUT,
        "Inliers: `test`, the run's held-out images, or one set as in --out.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "out",
        [],
        "Outliers, separated by commas: built-in sets (inverted, shuffled, noise, "
        "photos, digits, held_out_classes), folders, NPZ files, TFDS names.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "baselines",
        False,
        "Fit four standard detectors to the training pixels, too.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_draws",
        10,
        "Noise draws per level of the energy over t.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "limit",
        10_000,
        "Maximum number of images per set; 0: all.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of everything that is drawn.",
        lower_bound=0,
        upper_bound=2**31 - 1,
        flag_values=values,
    )
    common.define_skip_corrupt(values)
    common.define_distributed(values)


def run(values: flags.FlagValues) -> None:
    """Detect, and print the report's folder and table."""
    common.join_processes(values)
    with common.advice_for_trained_run(values.workdir):
        folder = detect(
            values.workdir,
            values.out,
            values["in"].value,
            values.checkpoint,
            values.seed,
            values.num_draws,
            values.baselines,
            values.limit,
            values.skip_corrupt,
        )
    if parallel.is_first_process():
        print(f"{folder}\n{(folder / 'report.txt').read_text().rstrip()}")


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

    Scores: `scores.ood_scores`; figures: `ood.detection`. Writes a folder `ood` (a
    free name) into the run directory: `report.json`, `report.txt` (the table),
    `scores.npz` (of every set, `in/<score>` and `out/<set>/<score>`), and for each set
    of outliers `<set>_roc.png` and `<set>_energy.png`.

    Args:
      workdir: the run directory, of images.
      outliers: names of sets: `held_out_classes`, or as in `outlier_sets`.
      inliers: `test`, the run's own held-out images; or as in `outlier_sets`.
      checkpoint: as in `load_run`.
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
    run = load_run(workdir, needs_data, checkpoint)
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
    # Everything is opened before anything is computed.
    known = _open(run, inliers, None, seed, limit)
    sets = {name: _open(run, name, known, seed, limit) for name in outliers}
    scorer = _scorer(run, seed, num_draws, baselines)
    of_inliers = scorer(known)
    of_outliers = {name: scorer(pixels) for name, pixels in sets.items()}
    detections = {
        name: {
            score: ood.detection(of_inliers[score], values, seed)
            for score, values in found.items()
        }
        for name, found in of_outliers.items()
    }
    report = {
        "step": run.step,
        "checkpoint": checkpoint,
        "inliers": {"name": inliers, "num_images": len(known)},
        "outliers": {name: len(pixels) for name, pixels in sets.items()},
        "num_draws": num_draws,
        "seed": seed,
        "interval": "95%, percentile bootstrap of the test images",
        "figures": _plain(detections),
        **common.circumstances(run.experiment, started),
    }
    folder = common.free_path(run.workdir / "ood")
    if not parallel.is_first_process():
        return folder
    folder.mkdir()
    write_json_atomically(folder / "report.json", report)
    table = ood.format_detections(detections)
    write_text_atomically(folder / "report.txt", table + "\n")
    _save(folder, inliers, of_inliers, of_outliers, f"step {run.step}")
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
            f"built in: {', '.join((*outlier_sets.BUILT_IN, HELD_OUT_CLASSES))}"
        )
    names = (inliers, *outliers)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--in and --out name {twice[0]} twice; name each set once")
    if HELD_OUT in outliers:
        raise InputError(
            f"--out has {HELD_OUT}, the run's own held-out images; it is for --in"
        )
    if inliers in ("inverted", "shuffled"):
        raise InputError(
            f"--in={inliers} is made from inliers, and so it can only be in --out"
        )


def _plain(detections: dict[str, dict[str, ood.Detection]]) -> dict[str, Any]:
    """Figures as JSON values: set → score → figure → value, low and high."""
    return {
        name: {
            score: {figure: one._asdict() for figure, one in found._asdict().items()}
            for score, found in of_set.items()
        }
        for name, of_set in detections.items()
    }


def _open(
    run: TrainedRun,
    name: str,
    inliers: UInt8[np.ndarray, "n height width channels"] | None,
    seed: int,
    limit: int,
) -> UInt8[np.ndarray, "m height width channels"]:
    """Opens one set; of the inliers' own, `inliers` is None."""
    source, data = run.experiment.source, run.experiment.config.data
    if name in (HELD_OUT, HELD_OUT_CLASSES):
        records = source.image_set.test
        if name == HELD_OUT_CLASSES:
            records = source.image_set.left_out
        if records is None:
            raise InputError(
                f"{HELD_OUT_CLASSES}: this run left no class out; train one with "
                "--config.data.held_out_classes='(9,)'"
            )
        chosen = outlier_sets.some(len(records), limit, seed)
        subset = images.Subset(records, chosen)
        return images.stack(subset, None, name, data.timeout)
    if inliers is None:  # Only their number is read.
        inliers = np.zeros((limit or 10_000, *source.event_shape), np.uint8)
    return outlier_sets.open_outliers(
        name, inliers, source.event_shape, data, seed, limit
    )


def _scorer(
    run: TrainedRun, seed: int, num_draws: int, baselines: bool
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns images → scores by name."""
    experiment = run.experiment
    others = {}
    if baselines:
        logging.info("fitting the baselines to the training images")
        pixels = images.stack(
            experiment.source.image_set.train,
            timeout=experiment.config.data.timeout,
        )
        others = ood.fit_baselines(pixels, seed)

    def score(pixels: np.ndarray) -> dict[str, np.ndarray]:
        ours = scores.ood_scores(
            experiment.networks,
            experiment.schedule,
            run.variables.energy,
            pixels,
            seed,
            num_draws,
            experiment.config.evaluation.batch_size,
            figures.evaluation_mesh(experiment),
        )
        return ours | {name: function(pixels) for name, function in others.items()}

    return score


def _save(
    folder: Path,
    inliers: str,
    of_inliers: dict[str, np.ndarray],
    of_outliers: dict[str, dict[str, np.ndarray]],
    title: str,
) -> None:
    """Writes all scores, and two pictures for each set of outliers."""
    arrays = {f"in/{_slug(score)}": values for score, values in of_inliers.items()}
    taken: set[str] = set()
    for number, (name, found) in enumerate(of_outliers.items()):
        slug = _slug(name)
        slug = slug if slug not in taken else f"{slug}_{number}"
        taken.add(slug)
        arrays |= {f"out/{slug}/{_slug(score)}": v for score, v in found.items()}
        curves = {
            score: ood.roc_curve(of_inliers[score], values)
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
