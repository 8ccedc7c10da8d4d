"""Reads files of named weights, as PyTorch's users keep them, without PyTorch.

`read_state_dict` reads what `torch.save(model.state_dict(), path)` writes, as a zip
archive (since PyTorch 1.6) or as the row of pickles before it; `read_safetensors`
reads the safetensors format.

Files may be damaged or hostile. A pickle is a program; here it is run by a machine of
a few instructions that knows names, numbers, containers and tensors and nothing
else: nothing is imported and nothing is called. Sizes are bounded by the file's
before anything is allocated.

Formats: torch/serialization.py of PyTorch 1.0 to 2.x, Python's pickletools.py, and
https://github.com/huggingface/safetensors#format.
"""

import io
import json
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from ddaebm_jax.data.npz_files import open_zip, shown
from ddaebm_jax.errors import InputError
from ddaebm_jax.files import open_regular

Arrays = dict[str, Shaped[np.ndarray, "..."]]

# What a file may hold, as numbers of NumPy's. Raw data are little-endian; bfloat16 is
# read as the upper halves of float32, which NumPy has.
_BFLOAT16 = "bfloat16"
_STORAGES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": _BFLOAT16,
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1",
    "torch BoolStorage": "|b1",
    "torch ComplexFloatStorage": "<c8",
    "torch ComplexDoubleStorage": "<c16",
}
_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": _BFLOAT16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}

_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# A tensor takes about 200 bytes of a pickle, and as many of a safetensors header.
_MOST_PICKLE_BYTES = _MOST_HEADER_BYTES = 2**23
# Of a pickle; a tensor takes about 30, and one may take a hundred bytes of memory.
_MOST_INSTRUCTIONS = 500_000
# Tensors may share numbers, as tied weights do; so often, over all.
_MOST_SHARED = 4
# Most bytes of a file.
MAX_BYTES = 8 * 2**30
# Of a tensor; NumPy has no more.
_MOST_AXES = 32

_SAVE_AGAIN = "save it again with torch.save(model.state_dict(), path)"
_NEVER_CODE = "only plain weights are loaded, never code"


class _Damaged(ValueError):
    """What is wrong with a file, without the file's name."""


class _Refused(ValueError):
    """What a whole file holds that is not wanted, without the file's name."""


class _Global(NamedTuple):
    """A name that stands for something of Python's, and does nothing."""

    name: str


class _Storage(NamedTuple):
    """Numbers that tensors look into: their kind, their key in the file, how many."""

    dtype: str
    key: str
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * _item_bytes(self.dtype)


