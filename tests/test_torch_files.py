"""PyTorch's files, read without PyTorch: whole ones, damaged ones, hostile ones."""

import collections
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ddaebm_jax import torch_files
from ddaebm_jax.errors import InputError
from ddaebm_jax.torch_files import read_safetensors, read_state_dict


def assert_refused(action, *parts: str):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and "Type-check" not in message, message
    for part in parts:
        assert part in message, message


def assert_same(actual: dict, expected: dict):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


# Files as PyTorch writes them, by the pickler and names that only look like its own.


class Stub:
    """A name in a module that need not be installed."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any) -> None:
        raise AssertionError("only its name is wanted")


class Call:
    """What pickles as a call of a name."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


class Reference(tuple):
    """What pickles as a persistent id."""


class Pickler(pickle._Pickler):
    """Python's own, for names of modules that are not there."""

    legacy = False
    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Reference):
            return None
        # The older format tells here of storages within storages.
        return (*value, None) if self.legacy else tuple(value)

    def save_stub(self, value: Stub) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    dispatch[Stub] = save_stub


def pickled(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    pickler = Pickler(buffer, 2)
    pickler.legacy = legacy
    pickler.dump(value)
    return buffer.getvalue()


REBUILD = Stub("torch._utils", "_rebuild_tensor_v2")
KINDS = {
    np.dtype(kind): Stub("torch", f"{name}Storage")
    for kind, name in {
        "f8": "Double",
        "f4": "Float",
        "f2": "Half",
        "i8": "Long",
    }.items()
}


def tensor(
    array: np.ndarray, key: str, *, count=None, offset=0, shape=None, strides=None
) -> Call:
    """What `array`, alone in storage `key`, pickles as; parts of it may lie."""
    if strides is None:
        strides = tuple(step // array.itemsize for step in array.strides)
    reference = (
        "storage",
        KINDS[array.dtype],
        key,
        "cpu",
        array.size if count is None else count,
    )
    return Call(
        REBUILD,
        Reference(reference),
        offset,
        array.shape if shape is None else shape,
        strides,
        False,
        collections.OrderedDict(),
    )


def described(arrays: dict[str, np.ndarray]) -> collections.OrderedDict:
    content = collections.OrderedDict(
        (name, tensor(array, str(i))) for i, (name, array) in enumerate(arrays.items())
    )
    content._metadata = collections.OrderedDict({"": {"version": 1}})
    return content


def write_zip(
    path: Path, arrays: dict[str, np.ndarray], content: Any = None, method: int = 0
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        content = described(arrays) if content is None else content
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(
    path: Path, arrays: dict[str, np.ndarray], content: Any = None
) -> Path:
    with path.open("wb") as file:
        sizes = {"short": 2, "int": 4, "long": 4}
        system = {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": sizes,
        }
        content = described(arrays) if content is None else content
        keys = [str(i) for i in range(len(arrays))]
        for value in (0x1950A86A20F9469CFC6C, 1001, system, content, keys):
            file.write(pickled(value, legacy=True))
        for array in arrays.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())
    return path


WRITERS = (write_zip, write_legacy)

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([1.5, -2.0], np.float16),
    "tracked": np.array(7),
    "wide": np.linspace(0, 1, 3),
    "none": np.zeros((0, 2), np.float32),
}


@pytest.mark.parametrize("write", WRITERS)
def test_whole_files(write, tmp_path: Path):
    arrays = read_state_dict(write(tmp_path / "w.pth", ARRAYS))
    assert_same(arrays, ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        arrays["a.weight"][0, 0] = 1.0


@pytest.mark.parametrize("write", WRITERS)
def test_windows_and_parameters(write, tmp_path: Path):
    """A transposed tensor, a slice of it, and a parameter share one storage."""
    array = np.arange(12, dtype=np.float32)
    parameter = Stub("torch._utils", "_rebuild_parameter")
    content = {
        "transposed": tensor(array, "0", shape=(4, 3), strides=(1, 4)),
        "slice": tensor(array, "0", shape=(2,), strides=(5,), offset=2),
        "scalar": tensor(array, "0", shape=(), strides=(), offset=11),
        "parameter": Call(
            parameter, tensor(array, "0"), True, collections.OrderedDict()
        ),
    }
    actual = read_state_dict(write(tmp_path / "w.pt", {"x": array}, content))
    expected = {
        "transposed": array.reshape(3, 4).T,
        "slice": array[[2, 7]],
        "scalar": array[11],
        "parameter": array,
    }
    assert_same(actual, expected)


def test_newer_pickles(tmp_path: Path):
    """Protocol 4, with frames and names as two strings."""
    torch = types.ModuleType("torch")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    utils = types.ModuleType("torch._utils")

    def rebuild() -> None:
        pass

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild

    class WithReferences(pickle.Pickler):
        def persistent_id(self, value: Any) -> tuple | None:
            return tuple(value) if isinstance(value, Reference) else None

    storage = Reference(("storage", torch.FloatStorage, "0", "cpu", 2))
    one = Call(rebuild, storage, 0, (2,), (1,), False, collections.OrderedDict())
    buffer = io.BytesIO()
    real = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        WithReferences(buffer, 4).dump({"x": one})
    finally:
        for name, module in real.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    array = np.array([3.0, 4.0], np.float32)
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", buffer.getvalue())
        archive.writestr("w/data/0", array.tobytes())
    assert_same(read_state_dict(tmp_path / "w.pt"), {"x": array})


# Damaged files.


@pytest.mark.parametrize("write", WRITERS)
def test_truncated_files(write, tmp_path: Path):
    path = tmp_path / "w.pth"
    content = write(path, ARRAYS).read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        assert_refused(lambda: read_state_dict(path), str(path), "cannot be read")
    path.write_bytes(content[:-1])
    assert_refused(lambda: read_state_dict(path), "cannot be read")


@pytest.mark.parametrize("write", WRITERS)
def test_files_with_wrong_bytes(write, tmp_path: Path):
    """Each is read, as numbers of another value, or refused: nothing else."""
    path = tmp_path / "w.pth"
    content = write(path, ARRAYS).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)


def test_files_of_another_kind(tmp_path: Path):
    path = tmp_path / "w.pth"
    assert_refused(lambda: read_state_dict(path), str(path), "no such file")
    path.mkdir()
    assert_refused(lambda: read_state_dict(path), "no such file")
    path.rmdir()
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    for content, part in (
        (b"", "cannot be read as a PyTorch state_dict"),
        (b"a text", "torch.save(model.state_dict(), path)"),
        (pickle.dumps({"a": 1}), "does not start as PyTorch's files do"),
        (pickle.dumps(1.0), "does not start"),
        ((tmp_path / "arrays.npz").read_bytes(), "0 members data.pkl"),
    ):
        path.write_bytes(content)
        assert_refused(lambda: read_state_dict(path), str(path), part)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([1, 2], "holds a list; a state_dict"),
        (tensor(np.zeros(2), "0"), "holds a Tensor; a state_dict"),
        ({"a": tensor(np.zeros(2), "0"), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"a": tensor(np.zeros(2), "0")}}, "'model' is a dict, not a tensor"),
        ({3: tensor(np.zeros(2), "0")}, "not a tensor under a name"),
        ({(1, 2): 3}, "tuple as a key"),
        ({"a": Stub("torch", "FloatStorage")}, "'a' is a Global, not a tensor"),
    ],
)
def test_contents_that_are_no_state_dict(write, content, part, tmp_path: Path):
    path = write(tmp_path / "w.pth", {"a": np.zeros(2)}, content)
    assert_refused(lambda: read_state_dict(path), str(path), part, "model.state_dict()")


