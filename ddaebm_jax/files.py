"""Small files: atomic writes, and bounded reads of files from outside."""

import contextlib
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging
from numpy.lib.npyio import NpzFile

from ddaebm_jax.errors import InputError, listed, one_line, shown

# Allowance for the zip directory and the headers of an NPZ file.
_OVERHEAD_BYTES = 2**20
# NumPy's magic string and lengths, and the longest header that NumPy parses.
_MAX_HEADER_BYTES = 12 + 10_000
_HEADER_PARSERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Booleans, numbers and text.
_ARRAY_KINDS = "biufcUS"


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` only once it is complete.

    A crash or a power cut leaves the old file or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # It may be a link or a pipe.
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):  # Writing itself names no file.
            error.filename = error.filename or str(path)
        raise
    with contextlib.suppress(OSError):  # Not every file system can sync a folder.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a small file; see `written_atomically`."""
    with written_atomically(path) as file:
        file.write(text.encode())


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes JSON; see `written_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def printable(text: str) -> str:
    """Returns a name with control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def open_regular(path: Path, max_bytes: int, name: str = "") -> BinaryIO:
    """Opens a regular file for reading, in binary; `name` stands for it in messages.

    Raises InputError if it is a folder, pipe or device, or larger than `max_bytes`, and
    OSError if it cannot be opened.
    """
    status = os.stat(path)  # Before opening, which would wait for a pipe's other end.
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{name or path}: not a regular file but a folder, pipe or device; give a "
            "file"
        )
    if status.st_size > max_bytes:
        raise InputError(
            f"{name or path}: {status.st_size} bytes; at most {max_bytes} are allowed; "
            "make it smaller, or split it"
        )
    return open(path, "rb")


def read_text(path: Path, max_bytes: int) -> str:
    """Reads a UTF-8 text file; raises what `open_regular` does."""
    with open_regular(path, max_bytes) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason})") from error


class ArrayHeader(NamedTuple):
    """An array of an NPZ file, as its .npy header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "a scalar"
        return f"{shown(self.name)} ({shape}, {self.dtype})"


def npz_headers(path: Path, max_bytes: int) -> dict[str, ArrayHeader]:
    """Returns the headers of an NPZ file's arrays, by name; raises as `read_npz`."""
    with _open_npz(path, max_bytes) as (_, headers):
        return headers


def choose_array(
    path: Path,
    headers: dict[str, ArrayHeader],
    num_axes: int,
    beside: Container[str] = (),
) -> ArrayHeader:
    """Returns the array `x` or `X`, or the only one of so many axes; else InputError.

    Arrays named in `beside` are never chosen.
    """
    fitting = [h for h in headers.values() if len(h.shape) == num_axes]
    fitting = [h for h in fitting if h.name not in beside]
    named = [headers[name] for name in ("x", "X") if name in headers]
    found = named or fitting
    if len(found) != 1:
        raise InputError(
            f"{path}: {len(named)} arrays 'x' or 'X' and {len(fitting)} {num_axes}-D "
            f"arrays; found: {listed(headers.values())}; save the one to read with "
            "numpy.savez(path, x=array)"
        )
    return found[0]


def read_npz(
    path: Path, max_bytes: int, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Returns arrays of numbers, booleans or text from an NPZ file, by name.

    Nothing is allocated that the file does not hold, and nothing is unpickled.

    Args:
      path: of the file.
      max_bytes: most bytes that all arrays together may take, decompressed.
      names: of the arrays to read, all of which must be there; None: all arrays.
        A log line names the others.

    Raises FileNotFoundError, or InputError if it is not an NPZ file, is damaged or too
    large, lacks an array, or one of those to read holds Python objects or records.
    """
    with _open_npz(path, max_bytes) as (npz, headers):
        arrays = {}
        for name in headers if names is None else names:
            if name not in headers:
                raise InputError(
                    f"{path}: there is no array {shown(name)}; found: "
                    f"{listed(headers.values())}; save it under that name with "
                    "numpy.savez"
                )
            dtype = headers[name].dtype
            if dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
                objects = ": Python objects are not unpickled" * dtype.hasobject
                raise InputError(
                    f"{path}: the array {headers[name]} holds neither numbers nor "
                    f"text{objects}; convert it, and save it again with numpy.savez"
                )
            with _damage_refused(path, f"the array {headers[name]}"):
                arrays[name] = npz[name]
        unread = [header for name, header in headers.items() if name not in arrays]
        if unread:
            read = listed(map(shown, arrays))
            logging.info("%s: %s read, not read: %s", path, read, listed(unread))
        return arrays


@contextlib.contextmanager
def _open_npz(path: Path, max_bytes: int) -> Iterator[tuple[NpzFile, dict]]:
    """Yields NumPy's open NPZ file and its headers, all sizes checked."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    with open_regular(path, max_bytes + _OVERHEAD_BYTES) as file:
        with _damage_refused(path, "the NPZ archive"):
            npz = NpzFile(file, allow_pickle=False)
        with npz:
            entries = npz.zip.infolist()
            size = sum(entry.file_size for entry in entries)
            if size > max_bytes + _OVERHEAD_BYTES:
                raise InputError(
                    f"{path}: {size} bytes once decompressed; at most {max_bytes} are "
                    "allowed; split it, or save a smaller type"
                )
            headers = [_header(path, npz.zip, entry) for entry in entries]
            yield npz, {header.name: header for header in headers}


def _header(
    path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> ArrayHeader:
    """Compares a .npy header with the size of its entry, at which zipfile stops."""
    what = f"the entry {shown(entry.filename)}"
    with _damage_refused(path, what), archive.open(entry) as file:
        start = io.BytesIO(file.read(_MAX_HEADER_BYTES))
        shape, _, dtype = _HEADER_PARSERS[np.lib.format.read_magic(start)](start)
        held = entry.file_size - start.tell()
    header = ArrayHeader(entry.filename.removesuffix(".npy"), shape, dtype)
    needed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and needed != held:
        raise InputError(
            f"{path}: the array {header} needs {needed} bytes and the file holds "
            f"{held}; it is damaged: save it again with numpy.savez"
        )
    return header


@contextlib.contextmanager
def _damage_refused(path: Path, what: str) -> Iterator[None]:
    """Turns whatever zipfile's and NumPy's parsers raise into one InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{path}: {what} cannot be read ({one_line(error)}); fetch the file "
            "again, or save it again with numpy.savez"
        ) from error