class _Tensor(NamedTuple):
    """A window on a storage; offset and strides are counted in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(path: str | Path) -> Arrays:
    """Reads a state_dict that PyTorch saved, in either of its formats.

    Tensors that share their numbers in the file share them here. bfloat16 becomes
    float32; other types stay what they are.

    Args:
      path: of the file, usually `.pth` or `.pt`.

    Returns:
      Name → array, which must not be written to, in the file's order.

    Raises:
      InputError: if the file is not there, is damaged, holds anything but tensors
        under names, or promises more than a file of its size can hold.
    """
    path = Path(path)
    return _in_one_line(path, _read_torch, "a PyTorch state_dict", _SAVE_AGAIN)


def read_safetensors(path: str | Path) -> Arrays:
    """Reads a file of the safetensors format; see `read_state_dict`."""
    path = Path(path)
    advice = "save it again with safetensors.torch.save_file(model.state_dict(), path)"
    return _in_one_line(path, _read_safetensors, "a safetensors file", advice)


def finite_float32(
    name: str, array: Shaped[np.ndarray, "..."], origin: str, remedy: str
) -> Float[np.ndarray, "..."]:
    """Returns weights as float32.

    Args:
      name: of the weights.
      array: what a file holds.
      origin: what the error messages call the file.
      remedy: what to try, the end of the message.

    Raises:
      InputError: for other numbers than floating-point ones, or ones that float32
        does not hold.
    """
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{origin}: {name} holds {array.dtype}; floating-point weights are needed"
        )
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise InputError(
            f"{origin}: {name} holds NaN, Inf, or more than float32 can; {remedy}"
        )
    return array


def _in_one_line(
    path: Path, read: Callable[[io.BufferedIOBase, int], Arrays], what: str, advice: str
) -> Arrays:
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        with open_regular(path, MAX_BYTES) as file:
            return read(file, path.stat().st_size)
    except InputError:
        raise
    except _Refused as error:
        raise InputError(f"{path}: {error}") from error
    # What is not foreseen below is a dozen kinds, of zipfile's and of pickletools'.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as {what} ({reason}); it is damaged or of another "
            f"format: fetch it again, or {advice}"
        ) from error


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize


def _numbers(dtype: str, data: bytes) -> Shaped[np.ndarray, " count"]:
    if dtype == _BFLOAT16:
        halves = np.frombuffer(data, "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32)
    if dtype == "|b1":
        # A bool of NumPy's is only sound as 0 or 1.
        return np.frombuffer(data, np.uint8) != 0
    numbers = np.frombuffer(data, dtype)
    return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)


def _exactly(file: io.BufferedIOBase, num_bytes: int) -> bytes:
    """Reads so many bytes, which the caller has bounded."""
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise _Damaged(f"it ends {num_bytes - len(data)} bytes too early")
    return data


# PyTorch's two formats.


def _read_torch(file: io.BufferedIOBase, size: int) -> Arrays:
    zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    file.seek(0)
    return _read_zip(file, size) if zipped else _read_legacy(file, size)


def _read_zip(file: io.BufferedIOBase, size: int) -> Arrays:
    """Reads NAME/data.pkl and the storages NAME/data/KEY."""
    with open_zip(file) as archive:

        def content(name: str, most: int) -> bytes:
            try:
                member = archive.getinfo(name)
            except KeyError:
                raise _Damaged(f"it has no {shown(name)}") from None
            if member.compress_type != zipfile.ZIP_STORED:
                raise _Damaged(f"{shown(name)} is compressed, which PyTorch never does")
            if member.file_size > most:
                raise _Damaged(
                    f"{shown(name)} has {member.file_size} bytes, and at most {most} "
                    "are allowed"
                )
            return archive.read(member)

        names = archive.namelist()
        pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Damaged(f"it has {len(pickles)} members data.pkl; 1 is needed")
        prefix = pickles[0].removesuffix("data.pkl")
        tensors = _tensors(
            _unpickle(io.BytesIO(content(pickles[0], _MOST_PICKLE_BYTES)))
        )
        if f"{prefix}byteorder" in names:
            order = content(f"{prefix}byteorder", 16)
            if order != b"little":
                raise _Damaged(f"its byte order is {shown(order.decode('latin-1'))}")
        read = {}
        for storage in _storages(tensors, size):
            data = content(f"{prefix}data/{storage.key}", storage.num_bytes)
            if len(data) != storage.num_bytes:
                raise _Damaged(
                    f"storage {shown(storage.key)} has {len(data)} bytes and needs "
                    f"{storage.num_bytes}"
                )
            read[storage.key] = _numbers(storage.dtype, data)
    return _windows(tensors, read)


def _read_legacy(file: io.BufferedIOBase, size: int) -> Arrays:
    """Reads five pickles in a row, then a count and the data of each storage."""
    if _unpickle(file) != _LEGACY_MAGIC:
        raise _Damaged("it does not start as PyTorch's files do")
    protocol = _unpickle(file)
    if protocol != _LEGACY_PROTOCOL:
        raise _Damaged("its protocol is not 1001")
    system = _unpickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Damaged("it is not of a little-endian machine")
    tensors = _tensors(_unpickle(file))
    keys = _unpickle(file)
    storages = {storage.key: storage for storage in _storages(tensors, size)}
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise _Damaged("it does not list its storages")
    if sorted(keys) != sorted(storages):
        raise _Damaged("its list of storages does not fit its tensors")
    read = {}
    for key in keys:
        count = int.from_bytes(_exactly(file, 8), "little")
        if count != storages[key].count:
            raise _Damaged(
                f"storage {shown(key)} has {count} numbers and needs "
                f"{storages[key].count}"
            )
        data = _exactly(file, storages[key].num_bytes)
        read[key] = _numbers(storages[key].dtype, data)
    return _windows(tensors, read)


def _tensors(content: object) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        raise _Refused(
            f"it holds a {_kind(content)}; a state_dict (names → tensors) is needed: "
            "save model.state_dict()"
        )
    for name, value in content.items():
        if type(name) is not str or not isinstance(value, _Tensor):
            raise _Refused(
                f"{shown(str(name))} is a {_kind(value)}, not a tensor under a name; a "
                "plain state_dict is needed: save model.state_dict()"
            )
    return content


def _kind(value: object) -> str:
    return type(value).__name__.removeprefix("_")


def _storages(tensors: dict[str, _Tensor], size: int) -> list[_Storage]:
    """Returns each storage once; together they fit into a file of `size` bytes."""
    storages: dict[str, _Storage] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storages.setdefault(storage.key, storage) != storage:
            raise _Damaged(f"storage {shown(storage.key)} is described in two ways")
    needed = sum(storage.num_bytes for storage in storages.values())
    if needed > size:
        raise _Damaged(f"its tensors need {needed} bytes, and it has {size} in all")
    stored = sum(storage.count for storage in storages.values())
    looked_at = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if looked_at > _MOST_SHARED * stored:
        raise _Damaged(
            f"its tensors have {looked_at} numbers and share {stored}; at most "
            f"{_MOST_SHARED} times as many are allowed"
        )
    return list(storages.values())


def _windows(
    tensors: dict[str, _Tensor], read: dict[str, Shaped[np.ndarray, " count"]]
) -> Arrays:
    arrays = {}
    for name, tensor in tensors.items():
        numbers = read[tensor.storage.key]
        # Within the storage: `_tensor` has seen to that.
        arrays[name] = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :],
            tensor.shape,
            tuple(
                # Where there is one number, PyTorch's stride may be anything.
                stride * numbers.itemsize if side > 1 else 0
                for side, stride in zip(tensor.shape, tensor.strides, strict=True)
            ),
            writeable=False,
        )
    return arrays


# The pickle machine.


def _unpickle(file: io.BufferedIOBase) -> object:
    """Runs the pickle that starts here; the file stands behind it afterwards."""
    start = file.tell()
    buffer = io.BytesIO(file.read(_MOST_PICKLE_BYTES))
    machine = _Machine()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(buffer)):
        if number == _MOST_INSTRUCTIONS:
            raise _Damaged(f"a pickle in it has more than {number} instructions")
        machine.step(opcode.name, argument)
    file.seek(start + buffer.tell())
    if len(machine.stack) != 1 or machine.outer:
        raise _Damaged("a pickle in it ends amid a value")
    return machine.stack[0]


class _Machine:
    """Runs the instructions that PyTorch's pickles are made of.

    Attributes:
      stack: values since the last mark.
      outer: the stacks before each mark.
      memo: values by number.
    """

    def __init__(self) -> None:
        self.stack: list = []
        self.outer: list[list] = []
        self.memo: dict[int, object] = {}

    def step(self, name: str, argument: object) -> None:
        """Runs one instruction."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                push(argument)
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self.pop(int(name[-1]))))
            case "TUPLE":
                values = self.since_mark()
                self.stack.append(tuple(values))
            case "EMPTY_LIST":
                push([])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.since_mark())
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.since_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise _Damaged("a pickle in it uses a value that it never had")
                push(self.memo[argument])
            case "GLOBAL":
                push(_global(argument))
            case "STACK_GLOBAL":
                names = self.pop(2)
                # Others may be nested so that no memory holds them written out.
                if not all(type(name) is str for name in names):
                    raise _Damaged("a pickle in it names something by no name")
                push(_global(" ".join(names)))
            case "BINPERSID":
                push(_storage(*self.pop(1)))
            case "REDUCE":
                push(_made(*self.pop(2)))
            case "BUILD":
                # Versions of the modules, `_metadata`: nothing that an array needs.
                self.pop(1)
                if not isinstance(self.top(), dict):
                    raise _Refused(f"it sets attributes of an object; {_NEVER_CODE}")
            case _:
                raise _Refused(
                    f"it holds the pickle instruction {name}, which no state_dict "
                    f"needs; {_NEVER_CODE}"
                )

    def top(self) -> object:
        """Returns the last value."""
        if not self.stack:
            raise _Damaged("a pickle in it takes more values than it has")
        return self.stack[-1]

    def pop(self, count: int) -> list:
        """Takes the last values away."""
        if len(self.stack) < count:
            raise _Damaged("a pickle in it takes more values than it has")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list:
        """Takes the values since the last mark, and the mark, away."""
        if not self.outer:
            raise _Damaged("a pickle in it goes back to a mark that it never set")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def extend(self, values: list) -> None:
        """Appends to the list on top."""
        if not isinstance(self.top(), list):
            raise _Damaged("a pickle in it appends to what is no list")
        self.top().extend(values)

    def update(self, values: list) -> None:
        """Puts keys and values, in turns, into the dictionary on top."""
        if not isinstance(self.top(), dict) or len(values) % 2:
            raise _Damaged("a pickle in it sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise _Refused(
                    f"it holds a dictionary with a {_kind(key)} as a key; a plain "
                    "state_dict is needed: save model.state_dict()"
                )
            self.top()[key] = value