# Hostile files.


class Shell:
    """What a hostile file would run."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.sentinel}",)


class Evaluated(Shell):
    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.sentinel)!r}, 'w')",)


class Disguised(Shell):
    def __reduce__(self) -> tuple:
        open_it = Call(Stub("io", "open"), str(self.sentinel), "w")
        return Stub("torch._utils", "_rebuild_tensor_v2"), (open_it,)


class Stateful(Shell):
    """Attributes of a permitted name are not to be set."""

    def __reduce__(self) -> tuple:
        return Stub("torch._utils", "_rebuild_tensor_v2"), (), {"__call__": 1}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("hostile", [Shell, Evaluated, Disguised, Stateful])
@pytest.mark.parametrize("inside", [True, False])
def test_code_is_refused_and_not_run(write, hostile, inside: bool, tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    content = hostile(sentinel)
    path = write(tmp_path / "w.pth", {}, {"a": content} if inside else content)
    assert_refused(lambda: read_state_dict(path), str(path))
    assert not sentinel.exists()
    # As the very first pickle of the older format, too.
    path.write_bytes(pickled(content))
    assert_refused(lambda: read_state_dict(path), str(path))
    assert not sentinel.exists()


def test_refused_names_are_named(tmp_path: Path):
    for name, content in (
        ("system", Shell(tmp_path / "sentinel")),
        ("'__builtin__.eval'", Evaluated(tmp_path / "sentinel")),
        ("'torch.nn.modules.linear.Linear'", Stub("torch.nn.modules.linear", "Linear")),
    ):
        path = write_zip(tmp_path / "w.pth", {}, {"a": content})
        assert_refused(
            lambda path=path: read_state_dict(path),
            name,
            "only plain weights are loaded, never code",
        )


@pytest.mark.parametrize(
    "pickle_",
    [
        b"\x80\x02.",  # Nothing.
        b"\x80\x02(.",  # A mark and nothing.
        b"\x80\x02KK.",
        b"\x80\x02h\x05.",  # What was never remembered.
        b"\x80\x02t.",  # No mark.
        b"\x80\x02\x85.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02K\x01K\x02R.",  # The number 1 is called.
        b"\x80\x02K\x01Q.",  # The number 1 is a storage.
        b"\x80\x02K\x01a.",
        b"\x80\x02]K\x01b.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x82\x01.",  # The extension registry.
        b"\x80\x02X\xff\xff\xff\x7f.",  # A text of two gigabytes.
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # A memo of two milliard places.
        b"\x80\x02" + b")" + b"\x85" * 20_000 + b".",  # Deep.
        b"\x80\x02]q\x00h\x00a.",  # A list that holds itself.
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_odd_pickles_are_refused(pickle_, tmp_path: Path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickle_)
    assert_refused(lambda: read_state_dict(path), str(path))
    path.write_bytes(pickle_)
    assert_refused(lambda: read_state_dict(path), str(path))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"count": 2**40}, "need"),
        ({"count": 2**62}, "no kind that is known"),
        ({"count": 5}, "does not fit"),
        ({"count": 7}, ""),
        ({"count": -1}, "no kind that is known"),
        ({"offset": 1}, "does not fit into its storage of 6"),
        ({"offset": -1}, "no storage, shape or strides"),
        ({"shape": (2, 4)}, "does not fit"),
        ({"shape": (2, -3)}, "no storage, shape or strides"),
        ({"shape": (2.0, 3)}, "no storage, shape or strides"),
        ({"shape": (True, 3)}, "no storage, shape or strides"),
        ({"shape": (6,)}, "no storage, shape or strides"),
        ({"strides": (4, 1)}, "does not fit"),
        ({"strides": (-3, 1)}, "no storage, shape or strides"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "does not fit"),
        ({"shape": (1,) * 64, "strides": (1,) * 64}, "no storage, shape or strides"),
        ({"shape": (0, 2**61), "strides": (2**61, 1)}, ""),
    ],
)
def test_tensors_that_promise_too_much(write, changes, part, tmp_path: Path):
    array = ARRAYS["a.weight"]
    content = {"a": tensor(array, "0", **changes)}
    path = write(tmp_path / "w.pth", {"a": array}, content)
    assert_refused(lambda: read_state_dict(path), str(path), part)


def test_storages_that_do_not_fit(tmp_path: Path):
    array, other = ARRAYS["a.weight"], ARRAYS["wide"]
    path = tmp_path / "w.pth"
    two = {"a": tensor(array, "0"), "b": tensor(other, "0")}
    missing = {"a": tensor(array, "../secret")}
    for write, content, part in (
        (write_zip, two, "in two ways"),
        (write_legacy, two, "in two ways"),
        (write_zip, missing, "it has no 'archive/data/../secret'"),
        (write_legacy, missing, "does not fit its tensors"),
        (write_legacy, {}, "does not fit its tensors"),
    ):
        write(path, {"a": array}, content)
        assert_refused(lambda: read_state_dict(path), part)


def test_compressed_archives_are_refused(tmp_path: Path):
    """A small archive that grows when it is read is not PyTorch's."""
    zeros = {"a": np.zeros(10**6, np.float32)}
    path = write_zip(tmp_path / "w.pth", zeros, method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert_refused(lambda: read_state_dict(path), "is compressed")


def test_big_endian_archives_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", pickled({}))
        archive.writestr("w/byteorder", "big")
    assert_refused(lambda: read_state_dict(tmp_path / "w.pth"), "byte order is 'big'")


# safetensors.


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return struct.pack("<Q", length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": place}}


def test_safetensors(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "half": {"dtype": "F16", "shape": [1, 2], "data_offsets": [8, 12]},
        "brain": {"dtype": "BF16", "shape": [2], "data_offsets": [12, 16]},
        "long": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
    }
    data = struct.pack("<q", 5) + np.array([1.5, -2.0], "<f2").tobytes()
    data += struct.pack("<HH", 0x3FC0, 0xC000)
    path.write_bytes(safetensors(header, data))
    expected = {
        "half": np.array([[1.5, -2.0]], np.float16),
        "brain": np.array([1.5, -2.0], np.float32),
        "long": np.array(5),
    }
    assert_same(read_safetensors(path), expected)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert_refused(lambda: read_safetensors(path), str(path), "safetensors")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "too early"),
        (safetensors(entry(), bytes(8), 2**60), "its header would have"),
        (safetensors(b"{" * 100_000), "cannot be read"),
        (safetensors(b"[" * 100_000), "cannot be read"),
        (safetensors([1]), "no names"),
        (safetensors({"a": 3}), "'a' has no type"),
        (safetensors({"a": {"dtype": "F32"}}), "'a' has no type"),
        (safetensors(entry("F8_E4M3"), bytes(8)), "'F8_E4M3'; allowed: F64"),
        (safetensors(entry(["F32"]), bytes(8)), "allowed: F64"),
        (safetensors(entry(shape=(3,)), bytes(8)), "does not fit its place"),
        (safetensors(entry(shape=(2.0,)), bytes(8)), "no shape"),
        (safetensors(entry(shape=8), bytes(8)), "no shape"),
        (safetensors(entry(shape=(-2,)), bytes(8)), "no shape"),
        (safetensors(entry(place=(8, 16)), bytes(8)), "does not fit its place"),
        (safetensors(entry(place=(8, 0)), bytes(8)), "does not fit its place"),
        (safetensors(entry(place=(0, 8, 8)), bytes(8)), "no place"),
        (safetensors(entry() | {"b": entry()["a"]}, bytes(8)), "overlap"),
    ],
)
def test_safetensors_that_are_refused(content: bytes, part: str, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    assert_refused(lambda: read_safetensors(path), str(path), part)


# PyTorch's own files, where it is installed.


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("new", [True, False])
def test_pytorchs_files(torch, new: bool, tmp_path: Path):
    path = tmp_path / "w.pth"
    base = torch.randn(4, 6, generator=torch.manual_seed(0))
    kinds = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool "
        "complex64 complex128"
    )
    content = collections.OrderedDict(
        base=base,
        transposed=base.t(),
        slice=base[1:3, ::2],
        parameter=torch.nn.Parameter(base[:, 1]),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        **{kind: base.mul(3).to(getattr(torch, kind)) for kind in kinds.split()},
    )
    torch.save(content, path, _use_new_zipfile_serialization=new)
    actual = read_state_dict(path)
    expected = {
        name: (value.float() if name == "bfloat16" else value).detach().numpy()
        for name, value in content.items()
    }
    assert_same(actual, expected)
    assert np.shares_memory(actual["base"], actual["transposed"])


