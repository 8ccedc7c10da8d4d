"""The run directory: whose it is, and of which config."""

from pathlib import Path

import ml_collections
from absl import logging

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError
from ddaebm_jax.files import read_text, write_text_atomically
from ddaebm_jax.training.locking import LOCK_FILE

CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

_LARGEST_CONFIG = 2**20


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a directory is new, or a run of this very config; writes nothing.

    Raises:
      InputError: if the directory holds something else, links that lead out of it, or
        a run whose config differs in a field that changes the model or the data.
    """
    path = workdir / CONFIG_FILE
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    if not path.exists():
        if any(
            found.suffix != ".partial" and found.name != LOCK_FILE
            for found in workdir.iterdir()
        ):
            raise InputError(
                f"--workdir={workdir} is not empty and holds no {CONFIG_FILE}, so it "
                "is not a run; name a new directory"
            )
        return
    for found in workdir.iterdir():
        if found.is_symlink() and not found.resolve().is_relative_to(workdir.resolve()):
            raise InputError(
                f"{found} is a link out of the run directory, through which training "
                "would write and delete; put the whole directory where it leads to, or "
                "name a new --workdir"
            )
    changed = config_lib.differences(read_config(workdir), config)
    refused = {
        name: pair
        for name, pair in changed.items()
        if name not in config_lib.FREE_ON_RESUME
        or (name == "train.num_steps" and config_lib.decays(config))
    }
    if refused:
        listed = ", ".join(
            f"{n} (was {o!r}, is {w!r})" for n, (o, w) in refused.items()
        )
        raise InputError(
            f"--workdir={workdir} belongs to another config: {listed}; give these "
            "fields their old values, or name a new --workdir"
        )
    for name, (old, new) in changed.items():
        logging.info("resuming with %s = %r (was %r)", name, new, old)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """Reads the config of a run directory.

    Raises:
      InputError: if there is none, or it is not a config of this version.
    """
    path = workdir / CONFIG_FILE
    try:
        text = read_text(path, _LARGEST_CONFIG)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); --workdir must name a run "
            "directory that --mode=train has made"
        ) from error
    try:
        return config_lib.from_json(text)
    except config_lib.ConfigError as error:
        raise InputError(f"{path}: {error}") from error


def write_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config of a run directory, which makes it one."""
    write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