def _global(name: object) -> _Global:
    if name not in (_DICT, _TENSOR, _PARAMETER, *_STORAGES):
        raise _Refused(
            f"it asks for {shown(str(name).replace(' ', '.'))}, which no state_dict of "
            f"plain tensors needs; {_NEVER_CODE}: save model.state_dict()"
        )
    return _Global(name)


def _storage(reference: object) -> _Storage:
    """Makes a storage of ('storage', kind, key, device, count[, view])."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6):
        raise _Damaged("it refers to something that is no storage")
    what, kind, key, _, count, *view = reference
    if (
        what != "storage"
        or not isinstance(kind, _Global)
        or kind.name not in _STORAGES
        or type(key) is not str
        or not _are_counts((count,))
        or view not in ([], [None])
    ):
        raise _Damaged("it refers to a storage of no kind that is known")
    return _Storage(_STORAGES[kind.name], key, count)


def _made(function: object, arguments: object) -> object:
    """Returns what a permitted name stands for, made of its arguments."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise _Damaged("it calls what cannot be called")
    if function.name == _DICT and arguments == ():
        return {}
    if function.name == _PARAMETER and len(arguments) == 3:
        if isinstance(arguments[0], _Tensor):
            return arguments[0]
    if function.name == _TENSOR and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    raise _Damaged(f"{function.name.split()[-1]} is given what it does not take")


