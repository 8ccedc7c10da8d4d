"""`--mode=evaluate`: measure a trained run, or images in place of its samples."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from ddaebm_jax import config as config_lib
from ddaebm_jax import progress
from ddaebm_jax.commands import common
from ddaebm_jax.config import choices
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import image_quality, likelihood, metrics
from ddaebm_jax.files import write_json_atomically, write_text_atomically
from ddaebm_jax.training import processes, reports
from ddaebm_jax.training.run_directory import REPORT_FILE
from ddaebm_jax.training.trained_run import TrainedRun, load_run


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    text = "Number of samples. Default: the config's."
    flags.DEFINE_integer("num_samples", None, text, flag_values=values)
    text = "Folder or NPZ of images to measure in place of samples."
    common.define_path(values, "input", text)
    common.define_skip_corrupt(values)
    common.define_inception_weights(values)
    text = "How images enter Inception. Default: the config's."
    flags.DEFINE_enum("preprocessing", None, choices.PREPROCESSINGS, text, values)
    text = "Images that samples are compared with. Default: the config's."
    flags.DEFINE_enum("reference", None, choices.REFERENCES, text, values)
    text = "Measure log Z and likelihoods of images, too: slow. Always of other data."
    flags.DEFINE_bool("likelihood", False, text, flag_values=values)
    common.define_data_path(values)
    common.define_distributed(values)


def run(values: flags.FlagValues) -> None:
    """Measure, and print the figures."""
    # Images from elsewhere belong to no checkpoint, and bring their own number.
    of_run = "num_samples", "checkpoint", "likelihood"
    unused = of_run if values.input else ("skip_corrupt",)
    for name in unused:
        if values[name].present:
            how = "with" if values.input else "without"
            raise InputError(f"--{name} has no meaning {how} --input: leave it out")
    common.join_processes(values)
    settings = common.inception_settings(values.inception_weights)
    for name in ("num_samples", "preprocessing", "reference"):
        settings[name] = values[name].value
    given = values.checkpoint, values.input, values.skip_corrupt, values.data_path
    settings["with_likelihood"] = values.likelihood
    with common.out_of_memory_advice():
        report = evaluate(values.workdir, *given, **settings)
    if processes.is_first_process():
        common.show(reports.format_report(report))


def evaluate(
    workdir: str | Path,
    checkpoint: str = "latest",
    input_path: str | Path | None = None,
    skip_corrupt: bool = False,
    data_path: str | Path | None = None,
    with_likelihood: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a run, and write `report.json` and a table beside it.

    Where one exists, as after training, `report-1.json` and so on are written. The
    arguments are the flags of this mode; `settings` are fields of the config's
    `evaluation` section to change (None: keep). Raises InputError for what does not fit
    the run.
    """
    started = time.monotonic()
    loaded = load_run(workdir, True, checkpoint, data_path)
    config = loaded.experiment.config
    changed = {name: value for name, value in settings.items() if value is not None}
    config.evaluation.update(changed)
    config_lib.validate(config, saved=True)
    _check(loaded, input_path, changed)
    report: dict[str, Any] = {}
    if input_path is None:
        meter = image_quality.open_meter(loaded.experiment)
        model = loaded.experiment, loaded.variables
        with progress.phase(f"evaluating step {loaded.step}"):
            found = metrics.evaluate(*model, meter)
        if with_likelihood or not loaded.experiment.source.holds_images:
            with progress.phase("measuring log Z and likelihoods"):
                found |= likelihood.metrics(*model)
        report |= {"step": loaded.step, "checkpoint": checkpoint}
    else:
        found = _measure_images(loaded, input_path, skip_corrupt)
        report["images"] = str(input_path)
    report |= {"figures": found, **common.circumstances(loaded.experiment, started)}
    if processes.is_first_process():
        path = common.claimed(loaded.workdir / REPORT_FILE, ".txt")
        write_json_atomically(path, report)
        table = reports.format_report(report)
        write_text_atomically(path.with_suffix(".txt"), table + "\n")
        logging.info("wrote %s and %s", path, path.with_suffix(".txt").name)
    return report


def _check(
    loaded: TrainedRun, input_path: str | Path | None, changed: dict[str, Any]
) -> None:
    """Refuse settings that nothing would read."""
    config = loaded.experiment.config
    of_images = sorted(changed.keys() - {"num_samples"})
    given = ["input"] * bool(input_path) + of_images
    if given and not loaded.experiment.source.holds_images:
        raise InputError(
            f"--{given[0]} is for runs of images, and data.name of {loaded.workdir} is "
            f"'{config.data.name}'; leave it out"
        )
    if "num_samples" in changed and loaded.experiment.source.table is not None:
        raise InputError("--num_samples has no meaning for a table; leave it out")
    if input_path and changed.get("inception") is False:
        raise InputError(
            "--inception_weights=none leaves nothing to measure --input by; leave one "
            "of them out"
        )
    unread = [name for name in of_images if not name.startswith("inception")]
    if unread and not input_path and not config.evaluation.inception:
        raise InputError(
            f"--{unread[0]} is for Inception features, which this run is not measured "
            "by; give --inception_weights=published, or a file of the weights"
        )


def _measure_images(
    loaded: TrainedRun, input_path: str | Path, skip_corrupt: bool
) -> dict[str, Any]:
    source, config = loaded.experiment.source, loaded.experiment.config
    how = source.event_shape, skip_corrupt, config.data.crop
    with progress.phase(f"reading {input_path}"):
        pixels, _ = images.read_images(input_path, *how)
    # Files are often sorted by kind; splits and subsets should be alike.
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    config.evaluation.inception = True
    meter = image_quality.open_meter(loaded.experiment)
    num, size = len(pixels), config.evaluation.batch_size
    with progress.phase(f"measuring {num} images"):
        return meter.measure(pixels[i : i + size] for i in range(0, num, size))
