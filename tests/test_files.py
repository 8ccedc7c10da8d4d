"""NPZ files from outside: read or refused in one line, within bounds, never run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from untrusted import FUZZ, MEGABYTE, mutations, read_or_refused, refused

from ddaebm_jax import files

RNG = np.random.default_rng(0)
ARRAYS = {
    "first": RNG.normal(size=(3, 2)).astype(np.float32),
    "second": np.array(["a", "bc"]),
    "third": np.array(7),
}


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def header(shape, dtype="'|u1'"):
    """The start of a .npy entry that claims what it is told to claim."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive(path, *entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def read(path, max_bytes=2**40, names=None):
    return files.read_npz(path, max_bytes, names)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_named_arrays_are_read_as_they_were_saved(tmp_path, save, caplog):
    caplog.set_level("INFO", "absl")
    path = tmp_path / "a.npz"
    save(path, **ARRAYS, objects=np.array([{}], object))
    found = read(path, names=ARRAYS)
    assert f"{path}: 'first', 'second', 'third' read, not read: 'obj" in caplog.text
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert str(files.npz_headers(path, 2**20)["first"]) == "'first' (3×2, float32)"
    refused(lambda: read(path, names=["first", "y"]), "no array 'y'", "'first' (3×2")
    refused(lambda: read(path), str(path), "'objects' (1, object)", "Python objects")


def test_files_that_are_not_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
        read(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    for content in (b"", b"text", path.with_suffix(".npy").read_bytes()):
        path.write_bytes(content)
        refused(lambda: read(path), str(path), "NPZ archive cannot be read")
    whole = saved(path, x=np.arange(50.0)).read_bytes()
    path.write_bytes(whole[:200])
    refused(lambda: read(path), str(path), "NPZ archive cannot be read")
    path.write_bytes(whole.replace(np.float64(7.0).tobytes(), bytes(8)))
    refused(lambda: read(path), "'x.npy' cannot be read", "CRC")
    content = header((1,)) + b"\7"
    archive(path, ("x.npy", content), ("evil.pkl", b""))
    refused(lambda: read(path), "'evil.pkl' cannot be read")
    with path.open("wb") as file:
        file.truncate(2**42)  # A sparse file: it takes no space.
    refused(lambda: read(path), "at most")
    path.unlink()
    os.mkfifo(path)
    refused(lambda: read(path), "not a regular file")


def test_bound_on_the_decompressed_bytes(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros(MEGABYTE), y=np.zeros(MEGABYTE))
    assert path.stat().st_size < MEGABYTE
    refused(lambda: read(path, 15 * MEGABYTE), "at most 15728640 are allowed")
    assert len(read(path, 16 * MEGABYTE)) == 2


@pytest.mark.parametrize(
    "shape,dtype,part",
    [
        ((2**40,), "'|u1'", "needs 1099511627776 bytes"),
        ((2**31, 2**31, 2**31), "'<f8'", "needs"),
        ((-4, -4), "'|u1'", "cannot be read"),
        ((0, 2**62), "'|u1'", "needs 0 bytes"),
        ((10**12,), "'|S0'", "needs 0 bytes"),
        ((2,), "[('a', '<f4'), ('b', '<f4')]", "neither numbers nor text"),
        ((2,), "'<M8[s]'", "neither numbers nor text"),
        ((1,), "'|O'", "Python objects"),
        ((1,), "[('a', '|O')]", "Python objects"),
        ("__import__('os').abort()", "'|u1'", "cannot be read"),
        ("(" * 9_000, "'|u1'", "cannot be read"),
    ],
)
def test_headers_that_claim_other_than_the_file_holds(tmp_path, shape, dtype, part):
    path = archive(tmp_path / "a.npz", ("x.npy", header(shape, dtype) + bytes(16)))
    refused(lambda: read(path), str(path), "x", part)


def test_a_header_as_large_as_the_file_is_not_read_whole(tmp_path):
    size = 64 * MEGABYTE
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", size)
    path = archive(tmp_path / "a.npz", ("x.npy", start + bytes(size)))
    refused(lambda: read(path), "'x.npy' cannot be read")


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_run(tmp_path):
    payload = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(payload)  # The trap works.
    (tmp_path / "sprung").rmdir()
    path = tmp_path / "a.npz"
    for dtype, part in (("'|O'", "Python objects"), ("'|u1'", "needs 1 bytes")):
        archive(path, ("x.npy", header((1,), dtype) + payload))
        refused(lambda: read(path), part)
    path.write_bytes(payload)
    refused(lambda: read(path), "NPZ archive cannot be read")
    assert not (tmp_path / "sprung").exists()


@FUZZ
@hypothesis.given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path, data):
    buffer = io.BytesIO()
    np.savez(buffer, **ARRAYS)
    path = tmp_path / "a.npz"
    path.write_bytes(data.draw(mutations(buffer.getvalue())))
    read_or_refused(lambda: read(path, 2**20))


@pytest.mark.parametrize("content", [b"old", None])
def test_a_failed_write_leaves_what_was_there(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError), files.written_atomically(path) as file:
        file.write(b"new")
        raise OSError("no space left")
    assert list(tmp_path.iterdir()) == [path] * (content is not None)
    files.write_json_atomically(path, {"a": 1})
    assert files.read_text(path, 100) == '{\n  "a": 1\n}\n'
    refused(lambda: files.read_text(path, 3), "at most 3 are allowed")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (done.append("rename"), replace(self, to))
    )
    files.write_text_atomically(tmp_path / "file", "text")
    assert done == ["sync", "rename", "sync"]  # The last of the folder.


def test_what_lies_in_the_way_of_a_file_is_not_written_to(tmp_path):
    """A directory from elsewhere may hold a link out of it, or a pipe."""
    outside, path = tmp_path / "outside", tmp_path / "run" / "file"
    outside.write_text("mine")
    path.parent.mkdir()
    partial = path.with_name("file.partial")
    partial.symlink_to(outside)
    files.write_text_atomically(path, "first")
    os.mkfifo(partial)
    files.write_text_atomically(path, "second")
    assert outside.read_text() == "mine" and path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]