def _tensor(storage: object, offset: object, shape: object, strides: object) -> _Tensor:
    if (
        not isinstance(storage, _Storage)
        or not _are_counts((offset,))
        or not _are_counts(shape)
        or not _are_counts(strides)
        or len(shape) != len(strides)
    ):
        raise _Damaged("a tensor in it has no storage, shape or strides")
    # The last number that it looks at; strides of 0 must not make much of little.
    count = math.prod(shape)
    reach = sum(
        (side - 1) * stride for side, stride in zip(shape, strides, strict=True)
    )
    end = offset + (reach + 1 if count else 0)
    if end > storage.count or count > storage.count:
        raise _Damaged(
            f"a tensor of {count} numbers, up to number {end}, does not fit into its "
            f"storage of {storage.count}"
        )
    return _Tensor(storage, offset, shape, strides)


def _are_counts(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _MOST_AXES
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


# safetensors.


def _read_safetensors(file: io.BufferedIOBase, size: int) -> Arrays:
    """Reads the header's length, the header in JSON, and the data."""
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > min(_MOST_HEADER_BYTES, size - 8):
        raise _Damaged(f"its header would have {length} bytes")
    header = json.loads(_exactly(file, length))
    if not isinstance(header, dict):
        raise _Damaged("its header holds no names")
    windows = list(_described(header, size - 8 - length))
    needed = sum(end - start for _, _, _, start, end in windows)
    if needed > size - 8 - length:
        raise _Damaged("its tensors overlap")
    arrays = {}
    for name, dtype, shape, start, end in windows:
        file.seek(8 + length + start)
        arrays[name] = _numbers(dtype, _exactly(file, end - start)).reshape(shape)
    return arrays


def _described(
    header: dict, size: int
) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yields (name, dtype, shape, start, end) of each array."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(
            entry
        ):
            raise _Damaged(f"{shown(name)} has no type, shape or place")
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SAFETENSORS:
            raise _Refused(
                f": {shown(name)} is of type {shown(str(dtype))}; allowed: "
                f"{', '.join(_SAFETENSORS)}"
            )
        if not (
            isinstance(shape, list)
            and isinstance(place, list)
            and _are_counts(tuple(shape))
            and _are_counts(tuple(place))
            and len(place) == 2
        ):
            raise _Damaged(f"{shown(name)} has no shape or no place")
        start, end = place
        item = _item_bytes(_SAFETENSORS[dtype])
        if not start <= end <= size or math.prod(shape) * item != end - start:
            raise _Damaged(f"{shown(name)} does not fit its place")
        yield name, _SAFETENSORS[dtype], tuple(shape), start, end
