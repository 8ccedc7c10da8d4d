"""Files from outside: read or refused in one line, within bounds, and never run."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from ddaebm_jax import files
from ddaebm_jax.data import decoding, image_files, npz_files, table_files, tabular
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import fid, image_quality

MEGABYTE = 2**20
FUZZ = hypothesis.settings(
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
RNG = np.random.default_rng(0)
ARRAYS = {
    "first": RNG.normal(size=(3, 2)).astype(np.float32),
    "second": RNG.normal(size=4).astype(np.float32),
}


def refused(action, *parts):
    """The one-line message of a refusal that allocates little."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and "Type-check" not in message, message
    for part in parts:
        assert part in message, message
    assert peak < 32 * MEGABYTE, f"{peak} bytes for {message}"
    return message


def read_or_refused(action):
    """Runs a reader: a value, or one line; whatever else it raises fails the test."""
    try:
        action()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2_000


# --- Whole files of every kind, and their readers -------------------------------


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def image(kind, mode="RGB"):
    buffer = io.BytesIO()
    pixels = RNG.integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def saved_reference():
    features = RNG.normal(size=(6, 3))
    moments = fid.moments(features)
    return npz(
        count=moments.count,
        mean=moments.mean,
        scatter=moments.scatter,
        features=features.astype(np.float32),
        fingerprint='{"a": 1}',
    )


def saved_table():
    rows = RNG.normal(size=(5, 2)).astype(np.float32)
    return npz(
        columns=np.array(["a", "b"]),
        train=rows,
        test=rows[:2],
        mean=np.zeros(2),
        std=np.ones(2),
    )


