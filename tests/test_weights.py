"""Files of weights: whole, damaged, and hostile ones, whose code is never run."""

import collections
import functools
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from untrusted import FUZZ, MEGABYTE, mutations, read_or_refused, refused

from ddaebm_jax import weights
from ddaebm_jax.weights import read_weights

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([1.5, -2.0], np.float16),
    "tracked": np.array(7),
    "none": np.zeros((0, 2), np.float32),
    "wide": np.linspace(0, 1, 3),
}


def assert_same(actual: dict, expected: dict):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


# Files as PyTorch writes them, which is not needed for that.


class Name:
    """A name in a module."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any) -> None:
        raise AssertionError("only its name is needed")


class Call:
    """An object that pickles as a call, followed by a state to set."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class Reference(tuple):
    """An object that pickles as a persistent id."""


class Pickler(pickle._Pickler):
    """Python's pickler with names of modules that are not installed."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)
    legacy = False

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Reference):
            return None
        # The legacy format has views of storages here.
        return (*value, None) if self.legacy else tuple(value)

    def save_name(self, value: Name) -> None:
        if self.proto >= 4:
            self.save(value.module)
            self.save(value.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    dispatch[Name] = save_name


def pickled(value: Any, protocol: int = 2, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol)
    pickler.legacy = legacy
    pickler.dump(value)
    return buffer.getvalue()


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "u2": "BFloat16"}
STORAGES = {
    np.dtype(kind): Name("torch", f"{name}Storage") for kind, name in KINDS.items()
}


def tensor(
    array: np.ndarray, key: str, *, size=None, offset=0, shape=None, strides=None
) -> Call:
    """Return the tensor `array` in storage `key`, with true or false metadata."""
    if strides is None:
        strides = tuple(step // array.itemsize for step in array.strides)
    size = array.size if size is None else size
    shape = array.shape if shape is None else shape
    storage = Reference(("storage", STORAGES[array.dtype], key, "cpu", size))
    hooks = collections.OrderedDict()
    return Call(REBUILD, storage, offset, shape, strides, False, hooks)


def described(arrays: dict[str, np.ndarray]) -> collections.OrderedDict:
    content = collections.OrderedDict(
        (name, tensor(array, str(i))) for i, (name, array) in enumerate(arrays.items())
    )
    content._metadata = collections.OrderedDict({"": {"version": 1}})
    return content


def write_zip(
    path: Path,
    arrays: dict[str, np.ndarray],
    content: Any = None,
    protocol: int = 2,
    byteorder: str = "little",
    method: int = zipfile.ZIP_STORED,
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        content = described(arrays) if content is None else content
        archive.writestr("w/data.pkl", pickled(content, protocol))
        archive.writestr("w/byteorder", byteorder)
        archive.writestr("w/version", "3\n")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"w/data/{i}", array.tobytes())
    return path


def write_legacy(
    path: Path, arrays: dict[str, np.ndarray], content: Any = None
) -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    content = described(arrays) if content is None else content
    keys = [str(i) for i in range(len(arrays))]
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, system, content, keys):
            file.write(pickled(value, legacy=True))
        for array in arrays.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())
    return path


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(arrays, path)
    return path


TORCH_WRITERS = (write_zip, write_legacy)
WRITERS = {
    "new.pth": write_zip,
    "old.pt": write_legacy,
    "w.npz": write_npz,
    "w.safetensors": write_safetensors,
}


@pytest.mark.parametrize(
    ("name", "write"),
    # Protocol 4 has frames, and names as two strings.
    [*WRITERS.items(), ("w.pt", functools.partial(write_zip, protocol=4))],
)
def test_whole_files(name: str, write, tmp_path: Path):
    found = read_weights(write(tmp_path / name, ARRAYS))
    order = list(ARRAYS) if "safe" not in name else sorted(ARRAYS)
    assert_same({key: found[key] for key in order}, {key: ARRAYS[key] for key in order})
    assert len(found) == len(ARRAYS)


@pytest.mark.parametrize("write", TORCH_WRITERS)
def test_tensors_that_share_a_storage(write, tmp_path: Path):
    array = np.arange(12, dtype=np.float32)
    content = {
        "transposed": tensor(array, "0", shape=(4, 3), strides=(1, 4)),
        "slice": tensor(array, "0", shape=(2,), strides=(5,), offset=2),
        "scalar": tensor(array, "0", shape=(), strides=(), offset=11),
    }
    found = read_weights(write(tmp_path / "w.pt", {"x": array}, content))
    expected = {
        "transposed": array.reshape(3, 4).T,
        "slice": array[[2, 7]],
        "scalar": array[11],
    }
    assert_same(found, expected)
    with pytest.raises(ValueError, match="read-only"):
        found["slice"][0] = 1.0


def test_bfloat16_becomes_float32(tmp_path: Path):
    halves = np.array([0x3FC0, 0xC000], np.uint16)
    path = write_zip(tmp_path / "w.pth", {"a": halves})
    expected = {"a": np.array([1.5, -2.0], np.float32)}
    assert_same(read_weights(path), expected)
    header = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes(header, halves.tobytes()))
    assert_same(read_weights(path), expected)


# Damaged files.


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files(name: str, tmp_path: Path):
    path = WRITERS[name](tmp_path / name, ARRAYS)
    content = path.read_bytes()
    for end in [*range(0, len(content), 31), len(content) - 1]:
        path.write_bytes(content[:end])
        refused(lambda: read_weights(path), str(path))


@pytest.mark.parametrize("name", WRITERS)
@FUZZ
@hypothesis.given(data=st.data())
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path, data):
    path = WRITERS[name](tmp_path / name, ARRAYS)
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    read_or_refused(lambda: read_weights(path))


def test_files_of_another_kind(tmp_path: Path):
    refused(lambda: read_weights(tmp_path / "w.h5"), "'.h5'; allowed: .pth, .pt, .npz")
    for path in (tmp_path / name for name in WRITERS):
        read = functools.partial(read_weights, path)
        refused(read, f"{path}: no such file")
        os.mkfifo(path)
        refused(read, f"{path}: no such file")
        path.unlink()
        for content in (b"", b"a text", pickle.dumps({"a": 1}), b"PK\3\4", bytes(50)):
            path.write_bytes(content)
            message = refused(read, str(path))
            assert ": :" not in message and "save" in message, message
        with path.open("wb") as file:
            file.truncate(2**40)  # Takes no room.
        refused(read, "1099511627776 bytes")
    write_npz(tmp_path / "w.npz", ARRAYS).rename(tmp_path / "w.pth")
    refused(lambda: read_weights(tmp_path / "w.pth"), "0 entries data.pkl")
    write_zip(tmp_path / "w.pth", {}, byteorder="big")
    refused(lambda: read_weights(tmp_path / "w.pth"), "its byte order is not 'little'")


@pytest.mark.parametrize("write", TORCH_WRITERS)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([1, 2], "holds a list, no dict of tensors"),
        (tensor(np.zeros(2), "0"), "holds a _Tensor, no dict of tensors"),
        ({"a": tensor(np.zeros(2), "0"), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"a": tensor(np.zeros(2), "0")}}, "'model' is a dict, not a tensor"),
        ({"a": Name("torch", "FloatStorage")}, "'a' is a str, not a tensor"),
    ],
)
def test_contents_other_than_a_state_dict(write, content, part, tmp_path: Path):
    path = write(tmp_path / "w.pth", {"a": np.zeros(2)}, content)
    refused(lambda: read_weights(path), str(path), part, "model.state_dict()")


# Hostile files.


def hostile_contents(sentinel: Path) -> dict[str, Any]:
    """Return pickles that would create a file, or alter their reader."""
    return {
        "'posix.system'": Call(os.system, f"touch {sentinel}"),
        "eval'": Call(eval, f"open({str(sentinel)!r}, 'w')"),
        "'io.open'": Call(REBUILD, Call(Name("io", "open"), str(sentinel), "w")),
        "'torch.nn.Linear'": Name("torch.nn", "Linear"),
        "'ddaebm_jax.weights.Path.unlink'": Call(
            Name("ddaebm_jax.weights", "Path.unlink"), str(sentinel)
        ),
        "method": Call(REBUILD, state=(None, {"__code__": 1})),
    }


@pytest.mark.parametrize("write", TORCH_WRITERS)
@pytest.mark.parametrize("kind", hostile_contents(Path()))
def test_code_is_refused_and_not_run(write, kind: str, tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    content = hostile_contents(sentinel)[kind]
    parts = (kind, "no code in them is run") if "'" in kind else ()
    for value in (content, {"a": content}):
        path = write(tmp_path / "w.pth", {}, value)
        refused(lambda path=path: read_weights(path), str(path), *parts)
    path.write_bytes(pickled(content))
    refused(lambda: read_weights(path), str(path), *parts)
    assert not sentinel.exists()
    assert_same(read_weights(write(path, ARRAYS)), ARRAYS)


def write_program(folder: Path, program: bytes) -> tuple[Path, Path]:
    """Write a pickle alone, and in an archive."""
    alone, archived = folder / "alone.pth", folder / "archived.pth"
    alone.write_bytes(program)
    with zipfile.ZipFile(archived, "w") as archive:
        archive.writestr("w/data.pkl", program)
    return alone, archived


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02.",  # Nothing.
        b"\x80\x02(.",
        b"\x80\x02h\x05.",  # A value that was never remembered.
        b"\x80\x02t.",  # No mark.
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02K\x01K\x02R.",  # The number 1 is called.
        b"\x80\x02K\x01Q.",  # The number 1 is a storage.
        b"\x80\x02]K\x01b.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x82\x01.",  # The extension registry.
        b"\x80\x02X\xff\xff\xff\x7f.",  # A text of two gigabytes.
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fa.",
        b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # A memo of two billion entries.
        b"\x80\x02K\x01p2147483647\n.",
        b"\x80\x02" + b")" + b"\x85" * 20_000 + b".",  # Deep.
        b"\x80\x02]q\x00h\x00a.",  # A list that holds itself.
        b"\x80\x02}q\0U\1ah\0s.",
        b"\x80\x02" + b"(" * 2 * MEGABYTE + b".",
        b"\x80\x04" + b"}\x94" * MEGABYTE + b".",
        b"\x80\x02I" + b"9" * 10**6 + b"\n.",
        # A name that would take 2⁶⁰ characters to write.
        b"\x80\x04)q\0" + b"h\0h\0\x86q\0" * 60 + b"h\0h\0\x93.",
    ],
)
def test_odd_pickles_are_refused(program: bytes, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_INSTRUCTIONS", 30_000)
    for path in write_program(tmp_path, program):
        refused(lambda path=path: read_weights(path), str(path))


OPCODES = b"}])(N.0aeusRbQqrhjpg\x85\x86\x87\x94\x88\x89KMJGXUTc\x93\x80\x95|ioIFLSVP"
PIECES = [
    *(bytes((code,)) for code in OPCODES),
    *(b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"X\2\0\0\0id", b"K\1"),
    b"ctorch._utils\n_rebuild_tensor_v2\n",
]


@FUZZ
@hypothesis.given(
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=40)
)
def test_random_pickles_are_read_or_refused(tmp_path: Path, instructions):
    for path in write_program(tmp_path, b"\x80\x02" + b"".join(instructions)):
        read_or_refused(lambda path=path: read_weights(path))


@pytest.mark.parametrize("write", TORCH_WRITERS)
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"size": 2**40}, ""),
        ({"size": 5}, "does not fit"),
        ({"size": 7}, "a storage of 28 bytes has"),
        ({"size": -1}, "no known kind"),
        ({"offset": 1}, "does not fit its storage of 6"),
        ({"offset": -1}, "lacks a storage, shape or strides"),
        ({"shape": (2, 4)}, "does not fit"),
        ({"shape": (2, -3)}, "lacks a storage, shape or strides"),
        ({"shape": (2.0, 3)}, "lacks a storage, shape or strides"),
        ({"shape": (True, 3)}, "lacks a storage, shape or strides"),
        ({"shape": (6,)}, "lacks a storage, shape or strides"),
        ({"strides": (4, 1)}, "does not fit"),
        ({"strides": (-3, 1)}, "lacks a storage, shape or strides"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "does not fit"),
        ({"shape": (1,) * 100, "strides": (1,) * 100}, "dimension"),
        ({"shape": (0, 2**61), "strides": (2**61, 1)}, ""),
    ],
)
def test_tensors_that_exceed_their_storage(write, changes, part, tmp_path: Path):
    array = ARRAYS["a.weight"]
    content = {"a": tensor(array, "0", **changes)}
    path = write(tmp_path / "w.pth", {"a": array}, content)
    refused(lambda: read_weights(path), str(path), part)


@pytest.mark.parametrize("write", TORCH_WRITERS)
def test_storages_with_conflicting_sizes(write, tmp_path: Path):
    array, other = ARRAYS["a.weight"], ARRAYS["wide"]
    content = {"a": tensor(array, "0"), "b": tensor(other, "0", size=6)}
    path = write(tmp_path / "w.pth", {"a": array}, content)
    refused(lambda: read_weights(path), "a storage of 48 bytes has 24")


@pytest.mark.parametrize(
    ("write", "part"),
    [(write_zip, "no item named 'w/data/../secret'"), (write_legacy, "KeyError")],
)
def test_storages_outside_the_file(write, part: str, tmp_path: Path):
    array = ARRAYS["a.weight"]
    path = write(tmp_path / "w.pth", {"a": array}, {"a": tensor(array, "../secret")})
    refused(lambda: read_weights(path), part)


# safetensors.


def safetensors_bytes(header: Any, data: bytes = bytes(8), length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return struct.pack("<Q", length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(entry(), length=2**60),
        safetensors_bytes(b"{" * 100_000),
        safetensors_bytes([1]),
        safetensors_bytes({"a": {"dtype": "F32"}}),
        safetensors_bytes(entry("F8_E4M3")),
        safetensors_bytes(entry(shape=(2**62,) * 32)),
        safetensors_bytes(entry(place=(0, 2**40))),
    ],
)
def test_safetensors_that_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    message = refused(lambda: read_weights(path), f"{path}: cannot be read as", "save")
    assert ": :" not in message


# PyTorch's own files, if it is installed.


@pytest.mark.parametrize("new", [True, False])
def test_files_written_by_pytorch(new: bool, tmp_path: Path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    base = torch.randn(4, 6)
    content = {"base": base, "slice": base.t()[1:3, ::2], "scalar": torch.tensor(3.5)}
    content |= {"half": base.half(), "bfloat16": base.bfloat16(), "bool": base > 0}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    content["bfloat16"] = content["bfloat16"].float()
    expected = {name: value.numpy() for name, value in content.items()}
    assert_same(read_weights(path), expected)
    torch.save(torch.nn.Linear(4, 2), path, _use_new_zipfile_serialization=new)
    refused(lambda: read_weights(path), "torch.nn", "model.state_dict()")
    # PyTorch reads the files of these tests.
    write = write_zip if new else write_legacy
    loaded = torch.load(write(path, ARRAYS), weights_only=True)
    assert_same({name: value.numpy() for name, value in loaded.items()}, ARRAYS)
