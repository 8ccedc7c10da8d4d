"""Small files: written whole or not at all, and read with care."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ddaebm_jax.errors import InputError


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written; a crash or a power cut leaves the old one or the new.

    It is written under another name, which whatever goes wrong removes: on a full disk
    it would take what is left. What already has that name is not followed if it is a
    link, nor waited for if it is a pipe.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", opener=_open_no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    with contextlib.suppress(OSError):  # Not every file system can sync a folder.
        _sync(path.parent)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a small file; see `written_atomically`."""
    with written_atomically(path) as file:
        file.write(text.encode())


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes JSON; see `write_text_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def cache_directory(name: str) -> Path:
    """Returns this project's folder of that name in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ddaebm_jax" / name


def open_regular(path: Path, most_bytes: int, name: str = "") -> BinaryIO:
    """Opens a file from outside to be read; what is no file cannot hold us up.

    A pipe or a device, also behind a link, is refused without waiting for it.

    Args:
      path: of the file.
      most_bytes: that it may have.
      name: of the file, for messages; empty: its path.

    Returns:
      The file, in binary.

    Raises:
      InputError: if it is not a regular file, or is too large.
      OSError: if it cannot be opened.
    """
    name = name or str(path)
    # Asked before it is opened, which does things to some devices, and after.
    regular = stat.S_ISREG(os.stat(path).st_mode)
    file = open(path, "rb", opener=_open_at_once) if regular else None
    if file is None or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise InputError(
            f"{name}: not a regular file but a folder, pipe or device; give a file"
        )
    size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        file.close()
        raise InputError(
            f"{name}: {size} bytes; at most {most_bytes} are allowed; make it smaller, "
            "or split it"
        )
    return file


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def printable(text: str) -> str:
    """Returns a name as it may be shown: control and broken characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a text file from outside; see `open_regular`.

    Raises:
      InputError: if it is not a regular file, is too large, or is not UTF-8.
      OSError: if it cannot be read.
    """
    with open_regular(path, most_bytes) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason})") from error
