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
    partial file is removed: on a full disk it would take what is left. What already
    has the partial file's name is not followed if it is a link, nor waited for if it
    is a pipe.
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


def open_regular(path: Path, max_bytes: int, name: str = "") -> BinaryIO:
    """Opens a regular file for reading; pipes and devices are refused at once.

    Args:
      path: of the file.
      max_bytes: largest allowed size.
      name: of the file, for messages; empty: its path.

    Returns:
      The file, in binary.

    Raises:
      InputError: if it is not a regular file, or is too large.
      OSError: if it cannot be opened.
    """
    name = name or str(path)
    # Checked before opening, which has side effects on some devices.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(
            f"{name}: not a regular file but a folder, pipe or device; give a file"
        )
    file = open(path, "rb")
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        file.close()
        raise InputError(
            f"{name}: {size} bytes; at most {max_bytes} are allowed; make it smaller, "
            "or split it"
        )
    return file


def printable(text: str) -> str:
    """Returns a name with control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_text(path: Path, max_bytes: int) -> str:
    """Reads a UTF-8 text file; see `open_regular`.

    Raises:
      InputError: if it is not a regular file, is too large, or is not UTF-8.
      OSError: if it cannot be read.
    """
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
    """Returns the headers of an NPZ file's arrays, by name, without their contents.

    Every header has been compared with the size of its archive entry, so the arrays
    together take at most `max_bytes`.

    Raises:
      FileNotFoundError: if there is no such file.
      InputError: as `read_npz`.
    """
    with _open_npz(path, max_bytes) as npz:
        return _checked_headers(path, npz.zip, max_bytes)


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
    with _open_npz(path, max_bytes) as npz:
        headers = _checked_headers(path, npz.zip, max_bytes)
        return {
            name: _read_array(path, npz, headers, name)
            for name in (headers if names is None else names)
        }


@contextlib.contextmanager
def _open_npz(path: Path, max_bytes: int) -> Iterator[np.lib.npyio.NpzFile]:
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
            yield npz


def _checked_headers(
    path: Path, archive: zipfile.ZipFile, max_bytes: int
) -> dict[str, ArrayHeader]:
    """Checks the archive's directory and reads all headers."""
    entries = archive.infolist()
    for entry in entries:
        if not entry.filename.endswith(".npy"):
            raise InputError(
                f"{path}: a zip archive but not an NPZ file: it holds "
                f"{shown(entry.filename)}; only .npy entries are allowed; save it "
                "with numpy.savez"
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{path}: the entry {shown(entry.filename)} is compressed by method "
                f"{entry.compress_type}; stored and deflated are allowed; save it "
                "again with numpy.savez"
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
    """Reads a .npy header and compares it with the entry's size.

    zipfile stops at that size, whatever the compressed data go on to.
    """
    parsers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with (
        _damage_refused(path, f"the entry {shown(entry.filename)}"),
        archive.open(entry) as file,
    ):
        start = io.BytesIO(file.read(_MAX_HEADER_BYTES))
        version = np.lib.format.read_magic(start)
        if version not in parsers:
            raise ValueError(f"version {version} of the .npy format")
        shape, _, dtype = parsers[version](start)
        held = entry.file_size - start.tell()
    header = ArrayHeader(entry.filename.removesuffix(".npy"), shape, dtype)
    needed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (needed != held or min(shape, default=0) < 0):
        raise InputError(
            f"{path}: the array {header} needs {needed} bytes and the file holds "
            f"{held}; it is damaged: save it again with numpy.savez"
        )
    return header


def _read_array(
    path: Path, npz: Any, headers: dict[str, ArrayHeader], name: str
) -> np.ndarray:
    if name not in headers:
        raise InputError(
            f"{path}: there is no array {shown(name)}; found: "
            f"{listed(headers.values())}; save it under that name with numpy.savez"
        )
    dtype = headers[name].dtype
    if dtype.hasobject:
        raise InputError(
            f"{path}: the array {headers[name]} holds Python objects, which are "
            "refused because reading them means unpickling; save numbers with "
            "numpy.savez"
        )
    if dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
        raise InputError(
            f"{path}: the array {headers[name]} holds neither numbers nor text; "
            "convert it, and save it again with numpy.savez"
        )
    with _damage_refused(path, f"the array {headers[name]}"):
        return npz[name]


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
