"""The run directory: which config it belongs to, and the lock of the run in it."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import ml_collections
from absl import logging

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError, TrainingError, one_line
from ddaebm_jax.files import read_text, write_json_atomically, write_text_atomically

CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"
LOCK_FILE = "lock"
# An array that `fit` trains on; it comes before the run.
DATA_FILE = "data.npz"

_LARGEST_CONFIG = 2**20
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # Errors of file systems without locks.


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold a run directory for one run; a new one is made.

    The system releases it when the process ends, however it ends. Where a directory
    holds nothing else at the end, the lock is removed, and the directory if it is new.

    Raises:
      InputError: if another run holds it, or it cannot be written.
    """
    new = not workdir.exists()
    held = filelock.FileLock(workdir / LOCK_FILE, timeout=0)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout as error:
        raise InputError(
            f"--workdir={workdir} is in use by another run; wait until that one has "
            "ended, or name a new --workdir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(
                f"--workdir={workdir} cannot be written ({error.strerror}); make it "
                "writable, or name another"
            ) from error
        logging.warning(
            "the file system of %s has no locks: take care that no second run uses "
            "this directory",
            workdir,
        )
    try:
        yield
    finally:
        if all(found.name == LOCK_FILE for found in workdir.iterdir()):
            (workdir / LOCK_FILE).unlink(missing_ok=True)
            if new:
                workdir.rmdir()
        held.release()


def check(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Check that a directory is new, or a run of this config; nothing is written.

    Raises:
      InputError: if the directory holds something else, links that lead out of it, or
        a run whose config differs in a field that changes the model or the data.
    """
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    if not (workdir / CONFIG_FILE).exists():
        if any(
            found.suffix != ".partial" and found.name not in (LOCK_FILE, DATA_FILE)
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
    old = config_lib.with_absolute_paths(read_config(workdir))
    changed = config_lib.differences(old, config)
    refused = {
        name: pair
        for name, pair in changed.items()
        if name not in config_lib.FREE_ON_RESUME
        or (name == "train.num_steps" and config_lib.decays(config))
    }
    if refused:
        fields = ", ".join(
            f"{name} (was {old!r}, is {new!r})" for name, (old, new) in refused.items()
        )
        advice = "give these fields their old values, or name a new --workdir"
        if "train.num_steps" in refused:
            advice += (
                f"; with --init_from={workdir} that one starts from this run's weights"
                " (a rate or γ decays over train.num_steps, and so a run cannot be made"
                " longer)"
            )
        raise InputError(
            f"--workdir={workdir} belongs to another config: {fields}; {advice}"
        )
    for name, (old, new) in changed.items():
        logging.info("resuming with %s = %r (was %r)", name, new, old)


def with_saved_times(
    workdir: Path, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Return a config with the times that the pilot of the run there has found."""
    process = config.diffusion
    if process.time == "equal_cost" and not process.times:
        if (workdir / CONFIG_FILE).exists():
            process.times = read_config(workdir).diffusion.times
    return config


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """Return the config of a run directory.

    Raises:
      InputError: if there is none, or it is not a config of this version.
    """
    path = workdir / CONFIG_FILE
    try:
        return config_lib.from_json(read_text(path, _LARGEST_CONFIG))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); a run directory is needed that "
            "--mode=train has made"
        ) from error
    except config_lib.ConfigError as error:
        raise InputError(f"{path}: {error}") from error


def write_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Write the config of a run directory, which makes it one."""
    write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))


def update_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Write the config of a resumed run if it has changed."""
    if config_lib.differences(read_config(workdir), config):
        write_config(workdir, config)


def read_figures(path: Path, step: int) -> dict[str, Any]:
    """Return the figures of a report on this step; a damaged report is warned of."""
    try:
        report = json.loads(read_text(path, _LARGEST_CONFIG))
        return report["figures"] if report.get("step") == step else {}
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        logging.warning("%s is left out: %s", path, one_line(error))
        return {}


def write_report(workdir: Path, report: dict[str, Any]) -> None:
    """Write the final figures of a run.

    Raises:
      TrainingError: if that fails.
    """
    path = workdir / REPORT_FILE
    try:
        write_json_atomically(path, report)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}); step {report['step']} is "
            "saved: make room, and the same command measures again"
        ) from error
