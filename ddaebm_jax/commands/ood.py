"""`--mode=ood`: detect images that are out of distribution by their energy."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from ddaebm_jax import files
from ddaebm_jax.commands import common
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import outlier_sets, plots
from ddaebm_jax.evaluation import outliers as outliers_lib
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import processes
from ddaebm_jax.training.trained_run import load_run

_BUILT_IN = ", ".join((*outlier_sets.BUILT_IN, outlier_sets.HELD_OUT_CLASSES))


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    text = "Inliers: `test` (held-out images), or a set as in --out."
    flags.DEFINE_string("in", outlier_sets.HELD_OUT, text, values)
    text = "Outliers, separated by commas or in several --out: built-in sets "
    text += f"({_BUILT_IN}), folders, NPZ files, TFDS names. A name with a comma is "
    text += """quoted: --out='"my,folder",noise'."""
    parser, serializer = flags.ListParser(), flags.CsvListSerializer(",")
    flags.DEFINE_multi(parser, serializer, "out", [], text, values)
    text = "Fit five standard detectors to the training pixels, too."
    flags.DEFINE_bool("baselines", False, text, values)
    text = "Noise draws per level of the energy over t."
    flags.DEFINE_integer("num_draws", 10, text, 1, None, values)
    text = "Maximum number of images per set; 0: all."
    flags.DEFINE_integer("limit", 10_000, text, 0, None, values)
    common.define_seed(values, "Seed of everything that is drawn.")
    common.define_skip_corrupt(values)
    common.define_data_path(values)
    common.define_distributed(values)


def run(values: flags.FlagValues) -> None:
    """Detect, and print the report's folder and table."""
    common.join_processes(values)
    names = "checkpoint", "seed", "num_draws", "baselines", "limit", "skip_corrupt"
    names += ("data_path",)
    settings = {name: values[name].value for name in names}
    outliers = [name for names in values.out for name in names]
    with common.out_of_memory_advice():
        folder = detect(values.workdir, outliers, values["in"].value, **settings)
    if processes.is_first_process():
        table = (folder / "report.txt").read_text(encoding="utf-8")
        common.show(f"{folder}\n{table.rstrip()}")


def detect(
    workdir: str | Path,
    outliers: Sequence[str],
    inliers: str = outlier_sets.HELD_OUT,
    checkpoint: str = "latest",
    seed: int = 0,
    num_draws: int = 10,
    baselines: bool = False,
    limit: int = 10_000,
    skip_corrupt: bool = False,
    data_path: str | Path | None = None,
) -> Path:
    """Measure how well scores of a run of images tell inliers from outliers.

    The arguments are the flags of this mode; see also `outliers.measure`. Returns a new
    folder `ood` in the run directory, which the first process writes: `report.json`,
    `report.txt`, `scores.npz` (`in/<score>`, `out/<set>/<score>`), and for each set
    `<set>_roc.png` and `<set>_energy.png`. Raises InputError for a run without images,
    or sets that cannot be opened.
    """
    started = time.monotonic()
    _check(outliers, inliers)
    own = {outlier_sets.HELD_OUT, outlier_sets.HELD_OUT_CLASSES} & {inliers, *outliers}
    run = load_run(workdir, baselines or bool(own), checkpoint, data_path)
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
    sets, settings = (inliers, outliers), (seed, num_draws, limit, baselines)
    measured = outliers_lib.measure(run.experiment, run.variables, *sets, *settings)
    num_inliers = len(measured.inlier_scores["energy"])
    sizes = {name: len(s["energy"]) for name, s in measured.outlier_scores.items()}
    report = {
        "step": run.step,
        "checkpoint": checkpoint,
        "inliers": {"name": inliers, "num_images": num_inliers},
        "outliers": sizes,
        "num_draws": num_draws,
        "seed": seed,
        "interval": "95%, percentile bootstrap of the test images",
        "figures": _plain(measured),
        **common.circumstances(run.experiment, started),
    }
    if not processes.is_first_process():
        return run.workdir
    folder = common.claimed(run.workdir / "ood", folder=True)
    files.write_json_atomically(folder / "report.json", report)
    table = outliers_lib.format_detections(measured.detections, num_inliers, sizes)
    files.write_text_atomically(folder / "report.txt", table + "\n")
    _save(folder, inliers, measured, f"step {run.step}")
    logging.info("wrote %s", folder)
    return folder


def _check(outliers: Sequence[str], inliers: str) -> None:
    """Refuse what can be refused before a run is loaded."""
    if not outliers:
        raise InputError(
            "--out is empty; name sets of outliers, for example --out=inverted,noise; "
            f"built in: {_BUILT_IN}"
        )
    names = (inliers, *outliers)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--in and --out name {twice[0]} twice; name each set once")
    if outlier_sets.HELD_OUT in outliers:
        raise InputError(
            f"--out has {outlier_sets.HELD_OUT}, the run's own held-out images; it is "
            "for --in"
        )
    for name in filter(outlier_sets.is_path, names):
        user_path(name, "--in" if name == inliers else "--out")
    if inliers in outlier_sets.DERIVED:
        raise InputError(
            f"--in={inliers} is made from inliers, and so it can only be in --out"
        )


def _plain(measured: outliers_lib.Measured) -> dict[str, Any]:
    """Return JSON values: set → score → metric → value, low and high."""
    return {
        name: {
            score: {metric: one._asdict() for metric, one in found._asdict().items()}
            for score, found in of_set.items()
        }
        for name, of_set in measured.detections.items()
    }


def _save(
    folder: Path, inliers: str, measured: outliers_lib.Measured, title: str
) -> None:
    """Write all scores, and two pictures for each set of outliers."""
    of_inliers = measured.inlier_scores
    arrays = {f"in/{_slug(score)}": values for score, values in of_inliers.items()}
    slugs: list[str] = []
    for name, found in measured.outlier_scores.items():
        slug = _slug(name)
        slug = slug if slug not in slugs else f"{slug}_{len(slugs)}"
        slugs.append(slug)
        arrays |= {f"out/{slug}/{_slug(score)}": v for score, v in found.items()}
        curves = {
            score: outliers_lib.roc_curve(of_inliers[score], values)
            for score, values in found.items()
        }
        energies = {f"in: {inliers}": of_inliers["energy"]}
        energies[f"out: {name}"] = found["energy"]
        for kind, *drawn in (
            ("roc", plots.plot_roc, curves, f"{name}, {title}"),
            ("energy", plots.plot_histograms, energies, title),
        ):
            plots.write(folder / f"{slug}_{kind}.png", *drawn)
    with files.written_atomically(folder / "scores.npz") as file:
        np.savez(file, **arrays)


def _slug(name: str) -> str:
    """Return a name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "set"