@pytest.mark.parametrize("new", [True, False])
def test_pytorchs_modules(torch, new: bool, tmp_path: Path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    )
    path = tmp_path / "w.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=new)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert_same(read_state_dict(path), expected)
    torch.save(model, path, _use_new_zipfile_serialization=new)
    assert_refused(
        lambda: read_state_dict(path),
        "torch.nn.modules.container.Sequential",
        "save model.state_dict()",
    )
    for content in ({"model": model.state_dict()}, {"a": torch.zeros(1), "epoch": 1}):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        assert_refused(lambda: read_state_dict(path), "save model.state_dict()")


def test_stretched_tensors_of_pytorchs_are_refused(torch, tmp_path: Path):
    torch.save({"a": torch.zeros(1).expand(1000)}, tmp_path / "w.pt")
    assert_refused(lambda: read_state_dict(tmp_path / "w.pt"), "does not fit")


@pytest.mark.parametrize("write", WRITERS)
def test_pytorch_reads_the_files_of_these_tests(torch, write, tmp_path: Path):
    path = write(tmp_path / "w.pth", ARRAYS)
    loaded = torch.load(path, weights_only=True)
    assert_same({name: value.numpy() for name, value in loaded.items()}, ARRAYS)


def test_nothing_here_needs_pytorch():
    assert "torch" not in vars(torch_files)
