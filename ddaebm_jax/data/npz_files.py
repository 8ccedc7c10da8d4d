"""Reads arrays from an NPZ file that may be damaged or hostile.

Sizes are bounded by the headers before anything is allocated, nothing is ever
unpickled, members are read in place and never extracted, and every error names the
file, what was found, and what to try.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ddaebm_jax.errors import InputError
from ddaebm_jax.files import open_regular

# Most bytes of an archive's directory, which takes memory before anything else can be
# looked at (50 to 100 bytes a member here, ten times that in memory).
_MOST_DIRECTORY_BYTES = 2 * 2**20
# What may be decompressed to a multiple of the file that hardly any data allow.
_MOST_RATIO = 200
_FREE_BYTES = 64 * 2**20
# Of a member: numpy's magic and the lengths, and the most that numpy parses.
_MOST_HEADER_BYTES = 12 + 10_000
# Booleans, numbers and text.
_KINDS = "biufcUS"


def shown(value: str) -> str:
    """Returns text as an error message shows it: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…'"


class _Bounded:
    """A file of which so much may be read at once; zipfile needs no more of it.

    Attributes:
      most: bytes; None: any number.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.most: int | None = _MOST_DIRECTORY_BYTES

    def read(self, size: int = -1) -> bytes:
        """Reads, if that is not too much; a negative size: all that is left."""
        if self.most is None:
            return self._file.read(size)
        data = self._file.read(self.most + 1 if size < 0 else min(size, self.most + 1))
        if len(data) > self.most:
            raise ValueError(f"its directory has more than {self.most} bytes")
        return data

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        return self._file.seek(place, whence)

    def tell(self) -> int:
        """Returns where it stands."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Opens a zip archive; its directory is bounded before it is read.

    Args:
      file: open for reading; it stays open.

    Raises:
      Exception: of whatever kind zipfile raises, if it is damaged.
    """
    bounded = _Bounded(file)
    archive = zipfile.ZipFile(bounded)
    bounded.most = None
    return archive


class ArrayHeader(NamedTuple):
    """A member of an NPZ file, as its headers describe it.

    Attributes:
      member: of the zip archive.
      shape: of the array.
      dtype: of the array.
    """

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of its cells."""
        cells = 1
        for axis in self.shape:
            cells *= axis
        return cells

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "a scalar"
        return f"{shown(_array_name(self.member))} ({shape}, {self.dtype})"


def described(arrays: dict[str, ArrayHeader], most: int = 12) -> str:
    """Returns arrays as an error message lists them, not too many of them."""
    more = len(arrays) - most
    some = ", ".join(map(str, list(arrays.values())[:most])) or "none"
    return some + (f" and {more} more" if more > 0 else "")


class NpzFile:
    """An open NPZ file of which only the headers have been read.

    Attributes:
      arrays: what the headers say, by name.
    """

    def __init__(self, path: Path, max_bytes: int, advice: str) -> None:
        """Opens a file and reads its headers.

        Args:
          path: of the file.
          max_bytes: most bytes that it may hold once decompressed.
          advice: how to save such a file; the end of most messages.

        Raises:
          FileNotFoundError: if there is no such file.
          InputError: if it is no NPZ file, is damaged, or promises too much.
        """
        self._path = path
        self._advice = advice
        try:
            # Stored members take about as many bytes in the file.
            self._file = open_regular(path, max_bytes + _FREE_BYTES)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file; check the path") from error
        except OSError as error:
            raise InputError(
                f"{path}: cannot be opened ({error.strerror}); check the file"
            ) from error
        try:
            if not zipfile.is_zipfile(self._file):
                raise InputError(
                    f"{path}: not an NPZ file (not a zip archive); {advice}"
                )
            with self._readable("the zip archive"):
                self._archive = open_zip(self._file)
            self.arrays = self._headers(max_bytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()
        self._file.close()

    def read(self, array: ArrayHeader) -> np.ndarray:
        """Returns an array.

        Raises:
          InputError: if it holds Python objects or records, or is damaged.
        """
        if array.dtype.hasobject:
            raise InputError(
                f"{self._path}: the array {array} holds Python objects; object arrays "
                "are refused, because reading them means unpickling; save numbers; "
                f"{self._advice}"
            )
        if array.dtype.kind not in _KINDS or not array.dtype.itemsize:
            raise InputError(
                f"{self._path}: the array {array} holds neither numbers nor text, "
                f"which alone are read; {self._advice}"
            )
        with (
            self._readable(f"the array {array}"),
            self._archive.open(array.member) as file,
        ):
            return np.lib.format.read_array(file, allow_pickle=False)

    def _headers(self, max_bytes: int) -> dict[str, ArrayHeader]:
        """Reads the headers of all arrays; nothing of an array's size is allocated."""
        members = self._archive.infolist()
        for member in members:
            if not member.filename.endswith(".npy"):
                raise InputError(
                    f"{self._path}: a zip archive but not an NPZ file: it holds "
                    f"{shown(member.filename)}; only .npy members are allowed; "
                    f"{self._advice}"
                )
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"{self._path}: it holds {shown(twice)} more than once; {self._advice}"
            )
        size = sum(member.file_size for member in members)
        held = self._path.stat().st_size
        if size > max(_MOST_RATIO * held, _FREE_BYTES):
            raise InputError(
                f"{self._path}: {size} bytes once decompressed, of a file of {held}: a "
                "decompression bomb, or hardly any data; save it uncompressed "
                "(numpy.savez)"
            )
        if size > max_bytes:
            raise InputError(
                f"{self._path}: {size} bytes once decompressed; at most {max_bytes} "
                "are allowed; split it, or save a smaller type"
            )
        return {_array_name(member): self._header(member) for member in members}

    def _header(self, member: zipfile.ZipInfo) -> ArrayHeader:
        # zipfile itself stops at the size in the member's header, so that what
        # follows can rely on it; other methods than these two are not numpy's.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{self._path}: the member {shown(member.filename)} is compressed by "
                f"method {member.compress_type}; stored and deflated are allowed; "
                f"{self._advice}"
            )
        formats = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        with (
            self._readable(f"the member {shown(member.filename)}"),
            self._archive.open(member) as file,
        ):
            start = io.BytesIO(file.read(_MOST_HEADER_BYTES))
            version = np.lib.format.read_magic(start)
            if version not in formats:
                raise InputError(f"version {version} of the .npy format")
            shape, _, dtype = formats[version](start)
            held = member.file_size - start.tell()
        array = ArrayHeader(member, shape, dtype)
        needed = array.size * dtype.itemsize
        if any(type(side) is not int or side < 0 for side in shape):
            raise InputError(
                f"{self._path}: the array {array} has no shape; {self._advice}"
            )
        if not dtype.hasobject and needed != held:
            raise InputError(
                f"{self._path}: the array {array} needs {needed} bytes and the file "
                f"holds {held} of it; {self._advice}"
            )
        return array

    @contextlib.contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Turns whatever a damaged archive raises into one refusal.

        zipfile's and numpy's parsers raise a dozen kinds of errors on damaged bytes.
        """
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._path}: {what} cannot be read ({type(error).__name__}: "
                f"{reason}); {self._advice}"
            ) from error


def _array_name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")
