"""Read files of named weights (.pth, .npz, .safetensors) and convert them for Flax.

PyTorch is not needed, and no pickle is executed: the few names that a state_dict needs
stand for values of this module, and any other name is refused.
"""

import collections
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from ddaebm_jax import files
from ddaebm_jax.errors import InputError, one_line, shown
from ddaebm_jax.paths import user_path

Arrays = dict[str, Shaped[np.ndarray, "..."]]

MAX_BYTES = 8 * 2**30  # Of a file.


def read_weights(path: str | Path) -> Arrays:
    """Return the arrays in a file of weights, by name.

    Reads PyTorch's state_dicts (`.pth`, `.pt`), NPZ and safetensors. bfloat16 becomes
    float32; other types stay. Arrays may be read-only.

    Raises:
      InputError: if the file is missing, damaged, too large, of another format, or
        holds anything but arrays under names.
    """
    path = user_path(path)
    readers = {
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".npz": lambda path: files.read_npz(path, MAX_BYTES),
        ".safetensors": _read_safetensors,
    }
    if path.suffix.lower() not in readers:
        allowed = ", ".join(readers)
        raise InputError(f"{path}: the suffix is '{path.suffix}'; allowed: {allowed}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    arrays = readers[path.suffix.lower()](path)
    return {
        name: array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        for name, array in arrays.items()
    }


def _read_safetensors(path: Path) -> Arrays:
    import safetensors.numpy

    files.open_regular(path, MAX_BYTES).close()
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # The library's own and, for unknown types, others.
        raise InputError(
            f"{path}: cannot be read as safetensors ({one_line(error)}); fetch it "
            "again, or save it again with safetensors.torch.save_file"
        ) from error


# PyTorch's state_dicts: a zip archive or, before version 1.6, pickles in a row.
_MAX_PICKLE_BYTES = 2**23  # A tensor takes about 200.
_MAX_INSTRUCTIONS = 500_000  # A tensor takes about 30.
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # In numbers, as all sizes below.
    num_bytes: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Build dicts of `_Tensor`, and refuse every name that these do not need."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return self._tensor  # A method: pickles can set no attribute of it.
            case "torch", storage if storage in _DTYPES:
                return _DTYPES[storage]
        raise pickle.UnpicklingError(f"it asks for {shown(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), _, int(size), *view):
                if dtype in _DTYPES.values() and size >= 0 and view in ([], [None]):
                    num_bytes = size * np.dtype(dtype).itemsize
                    return _Storage(dtype, key, size, num_bytes)
        raise pickle.UnpicklingError("one of its storages is of no known kind")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
    ) -> _Tensor:
        numbers = (offset, *shape, *strides)
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if not whole or not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise pickle.UnpicklingError("a tensor lacks a storage, shape or strides")
        count = math.prod(shape)
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # Repeating numbers by strides of 0 would make much of a small file.
        if count and max(count, offset + last + 1) > storage.size:
            raise pickle.UnpicklingError(
                f"a tensor of {count} numbers does not fit its storage of "
                f"{storage.size} (shape {shape}, strides {strides}, offset {offset})"
            )
        return _Tensor(storage, offset, shape, strides)


def _unpickle(file: io.BufferedIOBase) -> Any:
    """Load the pickle at the file's position, and leave the position behind it."""
    start = file.tell()
    buffer = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    for i, (opcode, argument, _) in enumerate(pickletools.genops(buffer)):
        # The memo is allocated up to its largest index.
        is_sparse = opcode.name in ("PUT", "LONG_BINPUT") and argument > i
        if i == _MAX_INSTRUCTIONS or is_sparse:
            raise pickle.UnpicklingError("its pickle is larger than any state_dict's")
    file.seek(start + buffer.tell())
    return _Unpickler(io.BytesIO(buffer.getvalue()[: buffer.tell()])).load()


def _read_torch(path: Path) -> Arrays:
    with files.open_regular(path, MAX_BYTES) as file:
        zipped = file.peek(4)[:4] == b"PK\3\4"
        try:
            return _read_zip(file) if zipped else _read_legacy(file)
        except Exception as error:  # zipfile and pickle raise a dozen kinds.
            raise InputError(
                f"{path}: cannot be read as PyTorch weights ({one_line(error)}); only "
                "plain state_dicts are read, and no code in them is run: fetch it "
                "again, or save it again with torch.save(model.state_dict(), path)"
            ) from error


def _read_zip(file: io.BufferedIOBase) -> Arrays:
    """Read NAME/data.pkl and the storages NAME/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} entries data.pkl; 1 is needed")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in names and archive.open(order).read(16) != b"little":
            raise ValueError("its byte order is not 'little'")
        tensors = _state_dict(_unpickle(archive.open(pickles[0])))
        keys = {tensor.storage.key for tensor in tensors.values()}
        entries = {key: archive.getinfo(f"{root}data/{key}") for key in keys}
        needed = sum(entry.file_size for entry in entries.values())
        if needed > os.fstat(file.fileno()).st_size:
            raise ValueError(f"its storages take {needed} bytes, more than the file")
        data = {key: archive.read(entry) for key, entry in entries.items()}
    return {name: _view(tensor, data) for name, tensor in tensors.items()}


def _read_legacy(file: io.BufferedIOBase) -> Arrays:
    """Read five pickles, the last of storage keys, and each storage's size and data."""
    magic, protocol, system = (_unpickle(file) for _ in range(3))
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("it does not start as PyTorch's files do")
    if system["little_endian"] is not True:
        raise ValueError("its byte order is not 'little'")
    tensors = _state_dict(_unpickle(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    data = {}
    for key in _unpickle(file):
        file.seek(8, os.SEEK_CUR)  # The size once more.
        data[key] = file.read(storages[key].num_bytes)
    return {name: _view(tensor, data) for name, tensor in tensors.items()}


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, no dict of tensors")
    for name, value in content.items():
        if not isinstance(value, _Tensor):
            kind = type(value).__name__
            raise ValueError(f"{shown(str(name))} is a {kind}, not a tensor")
    return {str(name): value for name, value in content.items()}


def _view(tensor: _Tensor, data: Mapping[str, bytes]) -> Shaped[np.ndarray, "..."]:
    storage, offset, shape, strides = tensor
    raw = data[storage.key]
    if len(raw) != storage.num_bytes:
        raise ValueError(f"a storage of {storage.num_bytes} bytes has {len(raw)}")
    numbers = np.frombuffer(raw, storage.dtype)[offset:]
    steps = [stride * numbers.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)
