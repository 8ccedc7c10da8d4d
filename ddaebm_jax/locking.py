"""Keeps a second run out of a run directory."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from ddaebm_jax import parallel
from ddaebm_jax.errors import InputError

LOCK_FILE = "lock.json"

# Seconds for which somebody who only looks whether there is a run may be in the way.
_PATIENCE = 0.5
# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds a run directory for this run, of however many processes.

    The system lets go of it when the process ends, in whatever way. All processes of a
    run must call this; the first one holds the lock.

    Args:
      workdir: the run directory, which must exist.

    Raises:
      InputError: if another run holds it, whose host and process are named, or it
        cannot be written.
    """
    taken, held, failed = None, None, None
    if parallel.is_first_process():
        try:
            taken, held = _take(workdir / LOCK_FILE)
        except OSError as error:
            failed = error.strerror
    try:
        if not parallel.all_agree(failed is None):
            raise InputError(
                f"--workdir={workdir} cannot be written ({failed or 'by process 0'}); "
                "make it writable, or name another"
            )
        if not parallel.all_agree(held is None):
            raise InputError(
                f"--workdir={workdir} is in use by {held or 'another run'}; wait until "
                "that one has ended, or name a new --workdir"
            )
        yield
    finally:
        if taken is not None:
            if held is None:
                os.ftruncate(taken, 0)
            os.close(taken)


def _take(path: Path) -> tuple[int | None, str | None]:
    """Returns the open lock file, and who else holds it, if anyone does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(file):
            return file, _holder(os.pread(file, 4096, 0))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
        logging.warning(
            "%s lies on a file system without locks (%s): see to it yourself that no "
            "second run uses this directory",
            path.parent,
            error.strerror,
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(content).encode(), 0)
    return file, None


def _locked(file: int) -> bool:
    """Whether the lock could be taken; who only looks holds it for a moment."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        else:
            return True


def _holder(content: bytes) -> str:
    try:
        found = json.loads(content)
        return (
            f"process {int(found['pid'])} on {str(found['host'])[:100]}, since "
            f"{str(found['started'])[:40]}"
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
