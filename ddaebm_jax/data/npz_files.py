"""Reads arrays from an NPZ file that may be damaged or hostile.

Sizes are bounded by the headers before anything is allocated, nothing is ever
unpickled, and every error names the file, what was found, and what to try.
"""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddaebm_jax.errors import InputError


def shown(value: str) -> str:
    """Returns text as an error message shows it: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…'"


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
          InputError: if it is no NPZ file, is damaged, or promises too much.
        """
        self._path = path
        self._advice = advice
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not an NPZ file (not a zip archive); {advice}")
        with self._readable("the zip archive"):
            self._archive = zipfile.ZipFile(path)
        try:
            self.arrays = self._headers(max_bytes)
        except InputError:
            self._archive.close()
            raise

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def read(self, array: ArrayHeader) -> np.ndarray:
        """Returns an array.

        Raises:
          InputError: if it holds Python objects, or is damaged.
        """
        if array.dtype.hasobject:
            raise InputError(
                f"{self._path}: the array {array} holds Python objects; object arrays "
                "are refused, because reading them means unpickling; save numbers; "
                f"{self._advice}"
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
        size = sum(member.file_size for member in members)
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
            version = np.lib.format.read_magic(file)
            if version not in formats:
                raise InputError(f"version {version} of the .npy format")
            shape, _, dtype = formats[version](file)
            held = member.file_size - file.tell()
        array = ArrayHeader(member, shape, dtype)
        needed = array.size * dtype.itemsize
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
