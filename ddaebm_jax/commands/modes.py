"""What is done with a trained run: sample, score, evaluate.

Everything is restored from the run directory alone, but that `evaluate` reads images
again from where they were.
"""

import csv
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiments
from ddaebm_jax import sharding as parallel
from ddaebm_jax.data import images, tabular, test_rows
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures, plots
from ddaebm_jax.files import (
    write_json_atomically,
    write_text_atomically,
    written_atomically,
)
from ddaebm_jax.models import Players
from ddaebm_jax.training import (
    checkpoint_files,
    dispatch,
    reports,
)
from ddaebm_jax.training import (
    checkpoints as checkpointing,
)
from ddaebm_jax.training.run_directory import REPORT_FILE, read_config


class Run(NamedTuple):
    """A trained run.

    Attributes:
      workdir: its directory.
      experiment: what its config describes.
      variables: the averaged variables of its checkpoint.
      step: of that checkpoint.
    """

    workdir: Path
    experiment: experiments.Experiment
    variables: Players
    step: int


def load_run(
    workdir: str | Path, open_images: bool = False, checkpoint: str = "latest"
) -> Run:
    """Restores a run from its directory, which is only read.

    Its config does not decide where else is written, nor what compiled code is run.

    Args:
      workdir: the run directory.
      open_images: whether images are opened too, for figures that need them. Nothing
        else needs more than the directory.
      checkpoint: `latest`, the newest that is intact; `best`, of the lowest FID; or the
        step of one that is kept.

    Raises:
      InputError: if the directory holds no run or no such checkpoint, or if it is
        damaged.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    _distrust(config)
    dispatch.use_compilation_cache(config.compilation_cache)
    folder = checkpoint_files.BEST if checkpoint == "best" else checkpoint_files.NEWEST
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True, folder=folder)
    try:
        asked_for = _step(checkpoints, workdir, checkpoint)
        if checkpoints.latest_step() is None:
            raise checkpoint_files.CheckpointError(
                checkpoint_files.no_checkpoint(workdir)
            )
        experiment = experiments.build(config, workdir, open_images)
        like = experiments.evaluation_state(experiment)
        if asked_for is None:
            found = checkpoints.restore_newest(like)
        else:
            found = checkpoints.restore_one(like, asked_for)
    finally:
        checkpoints.close()
    if found is None:  # Deleted meanwhile.
        raise checkpoint_files.CheckpointError(checkpoint_files.no_checkpoint(workdir))
    described = experiment.source.metadata()
    if None not in (described, found.info["data"]) and described != found.info["data"]:
        raise InputError(
            f"the data of {workdir} are not those of its checkpoint {found.step}; copy "
            "the whole run directory again, and leave its images as they were"
        )
    return Run(workdir, experiment, found.state.ema, found.step)


def _distrust(config: ml_collections.ConfigDict) -> None:
    """Takes from a config what a stranger's run directory must not decide.

    JAX runs the programs that it finds in the compilation cache. Paths at which files
    are made where there are none are only read; another is used where they are not.
    """
    config.compilation_cache.directory = ""
    data, evaluation = config.data, config.evaluation
    tfds_set = f"{data.tfds_dir}/{data.tfds.partition(':')[0]}"
    made = (
        (evaluation, "reference_path", evaluation.reference_path, "--reference_path"),
        (data, "tfds_dir", tfds_set, "the variable TFDS_DATA_DIR"),
    )
    for section, field, path, instead in made:
        if section[field] and not Path(path).expanduser().exists():
            logging.warning(
                "%s of the run's config, %s, holds nothing yet and is not written to; "
                "the default is used, or what %s names",
                field,
                section[field],
                instead,
            )
            section[field] = ""


def _step(
    checkpoints: checkpointing.Checkpoints, workdir: Path, checkpoint: str
) -> int | None:
    """Returns the step that is asked for; None: the newest that is intact."""
    if checkpoint in ("latest", "best"):
        return None
    kept = checkpoints.steps()
    if not checkpoint.isdecimal() or int(checkpoint) not in kept:
        raise InputError(
            f"--checkpoint={checkpoint}: no such checkpoint in {workdir}; allowed: "
            f"latest, best, {', '.join(map(str, kept))}"
        )
    return int(checkpoint)


def free_path(path: Path, companions: tuple[str, ...] = ()) -> Path:
    """Returns `path`, or with -1, -2, … before its suffix if it is taken.

    Args:
      path: the name wanted.
      companions: suffixes of files ("" of a folder) of the same stem that are to
        be free as well.
    """

    def taken(one: Path) -> bool:
        names = (one, *(one.with_suffix(suffix) for suffix in companions))
        return any(name.exists() for name in names)

    candidate, count = path, 0
    while taken(candidate):
        count += 1
        candidate = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return candidate


def _output_path(
    given: str | None,
    default: Path,
    suffixes: tuple[str, ...],
    companions: tuple[str, ...] = (),
) -> Path:
    if not given:
        return free_path(default, companions)
    path = Path(given)
    if path.suffix not in suffixes:
        raise InputError(
            f"--output={given} ends in '{path.suffix}'; allowed: {', '.join(suffixes)}"
        )
    if path.exists():
        raise InputError(f"--output={given} exists already; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--output={given}: {path.parent} is not a directory")
    return path


def _standardizer(run: Run) -> tabular.Standardizer | None:
    table = run.experiment.source.table
    return None if table is None else table.standardizer


def sample(
    workdir: str | Path,
    num_samples: int | None,
    seed: int,
    output: str | None = None,
    checkpoint: str = "latest",
) -> Path:
    """Draws samples into an NPZ (`x`, in the data's own units) and a picture.

    Images are uint8, and are written one by one as PNG files too, into a folder
    beside the NPZ.

    Args:
      workdir: the run directory.
      num_samples: how many; None: 10,000, of images 100.
      seed: sample i depends on (seed, i) only.
      output: the NPZ; None: a free name in the run directory.
      checkpoint: as in `load_run`.

    Returns:
      The NPZ's path; the picture lies beside it.
    """
    if num_samples is not None and num_samples < 1:
        raise InputError(f"--num_samples is {num_samples}; at least 1 is needed")
    run = load_run(workdir, checkpoint=checkpoint)
    if num_samples is None:
        num_samples = 100 if run.experiment.source.holds_images else 10_000
    stem = "images" if run.experiment.source.holds_images else "samples"
    companions = (".png", "") if run.experiment.source.holds_images else (".png",)
    path = _output_path(output, run.workdir / f"{stem}.npz", (".npz",), companions)
    drawn = figures.draw_samples(run.experiment, run.variables, num_samples, seed)
    if run.experiment.source.holds_images:
        pixels = np.asarray(images.to_uint8(drawn))
        return _save_images(run, pixels, path, seed)
    standardizer = _standardizer(run)
    samples = drawn if standardizer is None else standardizer.inverse(drawn)
    with written_atomically(path) as file:
        np.savez(file, x=samples, seed=seed, step=run.step)
    picture = free_path(path.with_suffix(".png"))
    title = f"{num_samples} samples, step {run.step}"
    if run.experiment.source.distribution is not None:
        extent = max(1e-6, 1.1 * float(np.abs(samples).max()))
        plots.plot_samples(picture, samples, extent, title)
    else:
        table = run.experiment.source.table
        plots.plot_table(
            picture,
            table.train,
            drawn,
            {
                name: figures.energies(run.experiment, run.variables, rows)
                for name, rows in (
                    ("held-out inliers", test_rows(table, tabular.INLIER)),
                    ("samples", drawn),
                )
            },
            title,
        )
    logging.info("wrote %s and %s", path, picture)
    return path


# A grid of more would be too small to look at.
_GRID_IMAGES = 100


def _save_images(run: Run, samples: np.ndarray, path: Path, seed: int) -> Path:
    """Writes images as an NPZ, as PNG files in a folder, and as a grid."""
    with written_atomically(path) as file:
        np.savez(file, x=samples, seed=seed, step=run.step)
    folder = free_path(path.with_suffix(""))
    folder.mkdir()
    digits = len(str(len(samples) - 1))
    for i, image in enumerate(samples):
        plots.save_image(folder / f"{i:0{digits}}.png", image)
    picture = free_path(path.with_suffix(".png"))
    plots.plot_images(picture, samples[:_GRID_IMAGES])
    logging.info("wrote %s, %s and %s", path, picture, folder)
    return path


def score(
    workdir: str | Path,
    rows_path: str | Path,
    output: str | None = None,
    skip_corrupt: bool = False,
    checkpoint: str = "latest",
) -> Path:
    """Writes the energies f(x, 0) of rows or images; larger is more likely.

    Args:
      workdir: the run directory.
      rows_path: CSV or NPZ, in the data's own units; of images: a folder of PNG and
        JPEG files, cropped and resized as the training images were, or an NPZ of
        uint8.
      output: CSV (`energy`, a line a row; of images `image,energy`) or NPZ (`energy`;
        of images `image` too); None: a free name in the run directory.
      skip_corrupt: leave a folder's images out that are of no use.
      checkpoint: as in `load_run`.

    Returns:
      The written file's path.
    """
    run = load_run(workdir, checkpoint=checkpoint)
    source, data = run.experiment.source, run.experiment.config.data
    names: tuple[str, ...] | None = None
    if source.holds_images:
        rows, names = images.read_images(
            rows_path,
            source.event_shape,
            skip_corrupt,
            data.crop,
            timeout=data.timeout,
        )
    else:
        (dim,) = source.event_shape
        columns = None if source.table is None else source.table.columns
        rows = tabular.read_rows(rows_path, dim, _standardizer(run), columns)
    path = _output_path(output, run.workdir / "scores.csv", (".csv", ".npz"))
    energies = figures.energies(run.experiment, run.variables, rows)
    if path.suffix == ".npz":
        named = {} if names is None else {"image": np.asarray(names)}
        with written_atomically(path) as file:
            np.savez(file, energy=energies, **named)
    elif names is None:
        with written_atomically(path) as file:
            np.savetxt(file, energies, fmt="%.9g", header="energy", comments="")
    else:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(("image", "energy"))
        lines.writerows(
            (name, f"{energy:.9g}")
            for name, energy in zip(names, energies, strict=True)
        )
        write_text_atomically(path, text.getvalue())
    logging.info("wrote %d energies to %s", len(rows), path)
    return path


def evaluate(
    workdir: str | Path,
    checkpoint: str = "latest",
    input_path: str | Path | None = None,
    skip_corrupt: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measures a run; writes and returns `report.json`, and a table beside it.

    Where that is there already, as after training, a free name is taken.

    Args:
      workdir: the run directory.
      checkpoint: as in `load_run`.
      input_path: folder or NPZ of images to be measured in the place of samples, by
        Inception's features.
      skip_corrupt: leave a folder's images out that are of no use.
      **settings: fields of the config's `evaluation` section to be changed; None: as
        in training.

    Raises:
      InputError: for a run, weights, images or settings that do not fit.
    """
    started = time.monotonic()
    run = load_run(workdir, open_images=True, checkpoint=checkpoint)
    config = run.experiment.config
    changed = {name: v for name, v in settings.items() if v is not None}
    for name, value in changed.items():
        config.evaluation[name] = value
    config_lib.validate(config, saved=True)
    _check_evaluation(run, input_path, changed)
    report: dict[str, Any] = {}
    if input_path is None:
        meter = figures.open_meter(run.experiment)
        found = figures.evaluate(run.experiment, run.variables, meter)
        report |= {"step": run.step, "checkpoint": checkpoint}
    else:
        found = _measure_images(run, input_path, skip_corrupt)
        report["images"] = str(input_path)
    report |= {"figures": found, **circumstances(run.experiment, started)}
    if parallel.is_first_process():
        path = free_path(run.workdir / REPORT_FILE, (".txt",))
        write_json_atomically(path, report)
        table = reports.format_report(report)
        write_text_atomically(path.with_suffix(".txt"), table + "\n")
        logging.info("wrote %s and %s", path, path.with_suffix(".txt").name)
    return report


def circumstances(experiment: experiments.Experiment, started: float) -> dict[str, Any]:
    """Returns what every report says of how it came about, as plain JSON values."""
    mesh = figures.evaluation_mesh(experiment)
    return {
        "seconds": time.monotonic() - started,
        "device": f"{mesh.size} × {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__},
    }


def _check_evaluation(
    run: Run, input_path: str | Path | None, changed: dict[str, Any]
) -> None:
    """Refuses settings that nothing would read."""
    settings, images_held = run.experiment.config, run.experiment.source.holds_images
    only_of_inception = sorted(changed.keys() - {"num_samples"})
    if not images_held and (input_path is not None or only_of_inception):
        what = "--input" if input_path is not None else f"--{only_of_inception[0]}"
        raise InputError(
            f"{what} is for runs of images, and data.name of {run.workdir} is "
            f"'{settings.data.name}'; leave it out"
        )
    if input_path is not None and changed.get("inception") is False:
        raise InputError(
            "--inception_weights=none leaves nothing to measure --input by; leave one "
            "of them out"
        )
    unread = [name for name in only_of_inception if not name.startswith("inception")]
    if unread and input_path is None and not settings.evaluation.inception:
        raise InputError(
            f"--{unread[0]} is for Inception's features, by which this run is not "
            "measured; give --inception_weights=published, or a file of the weights"
        )


def _measure_images(
    run: Run, input_path: str | Path, skip_corrupt: bool
) -> dict[str, Any]:
    source, config = run.experiment.source, run.experiment.config
    pixels, _ = images.read_images(
        input_path,
        source.event_shape,
        skip_corrupt,
        config.data.crop,
        timeout=config.data.timeout,
    )
    # Files come in the order of their names, often by kind; splits and subsets are to
    # be alike.
    order = np.random.default_rng(0).permutation(len(pixels))
    config.evaluation.inception = True
    meter = figures.open_meter(run.experiment)
    size = config.evaluation.batch_size
    return meter.measure(
        pixels[order[start : start + size]] for start in range(0, len(pixels), size)
    )
