"""Keeps a second run out of a run directory."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import InputError

LOCK_FILE = "lock.json"
_MOST = 4096  # Bytes that are read of it.

# Seconds for which somebody who only looks whether there is a run may be in the way.
_PATIENCE = 0.5
# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Mounts whose locks may be of one host only: kinds, and options of NFS and Lustre.
_LOCAL_KINDS = ("fuse",)
_LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
# There, seconds after which a run shows that it lives, and for which another one looks
# for that. Such file systems may show what others wrote a minute late.
_BEAT, _WATCH = 30.0, 180.0


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds a run directory for this run, of however many processes.

    The system lets go of it when the process ends, in whatever way. All processes of a
    run must call this; the first one holds the lock.

    Where locks do not reach other hosts, the file is written again and again while the
    run lives; one that does not change for three minutes is of a run that has ended.

    Args:
      workdir: the run directory, which must exist.

    Raises:
      InputError: if another run holds it, whose host and process are named, or it
        cannot be written.
    """
    taken, held, failed = None, None, None
    ended, showing = threading.Event(), None
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
        if taken is not None and not _reaches_others(workdir):
            showing = threading.Thread(
                target=_show_life, args=(taken, ended), daemon=True
            )
            showing.start()
        yield
    finally:
        ended.set()
        if showing is not None:
            showing.join(_BEAT)  # Or it may write after what follows.
        if taken is not None:
            if held is None:
                os.ftruncate(taken, 0)
            os.close(taken)


def _take(path: Path) -> tuple[int | None, str | None]:
    """Returns the open lock file, and who else holds it, if anyone does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        locked = True
        try:
            if not _locked(file):
                return file, _holder(os.pread(file, _MOST, 0))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        content = os.pread(file, _MOST, 0)
        if not (locked and _reaches_others(path.parent)):
            logging.warning(
                "%s lies on a file system whose locks do not reach other hosts: see to "
                "it yourself that no second run uses this directory",
                path.parent,
            )
            here = locked and _parse(content).get("host") == socket.gethostname()
            if content and not here and _lives(path, content):
                return file, _holder(content)
        os.ftruncate(file, 0)
        os.pwrite(file, _own_content(), 0)
        with contextlib.suppress(OSError):
            os.fsync(file)  # Only then do mounted buckets show it to others.
        return file, None
    except BaseException:
        os.close(file)
        raise


def _own_content() -> bytes:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
    return json.dumps({**content, "beats": "0" * 12}).encode()


def _reaches_others(
    directory: Path, table: Path = Path("/proc/self/mountinfo")
) -> bool:
    """Whether locks of the file system in which a directory lies reach other hosts.

    True also where that is not known.
    """
    found, longest = True, -1
    try:
        lines = table.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        mount, _, kind = line.partition(" - ")
        name, _, options = kind.partition(" ")
        point = Path(mount.split(" ")[4].replace("\\040", " "))
        if len(point.parts) >= longest and directory.resolve().is_relative_to(point):
            longest = len(point.parts)  # Of two in one place, the later covers.
            local = _LOCAL_OPTIONS & set(options.replace(" ", ",").split(","))
            found = not (name.startswith(_LOCAL_KINDS) or local)
    return found


def _show_life(file: int, ended: threading.Event) -> None:
    """Changes the lock file again and again."""
    own, beats = os.pread(file, _MOST, 0), 0
    while not ended.wait(_BEAT):
        beats += 1
        content = own.replace(b"0" * 12, f"{beats:012}".encode())
        with contextlib.suppress(OSError):
            os.pwrite(file, content, 0)
            os.fsync(file)


def _lives(path: Path, content: bytes) -> bool:
    """Whether a lock file, which names another run, changes when one looks longer."""
    logging.warning(
        "%s names %s; looking for %.0f s whether that still lives",
        path,
        _holder(content),
        _WATCH,
    )
    end = time.monotonic() + _WATCH
    while time.monotonic() < end:
        time.sleep(_WATCH / 60)
        # Opened anew: then file systems look again.
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.read(_MOST) != content:
                return True
    return False


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


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(content: bytes) -> str:
    try:
        found = _parse(content)
        return (
            f"process {int(found['pid'])} on {str(found['host'])[:100]}, since "
            f"{str(found['started'])[:40]}"
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return "another process"
