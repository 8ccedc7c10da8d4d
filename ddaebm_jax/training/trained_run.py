"""A finished run, loaded from its directory, which is only read."""

from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import logging

from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.errors import InputError
from ddaebm_jax.models import Players
from ddaebm_jax.training import dispatch, processes
from ddaebm_jax.training.checkpoints import Checkpoints
from ddaebm_jax.training.run_directory import read_config


class TrainedRun(NamedTuple):
    """A trained run; `variables` are the averages in the checkpoint of `step`."""

    workdir: Path
    experiment: experiment_lib.Experiment
    variables: Players
    step: int


def load_run(
    workdir: str | Path, open_images: bool = False, checkpoint: str = "latest"
) -> TrainedRun:
    """Load a run from its directory.

    The directory may be a stranger's: its config decides neither where files are
    written nor from where compiled programs are loaded.

    Args:
      workdir: the run directory.
      open_images: open the images too, for figures that need them.
      checkpoint: `latest`, the newest intact one; `best`, of the lowest FID; or the
        step of one that is kept.

    Raises:
      InputError: if the directory holds no run or no such checkpoint, if that is
        damaged, or if the images are not those of the run.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    _distrust(config)
    dispatch.use_compilation_cache(config.compilation_cache)
    processes.check_devices()
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        kept = list(map(str, checkpoints.steps()))
        if checkpoint not in ("latest", "best", *kept):
            raise InputError(
                f"--checkpoint={checkpoint}: no such checkpoint in {workdir}; allowed: "
                f"latest, best, {', '.join(kept)}"
            )
        experiment = experiment_lib.build(config, workdir, open_images)
        like = experiment_lib.evaluation_state(experiment)
        if checkpoint == "latest":
            found = checkpoints.restore_newest(like)
            found = found or checkpoints.restore(like)  # Raises where there is none.
        elif checkpoint == "best":
            found = checkpoints.restore(like, best=True)
        else:
            found = checkpoints.restore(like, int(checkpoint))
    finally:
        checkpoints.close()
    data = experiment.source.metadata()
    if None not in (data, found.info["data"]) and data != found.info["data"]:
        raise InputError(
            f"the data of {workdir} are not those of its checkpoint {found.step}; copy "
            "the whole run directory again, and leave its images as they were"
        )
    return TrainedRun(workdir, experiment, found.state.ema, found.step)


def _distrust(config: ml_collections.ConfigDict) -> None:
    """Clear the paths at which a config could have code loaded or files made.

    JAX runs the programs in its compilation cache; reference statistics and TFDS sets
    are written where there are none yet.
    """
    config.compilation_cache.directory = ""
    data, evaluation = config.data, config.evaluation
    for section, field, path in (
        (evaluation, "reference_path", evaluation.reference_path),
        (data, "tfds_dir", f"{data.tfds_dir}/{data.tfds.partition(':')[0]}"),
    ):
        if section[field] and not Path(path).expanduser().exists():
            logging.warning(
                "%s of the run's config, %s, is ignored: nothing is there yet, and "
                "nothing is written there; the default is used",
                field,
                section[field],
            )
            section[field] = ""
