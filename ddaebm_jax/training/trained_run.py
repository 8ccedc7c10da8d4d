"""A finished run, loaded from its directory, which is only read."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import logging

from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax import progress
from ddaebm_jax.errors import InputError
from ddaebm_jax.models import Players
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import checksums, dispatch, processes
from ddaebm_jax.training.checkpoints import Checkpoints
from ddaebm_jax.training.run_directory import read_config


class TrainedRun(NamedTuple):
    """A trained run; `variables` are the averages in the checkpoint of `step`."""

    workdir: Path
    experiment: experiment_lib.Experiment
    variables: Players
    step: int


def load_run(
    workdir: str | Path,
    open_images: bool = False,
    checkpoint: str = "latest",
    data_path: str | Path | None = None,
) -> TrainedRun:
    """Load a run from its directory.

    The directory may be a stranger's: its config decides neither where files are
    written nor from where compiled programs are loaded.

    Args:
      workdir: the run directory.
      open_images: open the images too, for figures that need them.
      checkpoint: `latest`, the newest intact one; `best`, of the lowest FID; or the
        step of one that is kept.
      data_path: where the images lie now, if they have moved: the folder or NPZ
        file, or the directory of TFDS; what they are is checked by their fingerprint.

    Raises:
      InputError: if the directory holds no run or no such checkpoint, if that is
        damaged, or if the images are not those of the run.
    """
    workdir = user_path(workdir, "--workdir")
    config = read_config(workdir)
    _distrust(config)
    if data_path:
        _find_data(config.data, data_path)
    dispatch.use_compilation_cache(config.compilation_cache)
    processes.check_devices()
    return _load(workdir, config, open_images, checkpoint)


def initial_variables(
    workdir: str | Path, experiment: experiment_lib.Experiment
) -> Players:
    """Return a run's newest averaged weights, in host memory, to start another from.

    Raises:
      InputError: if they cannot be loaded, or do not fit the networks of `experiment`.
    """
    try:
        workdir = user_path(workdir)
        config = read_config(workdir)
        _distrust(config)
        found = _load(workdir, config, False, "latest")
    except InputError as error:
        raise InputError(f"train.init_from, {workdir}: {error}") from error
    here = experiment_lib.state_shapes(experiment).variables
    old, new = (checksums.described(v._asdict()) for v in (found.variables, here))
    differing = [n for n in sorted(old | new) if old.get(n) != new.get(n)]
    if differing:
        name = differing[0]
        raise InputError(
            f"train.init_from, {workdir}, has networks of other shapes: {name} is "
            f"{old.get(name, 'absent')} there and {new.get(name, 'absent')} here; give "
            "this run the same model section, and data of the same shape"
        )
    logging.info("starting from the weights of %s at step %d", workdir, found.step)
    return jax.device_get(found.variables)


def _load(
    workdir: Path, config: ml_collections.ConfigDict, open_images: bool, checkpoint: str
) -> TrainedRun:
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        kept = list(map(str, checkpoints.steps()))
        if checkpoint not in ("latest", "best", *kept):
            raise InputError(
                f"--checkpoint={checkpoint}: no such checkpoint in {workdir}; allowed: "
                f"latest, best, {', '.join(kept)}"
            )
        with progress.phase(f"opening the data '{config.data.name}'"):
            experiment = experiment_lib.build(config, workdir, open_images)
        like = experiment_lib.evaluation_state(experiment)
        latest, best = checkpoint == "latest", checkpoint == "best"
        step = None if latest or best else int(checkpoint)
        with progress.phase(f"restoring the checkpoint ({checkpoint})"):
            found = checkpoints.restore_newest(like) if latest else None
            # Raises where there is none.
            found = found or checkpoints.restore(like, step, best)
    finally:
        checkpoints.close()
    data = experiment.source.metadata()
    if None not in (data, found.info["data"]) and data != found.info["data"]:
        raise InputError(
            f"the data of {workdir} are not those of its checkpoint {found.step}; copy "
            "the whole run directory again, and leave its images as they were"
        )
    warn_of_untrained(found.info.get("untrained", []))
    experiment = experiment_lib.with_levels_of(experiment, found.info["config"])
    return TrainedRun(workdir, experiment, found.state.ema, found.step)


def warn_of_untrained(names: Sequence[str]) -> None:
    """Warn of networks with initial weights, as a partial import leaves them."""
    if names:
        text = "untrained: %s; what depends on them, such as scores, means nothing"
        logging.warning(text, ", ".join(names))


def _find_data(data: ml_collections.ConfigDict, path: str | Path) -> None:
    """Set where a run's images lie now; raise InputError where nothing reads them."""
    field = {"folder": "path", "tfds": "tfds_dir"}.get(data.name)
    if field is None:
        raise InputError(
            f"--data_path is for runs of data.name 'folder' or 'tfds', and this one's "
            f"is '{data.name}', which reads no other files; leave it out"
        )
    found = user_path(path, "--data_path")
    data[field] = str(found)
    if not found.is_dir() and not (field == "path" and found.is_file()):
        raise InputError(
            f"--data_path, {path}: no such folder or NPZ file; give that of the run's "
            "images"
        )


def _distrust(config: ml_collections.ConfigDict) -> None:
    """Clear the paths at which a config could have code loaded or files made.

    JAX runs the programs in its compilation cache; TFDS writes sets that are missing.
    """
    config.compilation_cache.directory = ""
    data, there = config.data, False
    if not data.tfds_dir:
        return
    with contextlib.suppress(InputError):
        path = f"{data.tfds_dir}/{data.tfds.partition(':')[0]}"
        there = user_path(path).exists()
    if not there:
        logging.warning(
            "tfds_dir of the run's config, %s, is ignored: nothing is there yet, and "
            "nothing is written there; the default is used",
            data.tfds_dir,
        )
        data.tfds_dir = ""
