"""Small files: atomic writes, and bounded reads of files from outside."""

import contextlib
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ddaebm_jax.errors import InputError, listed, one_line, shown

# Allowance for the zip directory and the headers of an NPZ file.
_OVERHEAD_BYTES = 2**20
# NumPy's magic string and lengths, and the longest header that NumPy parses.
_MAX_HEADER_BYTES = 12 + 10_000
# Of an archive with and without entries, as numpy.load tells it from other files.
_ZIP_SIGNATURES = (b"PK\3\4", b"PK\5\6")
# Booleans, numbers and text.
_ARRAY_KINDS = "biufcUS"


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` only once it is complete.

    A crash or a power cut leaves the old file or the new one. After an error the
    partial file is removed: on a full disk it would take what is left.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # It may be a link or a pipe.
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
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


def cache_directory(name: str) -> Path:
    """Returns this project's folder of that name in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ddaebm_jax" / name


def printable(text: str) -> str:
    """Returns a name with control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def open_regular(path: Path, max_bytes: int, name: str = "") -> BinaryIO:
    """Opens a regular file for reading, in binary; `name` stands for it in messages.

    Raises:
      InputError: if it is a folder, pipe or device, or larger than `max_bytes`.
      OSError: if it cannot be opened.
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
    path: Path, headers: dict[str, ArrayHeader], num_axes: int
) -> ArrayHeader:
    """Returns the array `x`, or the only array of so many axes; else InputError."""
    fitting = [h for h in headers.values() if len(h.shape) == num_axes]
    found = [headers["x"]] if "x" in headers else fitting
    if len(found) != 1:
        raise InputError(
            f"{path}: no array 'x' and {len(fitting)} {num_axes}-D arrays where one is "
            f"needed; found: {listed(headers.values())}; save it with "
            "numpy.savez(path, x=array)"
        )
    return found[0]


def read_npz(
    path: Path, max_bytes: int, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Returns arrays of numbers, booleans or text from an NPZ file, by name.

    `numpy.load(allow_pickle=False)` behind a check of the archive's directory and of
    every .npy header: nothing is allocated that the file does not hold, and nothing
    is unpickled.

    Args:
      path: of the file.
      max_bytes: most bytes that all arrays together may take, decompressed.
      names: of the arrays to read, all of which must be there; None: all arrays.

    Raises:
      FileNotFoundError: if there is no such file.
      InputError: if it is not an NPZ file, is damaged or too large, lacks an array, or
        one of those to read holds Python objects or records.
    """
    with _open_npz(path, max_bytes) as (npz, headers):
        arrays = {}
        for name in headers if names is None else names:
            _check_readable(path, headers, name)
            with _damage_refused(path, f"the array {headers[name]}"):
                arrays[name] = npz[name]
        return arrays


@contextlib.contextmanager
def _open_npz(path: Path, max_bytes: int) -> Iterator[tuple[Any, dict]]:
    """Yields NumPy's open NPZ file and its checked headers."""
    try:
        file = open_regular(path, max_bytes + _OVERHEAD_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); check the file"
        ) from error
    with file:
        if file.read(4) not in _ZIP_SIGNATURES:
            raise InputError(
                f"{path}: not an NPZ file (not a zip archive); save it with numpy.savez"
            )
        file.seek(0)
        with _damage_refused(path, "the zip archive"):
            npz = np.load(file, allow_pickle=False)
        with npz:
            yield npz, _checked_headers(path, npz.zip, max_bytes)


def _checked_headers(
    path: Path, archive: zipfile.ZipFile, max_bytes: int
) -> dict[str, ArrayHeader]:
    entries = archive.infolist()
    for entry in entries:
        stored = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not (stored and entry.filename.endswith(".npy")):
            raise InputError(
                f"{path}: a zip archive but not an NPZ file: it holds "
                f"{shown(entry.filename)}, compressed by method {entry.compress_type}; "
                "only .npy entries, stored or deflated, are allowed; save it with "
                "numpy.savez"
            )
    size = sum(entry.file_size for entry in entries)
    if size > max_bytes + _OVERHEAD_BYTES:
        raise InputError(
            f"{path}: {size} bytes once decompressed; at most {max_bytes} are allowed; "
            "split it, or save a smaller type"
        )
    headers = [_checked_header(path, archive, entry) for entry in entries]
    return {header.name: header for header in headers}


def _checked_header(
    path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> ArrayHeader:
    """Compares a .npy header with the size of its entry, at which zipfile stops."""
    parsers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with (
        _damage_refused(path, f"the entry {shown(entry.filename)}"),
        archive.open(entry) as file,
    ):
        start = io.BytesIO(file.read(_MAX_HEADER_BYTES))
        shape, _, dtype = parsers[np.lib.format.read_magic(start)](start)
        held = entry.file_size - start.tell()
    header = ArrayHeader(entry.filename.removesuffix(".npy"), shape, dtype)
    needed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (needed != held or min(shape, default=0) < 0):
        raise InputError(
            f"{path}: the array {header} needs {needed} bytes and the file holds "
            f"{held}; it is damaged: save it again with numpy.savez"
        )
    return header


def _check_readable(path: Path, headers: dict[str, ArrayHeader], name: str) -> None:
    if name not in headers:
        raise InputError(
            f"{path}: there is no array {shown(name)}; found: "
            f"{listed(headers.values())}; save it under that name with numpy.savez"
        )
    dtype = headers[name].dtype
    if dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
        objects = ": Python objects are not read, which would mean unpickling"
        raise InputError(
            f"{path}: the array {headers[name]} holds neither numbers nor text"
            f"{objects * dtype.hasobject}; convert it, and save it again with "
            "numpy.savez"
        )


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