# Kind → (suffix, a whole file, its reader).
KINDS: dict[str, tuple[str, bytes, Any]] = {
    "csv": (".csv", b"a,b\n1,2\n3.5,-4e2\n", table_files.read_table_file),
    "table": (".npz", npz(x=np.ones((3, 2))), table_files.read_table_file),
    "saved table": (".npz", saved_table(), tabular.load_saved_table),
    "images": (
        ".npz",
        npz(x=RNG.integers(0, 256, (2, 4, 4, 3), np.uint8)),
        lambda path: image_files.read_images(path, (4, 4, 3)),
    ),
    "reference": (
        ".npz",
        saved_reference(),
        lambda path: image_quality.load_reference(path, {"a": 1}),
    ),
    "png": (
        ".png",
        image("PNG"),
        lambda path: decoding.decode_file(path, path.name, 8, 3, None),
    ),
    "jpeg": (
        ".jpg",
        image("JPEG"),
        lambda path: decoding.decode_file(path, path.name, 8, 3, None),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(kind, tmp_path):
    suffix, content, read = KINDS[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    read(path)


@st.composite
def mutations(draw, content):
    """Bytes of a file with a few faults: bytes, gaps, copies, cuts, large numbers."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 16))
        match draw(st.sampled_from(("byte", "gap", "copy", "cut", "number", "insert"))):
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "gap":
                del data[at : at + length]
            case "copy":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
            case "number":
                number = draw(st.sampled_from((0, 2**31 - 1, 2**32 - 1, 2**63, 2**40)))
                data[at : at + 8] = struct.pack("<Q", number)
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@hypothesis.given(data=st.data())
def test_mutated_files_are_read_or_refused(kind, tmp_path, data):
    suffix, content, read = KINDS[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data.draw(mutations(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata.
        read_or_refused(lambda: read(path))


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(FUZZ, max_examples=40)
@hypothesis.given(content=st.binary(max_size=200), magic=st.integers(0, 12))
def test_random_bytes_are_read_or_refused(kind, tmp_path, content, magic):
    suffix, whole, read = KINDS[kind]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(whole[:magic] + content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_or_refused(lambda: read(path))


@FUZZ
@hypothesis.given(
    st.text(st.sampled_from('0123456789.,-+eEnaif"\n\r\0;= x'), max_size=80)
)
def test_text_that_looks_like_csv(tmp_path, text):
    path = tmp_path / "file.csv"
    path.write_text(text, newline="")
    read_or_refused(lambda: table_files.read_table_file(path))


# --- NPZ ------------------------------------------------------------------------


def header(shape, dtype="'|u1'", version=1):
    """The start of a .npy member that says what it is told to say."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    lengths = {1: "<H", 2: "<I"}
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack(lengths[version], len(text) + 1)
        + text.encode()
        + b"\n"
    )


def archive(path, members, method=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of names that come twice.
        with zipfile.ZipFile(path, "w", method) as file:
            for name, content in members:
                file.writestr(name, content)
    return path


def zeros(path, num_bytes, start=b"", name="x.npy"):
    """An archive of one member of zeros, which deflates to next to nothing."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open(name, "w", force_zip64=True) as member,
    ):
        member.write(start)
        for _ in range(num_bytes // MEGABYTE):
            member.write(bytes(MEGABYTE))
    return path


def read_npz(path, most=2**40):
    with npz_files.NpzFile(path, most, "save it again") as file:
        return {name: file.read(array) for name, array in file.arrays.items()}


def test_decompression_bombs_are_refused(tmp_path):
    size = 128 * MEGABYTE
    path = zeros(tmp_path / "bomb.npz", size, header((size,)))
    assert path.stat().st_size < MEGABYTE
    refused(lambda: read_npz(path), "decompression bomb", "numpy.savez")
    refused(
        lambda: image_files.read_images(path, (4, 4, 3)), str(path), "decompression"
    )


def test_header_that_is_a_bomb_is_refused(tmp_path):
    size = 32 * MEGABYTE
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", size - 16)
    refused(lambda: read_npz(zeros(tmp_path / "a.npz", size, start)), "cannot be read")


def test_bound_on_the_bytes_of_all_members(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(1000), y=np.zeros(1000))
    refused(lambda: read_npz(path, 12_000), "at most 12000")


@pytest.mark.parametrize(
    "shape,dtype,part",
    [
        ((2**40,), "'|u1'", "needs 1099511627776 bytes"),
        ((2**31, 2**31, 2**31), "'<f8'", "needs"),
        ((-4, -4), "'|u1'", "no shape"),
        ((True, 16), "'|u1'", "no shape"),
        ((0, 2**62), "'|u1'", "needs 0 bytes"),
        ((16,), "'|S100000000'", "needs"),
        ((10**12,), "'|S0'", "needs 0 bytes"),
        ((2,), "[('a', '<f4'), ('b', '<f4')]", "neither numbers nor text"),
        ((2,), "'<M8[s]'", "neither numbers nor text"),
        ((2,), "'|V8'", "neither numbers nor text"),
        ((1,), "'|O'", "Python objects"),
        ((1,), "[('a', '|O')]", "Python objects"),
        ("__import__('os').abort()", "'|u1'", "cannot be read"),
        ("(1,) * 10**9", "'|u1'", "cannot be read"),
        ("(" * 9_000, "'|u1'", "cannot be read"),
    ],
)
def test_headers_that_promise_other_than_they_hold(tmp_path, shape, dtype, part):
    path = archive(tmp_path / "a.npz", [("x.npy", header(shape, dtype) + bytes(16))])
    refused(lambda: read_npz(path), part)


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    @classmethod
    def set(cls, folder):
        """Returns the path that would come to be, and the pickle."""
        trap = folder / "sprung"
        payload = pickle.dumps(cls(trap))
        pickle.loads(payload)
        assert trap.is_dir()  # It works.
        trap.rmdir()
        return trap, payload


def test_no_pickle_in_an_npz_is_run(tmp_path):
    trap, payload = Trap.set(tmp_path)
    for dtype, part in (("'|O'", "Python objects"), ("'|u1'", "needs 1 bytes")):
        content = header((1,), dtype) + payload
        path = archive(tmp_path / "a.npz", [("x.npy", content)])
        refused(lambda path=path: read_npz(path), part)
    plain = tmp_path / "b.npz"
    plain.write_bytes(payload)
    for read in (read_npz, table_files.read_table_file):
        refused(lambda read=read: read(plain), "not an NPZ file")
    assert not trap.exists()


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    names = ["../up", "/tmp/absolute", "..\\windows", "C:\\drive", "a/../../b"]
    content = header((1,)) + b"\7"
    path = archive(inside / "a.npz", [(f"{name}.npy", content) for name in names])
    assert set(read_npz(path)) == set(names)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_members_that_come_twice_overlap_or_are_no_arrays(tmp_path):
    content = header((1,)) + b"\7"
    path = archive(tmp_path / "a.npz", [("x.npy", content), ("x.npy", content)])
    refused(lambda: read_npz(path), "'x.npy' more than once")
    path = archive(tmp_path / "b.npz", [("x.npy", content), ("evil.pkl", b"")])
    refused(lambda: read_npz(path), "'evil.pkl'")
    # Two entries of the directory that lead to one place.
    path = archive(tmp_path / "c.npz", [("x.npy", content), ("y.npy", content)], 0)
    with zipfile.ZipFile(path) as file:
        second = file.getinfo("y.npy").header_offset
    data = path.read_bytes()
    entry = data.rindex(b"PK\1\2") + 42
    assert struct.unpack_from("<I", data, entry) == (second,)
    path.write_bytes(data[:entry] + bytes(4) + data[entry + 4 :])
    refused(lambda: read_npz(path), "cannot be read")


def test_archive_that_is_nothing_but_a_directory_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 9, 9, *[0] * 6) + b"a" * 9
    assert len(entry) == 46 + 9
    count = 100_000
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, count * len(entry), 0, 0)
    path.write_bytes(entry * count + end)
    refused(lambda: read_npz(path), "its directory has more than")


def test_damaged_reference_statistics(tmp_path):
    path = tmp_path / "a.npz"
    whole = {
        "count": 6,
        "mean": np.zeros(2),
        "scatter": np.eye(2),
        "features": np.zeros((6, 2), "f"),
    }
    for changes, part in (
        ({"fingerprint": "[" * 100_000}, "RecursionError"),
        ({"fingerprint": "[1]"}, "damaged"),
        ({"fingerprint": "{}", "count": np.inf}, "OverflowError"),
        ({"fingerprint": "{}", "mean": np.array([0, np.nan])}, "not all"),
        ({"fingerprint": "{}", "mean": np.array(["a", "b"])}, "not all"),
        ({"fingerprint": "{}", "scatter": np.eye(3)}, "do not fit"),
        ({"fingerprint": np.array(["{}"] * 2)}, "damaged"),
    ):
        np.savez(path, **(whole | changes))
        refused(lambda: image_quality.load_reference(path, {}), str(path), part)
    np.savez(path, **whole, fingerprint="{}")
    data = path.read_bytes()
    text = "{}".encode("utf-32-le")
    path.write_bytes(data.replace(text, b"\xff" * 8))  # No characters, and no CRC.
    refused(lambda: image_quality.load_reference(path, {}), str(path))


def test_damaged_cached_reference_is_put_aside_and_a_named_one_left_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = RNG.integers(0, 256, (20, 2, 2, 1), np.uint8)

    def extract(pixels):
        flat = pixels.reshape(len(pixels), -1).astype(np.float32)
        return SimpleNamespace(pool=flat, logits=flat)

    def opened(path=""):
        evaluation = SimpleNamespace(reference_path=path, batch_size=8)
        return image_quality._open_reference(
            evaluation, pictures, extract, {"num_features_kept": 5}
        )

    expected = opened()
    (path,) = (tmp_path / "ddaebm_jax" / "reference").iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    damaged = path.read_bytes()
    np.testing.assert_array_equal(opened().moments.mean, expected.moments.mean)
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    np.testing.assert_array_equal(opened().features, expected.features)
    named = tmp_path / "mine.npz"
    named.write_bytes(damaged)
    refused(lambda: opened(str(named)), str(named), "remove it")
    assert named.read_bytes() == damaged


def test_damaged_saved_tables(tmp_path):
    path = tmp_path / "table.npz"
    rows = np.zeros((5, 2), np.float32)
    whole = {
        "columns": np.array(["a", "b"]),
        "train": rows,
        "test": rows,
        "mean": np.zeros(2),
        "std": np.ones(2),
    }
    np.savez(path, **whole)
    assert tabular.load_saved_table(path).columns == ("a", "b")
    for changes in (
        {"train": rows[0]},
        {"train": rows[:, :1]},
        {"train": rows[:0]},
        {"train": rows + np.float32(np.nan)},
        {"train": rows.astype(int)},
        {"train": np.array([{}], object)},
        {"std": np.zeros(2)},
        {"mean": np.array(["a", "b"])},
        {"mean": np.zeros(3)},
        {"columns": np.array("a")},
        {"columns": np.array([["a"], ["b"]])},
        {"test_labels": np.zeros(4, int)},
        {"test_labels": np.zeros(5)},
    ):
        np.savez(path, **(whole | changes))
        refused(lambda: tabular.load_saved_table(path), str(path), "train again")
    refused(lambda: tabular.load_saved_table(tmp_path / "none.npz"), "no such file")


# --- CSV ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content,parts",
    [
        (b"1," * 2**20, ("line 1", "1048576 characters")),
        (b"1" * 2**21, ("line 1", "characters")),
        (b"1," * 70_000 + b"1\n", ("line 1 has 70001 columns", "at most 65536")),
        (b'a,b\n"' + b"1\n" * 2**20, ("not CSV (field larger",)),
        (b'a,b\n"1' + b'\n","' * 2**19, ("characters",)),
        (b"a,b\n1,\0\n", ("line 2, column 'b' is '\\x00'",)),
        (b"a,b\n1,\xff\n", ("not UTF-8",)),
        (b"a,b\n=1+1,2\n", ("column 'a' is '=1+1'",)),
        (b"a,b\n__import__('os').abort(),2\n", ("a number is needed",)),
    ],
)
def test_csv_files_that_are_no_tables(tmp_path, content, parts):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    refused(lambda: table_files.read_table_file(path), str(path), *parts)


def test_csv_files_beyond_the_bounds(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.truncate(2**40)  # Of nothing: it takes no room.
    refused(lambda: table_files.read_table_file(path), "at most 268435456")
    monkeypatch.setattr(table_files, "MAX_NPZ_BYTES", 80)
    path.write_text("1,2,3\n" * 4)
    refused(lambda: table_files.read_table_file(path), "more than 10 numbers", "line 4")


# --- Images ---------------------------------------------------------------------


def test_files_that_are_no_files_do_not_hold_anything_up(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    message = refused(
        lambda: image_files.read_folder(tmp_path, 8, 3), "2 of 3 images", "pipe.png"
    )
    assert "not a regular file" in message
    for name in ("pipe.csv", "pipe.npz"):
        os.mkfifo(tmp_path / name)
    read = table_files.read_table_file
    refused(lambda: read(tmp_path / "pipe.csv"), "not a regular file")
    refused(lambda: read(tmp_path / "pipe.npz"), "not a regular file")
    refused(lambda: read_npz(tmp_path / "pipe.npz"), "not a regular file")
    with pytest.raises(InputError, match="not a regular file"):
        files.open_regular(tmp_path, 10)


def test_links_lead_within_the_folder_only(tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(inside / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    (inside / "b.png").symlink_to("a.png")
    (inside / "sub" / "c.png").symlink_to("../a.png")
    assert image_files.read_folder(inside, 8, 3).names == (
        "a.png",
        "b.png",
        "sub/c.png",
    )
    (inside / "loop").symlink_to(inside)
    (tmp_path / "named").symlink_to(inside)
    assert len(image_files.read_folder(tmp_path / "named", 8, 3).names) == 3
    (inside / "z.png").symlink_to(tmp_path / "secret.png")
    refused(
        lambda: image_files.read_folder(inside, 8, 3),
        "1 of 4 images",
        "z.png: a link to outside of the folder",
    )
    found = image_files.read_folder(inside, 8, 3, skip_corrupt=True)
    assert found.skipped == 1 and len(found.names) == 3
    (inside / "z.png").unlink()
    (inside / "z.png").symlink_to("z.png")
    refused(lambda: image_files.read_folder(inside, 8, 3), "1 of 4 images", "z.png")


def test_odd_names_of_files_stay_in_one_line(tmp_path):
    odd = os.fsdecode(b"a\n\x1b[31m\xff.png")
    Image.new("RGB", (8, 8)).save(tmp_path / odd, "PNG")
    (tmp_path / "b.png").write_text("no image")
    found = image_files.read_folder(tmp_path, 8, 3, skip_corrupt=True)
    assert found.names == ("a\\n\\x1b[31m\\udcff.png",)
    (tmp_path / odd).write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    refused(lambda: image_files.read_folder(tmp_path, 8, 3), found.names[0])


def test_images_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name, kind in (("a.png", "PNG"), ("b.jpg", "MPO")):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])

    def read(name):
        return decoding.decode_file(tmp_path / name, name, 8, 3, None)

    refused(lambda: read("a.png"), "animated, 2 frames")
    assert read("b.jpg")[0, 0, 0] > 200  # The first, red.


def png_chunk(kind, data):
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_are_bombs(tmp_path):
    def read(content):
        path = tmp_path / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        return decoding.decode_file(path, "a.png", 8, 3, None)

    def start(width, height):
        return png_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))

    pixels = png_chunk(b"IDAT", zlib.compress(bytes(10**6)))
    end = png_chunk(b"IEND", b"")
    for side in (10_000, 2**16, 2**31 - 1):
        refused(lambda side=side: read(start(side, side) + pixels + end), "a.png")
    # Text that is large once decompressed.
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 * MEGABYTE)))
    refused(lambda: read(start(8, 8) + text + pixels + end), "a.png")
    with (tmp_path / "large.png").open("wb") as file:
        file.write(image("PNG"))
        file.truncate(2**40)
    refused(
        lambda: decoding.decode_file(tmp_path / "large.png", "l.png", 8, 3, None),
        "l.png: 1099511627776 bytes",
    )
