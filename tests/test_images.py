"""Images: the order of batches, what a step draws, sets, and what is refused."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddaebm_jax.data import decoding, image_files, images, records
from ddaebm_jax.data.batches import Batches, order
from ddaebm_jax.errors import InputError

FEW = settings(max_examples=25, deadline=None)


def pixels(n, size=4, channels=3, seed=0):
    shape = (n, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def settings_of(name, **changes):
    """A config's data section."""
    defaults = {
        "path": "",
        "tfds": "",
        "tfds_dir": "",
        "split": "train",
        "test_split": "test",
        "limit": 0,
        "held_out_classes": (),
        "image_size": 8,
        "channels": 3,
        "crop": None,
        "skip_corrupt": False,
        "timeout": 600,
        "test_fraction": 0.25,
        "num_patches": 40,
    }
    return SimpleNamespace(name=name, **{**defaults, **changes})


# --- The order ------------------------------------------------------------------


@FEW
@given(st.integers(1, 40), st.integers(0, 2**64))
def test_every_epoch_is_a_permutation_of_the_records(num, seed):
    epochs = order(num, seed, 0, 3 * num).reshape(3, num)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num), (3, 1)))


@FEW
@given(st.integers(0, 1000))
def test_order_is_a_function_of_seed_and_epoch_and_differs_in_each(seed):
    def epochs(of):
        return order(60, of, 0, 240).reshape(4, 60)

    np.testing.assert_array_equal(epochs(seed), epochs(seed))
    np.testing.assert_array_equal(
        order(60, seed, 100, 130), order(60, seed, 0, 240)[100:130]
    )
    # No epoch of one seed is an epoch of the next either.
    seen = np.concatenate([epochs(seed), epochs(seed + 1)])
    assert len(np.unique(seen, axis=0)) == 8


@FEW
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 5))
def test_epochs_follow_one_another_without_a_gap(num, batch, length):
    stream = Batches(num, batch, 3, num_threads=0)
    delivered = np.concatenate([stream.next(length), stream.next(1)])
    assert delivered.dtype == np.int32
    expected = order(num, 3, 0, (length + 1) * batch).reshape(length + 1, batch)
    np.testing.assert_array_equal(delivered, expected)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_deliver_disjoint_parts_of_the_very_batch(count):
    data = pixels(50)
    whole = Batches(50, 8, 1, data).next(9)
    parts = [
        Batches(50, 8, 1, data, process_index=j, process_count=count).next(9)
        for j in range(count)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    places = [
        Batches(50, 8, 1, process_index=j, process_count=count).next(6)
        for j in range(count)
    ]
    assert len(np.unique(np.concatenate(places, axis=1))) == 48  # Within an epoch.


@FEW
@given(st.integers(0, 9), st.sampled_from([(0, 0), (1, 1), (3, 8)]), st.integers(1, 3))
def test_position_survives_json_whatever_was_read_ahead(before, threads, step):
    data = pixels(11)
    how = {"num_threads": threads[0], "prefetch": threads[1]}
    first = Batches(11, 4, 5, data, **how)
    for _ in range(before):
        first.next(step)
    state = json.dumps(first.state())
    assert json.loads(state)["batches"] == before * step
    second = Batches(11, 4, 5, data)
    second.next(2)
    second.restore(json.loads(state))
    expected = first.next(4)
    np.testing.assert_array_equal(second.next(4), expected)
    first.restore(json.loads(state))
    np.testing.assert_array_equal(first.next(4), expected)
    for stream in (first, second):
        stream.close()


def test_state_of_another_stream_is_refused():
    state = Batches(10, 4, 0).state()
    for other in (Batches(11, 4, 0), Batches(10, 2, 0), Batches(10, 4, 1)):
        with pytest.raises(InputError, match="the saved input position has"):
            other.restore(state)


def test_worker_processes_deliver_the_same_stream():
    data = pixels(11)
    stream = Batches(11, 4, 5, data, num_threads=1, prefetch=1, num_workers=1)
    expected = Batches(11, 4, 5, data).next(4)
    np.testing.assert_array_equal(stream.next(4), expected)
    stream.close()


class Damaged:
    """Records of which one cannot be read until it is mended."""

    whole = False

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 7 and not self.whole:
            raise InputError("7.png: cannot be decoded")
        return np.full((2, 2, 1), index, np.uint8)


@pytest.mark.parametrize("threads", [0, 2])
def test_error_of_a_reader_reaches_the_caller_and_the_stream_stays(threads):
    data = Damaged()
    stream = Batches(20, 5, 0, data, num_threads=threads)
    with pytest.raises(InputError, match=r"^7\.png: cannot be decoded"):
        stream.next(4)
    assert stream.state()["batches"] == 0
    data.whole = True
    assert sorted(stream.next(4)[..., 0, 0, 0].ravel()) == list(range(20))
    stream.close()


@pytest.mark.parametrize(
    "arguments,part",
    [
        ((0, 4, 0), "at least 1"),
        ((5, 4, 0, np.zeros((6, 2, 2, 1), np.uint8)), "6 records"),
        ((5, 0, 0), "data.batch_size is 0"),
        ((5, 6, 0, None, 0, 4), "data.batch_size is 6; .* 4 processes .* example 8"),
    ],
)
def test_impossible_batches_are_refused(arguments, part):
    with pytest.raises(InputError, match=part):
        Batches(*arguments)


# --- What a step draws ----------------------------------------------------------


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_floats_keep_every_level_and_lie_in_the_range():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = images.to_float(levels)
    assert floats.dtype == np.float32
    assert floats.min() == -1.0 and floats.max() == 1.0
    np.testing.assert_array_equal(images.to_uint8(floats), levels)
    beyond = np.array([-9.0, -1.001, 1.001, 9.0], np.float32)
    np.testing.assert_array_equal(images.to_uint8(beyond), [0, 0, 255, 255])


@pytest.mark.parametrize("flip", [False, True])
def test_input_from_host_and_device_gives_equal_bits(flip):
    data = pixels(30)
    host = Batches(30, 8, 2, data).next(3)
    index = Batches(30, 8, 2).next(3)
    draw = jax.jit(images.draw, static_argnames="flip")
    for step in range(3):
        fed = draw(None, host[step], keys(8, step), flip=flip)
        held = draw(data, index[step], keys(8, step), flip=flip)
        np.testing.assert_array_equal(fed, held)
        assert fed.dtype == np.float32


def test_flips_are_a_function_of_the_key_and_mirror_half():
    data = pixels(400)
    plain = np.asarray(images.draw(None, data, keys(400), False))
    drawn = np.asarray(images.draw(None, data, keys(400), True))
    mirrored = (drawn == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (drawn == plain).all(axis=(1, 2, 3))).all()
    assert 150 < mirrored.sum() < 250
    # Example i depends on key i, wherever it stands.
    some = np.arange(400)[::-3]
    again = images.draw(None, data[some], keys(400)[some], True)
    np.testing.assert_array_equal(again, drawn[some])


# --- Bringing an image to its shape ---------------------------------------------


def test_image_of_the_size_does_not_change():
    for channels, mode in ((3, "RGB"), (1, "L")):
        image = pixels(1, 8, channels)[0]
        pil = Image.fromarray(image if channels == 3 else image[..., 0])
        assert pil.mode == mode
        np.testing.assert_array_equal(images.prepare(pil, 8, channels), image)


def test_crop_and_centre_take_the_pixels_that_they_say():
    image = pixels(1, 20)[0]
    pil = Image.fromarray(image)
    box = images.prepare(pil, 8, 3, (3, 5, 11, 13))
    np.testing.assert_array_equal(box, image[5:13, 3:11])
    wide = images.prepare(Image.fromarray(image[:8]), 8, 3)
    np.testing.assert_array_equal(wide, image[:8, 6:14])
    tall = images.prepare(Image.fromarray(image[:, :8]), 8, 3)
    np.testing.assert_array_equal(tall, image[6:14, :8])


def test_resize_averages_and_keeps_a_constant():
    flat = np.full((30, 50, 3), 77, np.uint8)
    assert (images.prepare(Image.fromarray(flat), 8, 3) == 77).all()
    # A fine checkerboard becomes grey: the filter is antialiased.
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = images.prepare(Image.fromarray(board), 8, 1)
    assert abs(small.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_conversions_that_lose_nothing_are_made(mode):
    levels = Image.fromarray(pixels(1, 8, 1)[0, ..., 0]).convert(mode)
    expected = np.asarray(levels.convert("RGB"))
    np.testing.assert_array_equal(images.prepare(levels, 8, 3), expected)


@pytest.mark.parametrize(
    "mode,channels",
    [
        ("RGBA", 3),
        ("LA", 3),
        ("CMYK", 3),
        ("I;16", 3),
        ("I", 3),
        ("F", 3),
        ("YCbCr", 3),
        ("RGB", 1),
        ("P", 1),
        ("LA", 1),
        ("I;16", 1),
    ],
)
def test_conversions_that_lose_something_are_refused(mode, channels):
    with pytest.raises(InputError, match=rf"^a\.png: its mode is {mode}; allowed"):
        images.prepare(Image.new(mode, (8, 8)), 8, channels, name="a.png")


def test_transparent_colours_are_refused():
    image = Image.new("P", (8, 8))
    image.info["transparency"] = 0
    with pytest.raises(InputError, match="P with transparency"):
        images.prepare(image, 8, 3)


@pytest.mark.parametrize(
    "size,crop,part",
    [
        (9, None, "10×8 pixels; at least 9"),
        (4, (0, 0, 3, 8), "3×8 pixels once cropped; at least 4"),
        (4, (2, 0, 11, 8), r"data\.crop is \(2, 0, 11, 8\)"),
        (4, (-1, 0, 8, 8), "inside of the image"),
        (4, (5, 0, 5, 8), "inside of the image"),
    ],
)
def test_images_that_are_too_small_are_refused(size, crop, part):
    with pytest.raises(InputError, match=part):
        images.prepare(Image.new("RGB", (10, 8)), size, 3, crop)


# --- Folders --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Ten PNG files in two levels of folders, and files that are no images."""
    data = pixels(10, 8)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for i, image in enumerate(data):
        place = tmp_path / ("deep/er" if i > 6 else "") / f"{i}.png"
        Image.fromarray(image).save(place)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".4.png").write_text("hidden")
    (tmp_path / ".hidden" / "5.png").write_text("hidden")
    return tmp_path, data


def test_folder_is_read_in_the_order_of_names(folder):
    path, data = folder
    found, names = images.read_images(path, (8, 8, 3))
    assert names == (
        *(f"{i}.png" for i in range(7)),
        *(f"deep/er/{i}.png" for i in (7, 8, 9)),
    )
    np.testing.assert_array_equal(found, data)


def test_suffixes_in_capitals_and_jpeg_are_read(tmp_path):
    Image.new("RGB", (9, 8), (200, 10, 30)).save(tmp_path / "a.JPG", "JPEG")
    Image.new("L", (8, 8), 9).save(tmp_path / "b.Jpeg", "JPEG")
    found, names = images.read_images(tmp_path, (8, 8, 3))
    assert names == ("a.JPG", "b.Jpeg")
    assert abs(found[0].astype(int) - [200, 10, 30]).max() < 4 and (found[1] == 9).all()


def test_exif_orientation_is_honoured(tmp_path):
    image = pixels(1, 8)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the picture is to be turned by 270°.
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    found, _ = images.read_images(tmp_path, (8, 8, 3))
    np.testing.assert_array_equal(found[0], np.rot90(image, 3))


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_is_split_without_overlap_by_the_seed(folder, monkeypatch, in_memory):
    path, data = folder
    if not in_memory:
        monkeypatch.setattr(image_files, "MAX_BYTES", 100)

    def opened(seed, **changes):
        return images.open_images(
            settings_of("folder", path=str(path), **changes), seed
        )

    first, again, other = opened(0), opened(0), opened(1)
    assert first.event_shape == (8, 8, 3)
    train, test = images.stack(first.train), images.stack(first.test)
    assert (len(train), len(test)) == (8, 2)
    both = np.concatenate([train, test])
    assert len(np.unique(both, axis=0)) == 10
    assert {i.tobytes() for i in both} == {i.tobytes() for i in data}
    np.testing.assert_array_equal(train, images.stack(again.train))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    few = opened(0, limit=3)
    np.testing.assert_array_equal(images.stack(few.train), train[:3])
    assert few.metadata() == {
        "fingerprint": few.fingerprint(),
        "num_train": 3,
        "num_test": 2,
        "skipped": 0,
    }
    assert few.fingerprint() != first.fingerprint()
    copy = pickle.loads(pickle.dumps(first.train))
    np.testing.assert_array_equal(images.stack(copy, 2), train[:2])


def test_fingerprint_sees_every_pixel_and_name(folder):
    path, data = folder
    data_settings = settings_of("folder", path=str(path))
    before = images.open_images(data_settings, 0).fingerprint()
    changed = data[3].copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(path / "3.png")
    after = images.open_images(data_settings, 0).fingerprint()
    (path / "3.png").rename(path / "3a.png")
    assert len({before, after, images.open_images(data_settings, 0).fingerprint()}) == 3


def spoil(path):
    """Makes three files of no use: one cut short, one no image, one transparent."""
    content = (path / "1.png").read_bytes()
    (path / "1.png").write_bytes(content[: len(content) // 2])
    (path / "4.png").write_text("not an image")
    Image.new("RGBA", (8, 8)).save(path / "deep" / "er" / "7.png")
    return ["1.png", "4.png", "deep/er/7.png"]


def test_files_of_no_use_are_counted_and_named(folder):
    path, _ = folder
    bad = spoil(path)
    with pytest.raises(InputError) as caught:
        images.open_images(settings_of("folder", path=str(path)), 0)
    message = str(caught.value)
    assert message.startswith(f"{path}: 3 of 10 images are of no use: ")
    assert ", ".join(bad) in message and "data.skip_corrupt" in message
    assert "\n" not in message


def test_long_lists_of_names_are_cut(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for i in range(1, 8):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(InputError, match=r"7 of 8 .*5\.png and 2 more; the first: 1"):
        images.read_images(tmp_path, (8, 8, 3))


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_of_no_use_can_be_left_out(folder, monkeypatch, in_memory):
    path, data = folder
    if not in_memory:
        monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    bad = spoil(path)
    warnings = []
    monkeypatch.setattr(
        image_files.logging,
        "warning",
        lambda text, *values: warnings.append(text % values),
    )
    opened = images.open_images(
        settings_of("folder", path=str(path), skip_corrupt=True), 0
    )
    assert opened.skipped == opened.metadata()["skipped"] == 3
    assert all(any(name in line for line in warnings) for name in bad)
    both = np.concatenate([images.stack(opened.train), images.stack(opened.test)])
    kept = np.delete(data, [1, 4, 7], axis=0)
    assert {i.tobytes() for i in both} == {i.tobytes() for i in kept}
    if in_memory:
        found, names = images.read_images(path, (8, 8, 3), skip_corrupt=True)
        assert len(names) == 7 and not set(names) & set(bad)
        np.testing.assert_array_equal(found, kept)


def test_file_that_goes_bad_later_is_named(folder, monkeypatch):
    path, _ = folder
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    opened = images.open_images(settings_of("folder", path=str(path)), 0)
    spoil(path)
    stream = Batches(len(opened.train), 4, 0, opened.train)
    with pytest.raises(InputError, match=r"\.png"):
        stream.next(2)


def refused(path, *parts, event_shape=(8, 8, 3), **options):
    with pytest.raises((InputError, FileNotFoundError)) as caught:
        images.read_images(path, event_shape, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_folders_of_no_use_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no image in this folder", ".png, .jpg, .jpeg")
    refused(tmp_path / "missing", "no such folder")
    file = tmp_path / "a.png"
    file.write_text("x")
    refused(file, "not a folder")
    refused(tmp_path, "1 of 1 images", "that is all", "a.png", skip_corrupt=True)
    with pytest.raises(InputError, match=r"data\.path is empty"):
        images.open_images(settings_of("folder"), 0)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        images.open_images(settings_of("folder", path=str(tmp_path / "none")), 0)


def png(width, height, depth=8, colour=2, rows=b""):
    """A PNG file that says what it is and holds `rows`."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side,part", [(9_000, "at most 67108864"), (60_000, "a.png")])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, side, part):
    (tmp_path / "a.png").write_bytes(png(side, side))
    refused(tmp_path, "a.png", part)


def test_sixteen_bits_are_refused(tmp_path):
    row = b"\0" + bytes(8 * 6)
    (tmp_path / "a.png").write_bytes(png(8, 8, depth=16, rows=row * 8))
    assert Image.open(tmp_path / "a.png").mode == "RGB"  # PIL would not tell.
    refused(tmp_path, "a.png: 16 bits a channel; 8 are allowed")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_file_gives_an_image_or_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    kind = data.draw(st.sampled_from(["PNG", "JPEG"]))
    Image.fromarray(pixels(1, 8)[0]).save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        image = decoding.decode_file(path, "a.png", 8, 3, None)
    except InputError as error:
        assert str(error).startswith("a.png: ") and "\n" not in str(error)
    else:
        assert image.shape == (8, 8, 3)


# --- NPZ files ------------------------------------------------------------------


def test_npz_images_are_read(tmp_path):
    data = pixels(5, 8)
    np.savez(tmp_path / "a.npz", x=data, other=pixels(2, 3))
    np.savez_compressed(tmp_path / "b.npz", pictures=data, labels=np.arange(5))
    for name in ("a.npz", "b.npz"):
        found, names = images.read_images(tmp_path / name, (8, 8, 3))
        np.testing.assert_array_equal(found, data)
        assert names == ("0", "1", "2", "3", "4")
    np.savez(tmp_path / "c.npz", x=data[..., 0])
    found, _ = images.read_images(tmp_path / "c.npz", (8, 8, 1))
    np.testing.assert_array_equal(found[..., 0], data[..., 0])


@pytest.mark.parametrize(
    "arrays,parts",
    [
        ({"x": np.zeros((2, 8, 8, 3), np.float32)}, ["float32", "uint8", "127.5"]),
        ({"x": np.zeros((2, 8, 8, 3), np.int64)}, ["int64", "not of uint8"]),
        ({"x": np.zeros((2, 8, 8, 1), np.uint8)}, ["n×8×8×3 is needed"]),
        ({"x": np.zeros((2, 8, 8), np.uint8)}, ["'x' (2×8×8", "n×8×8×3"]),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, ["is empty"]),
        ({"a": np.eye(2)}, ["0 4-D arrays", "'a' (2×2"]),
        ({"a": pixels(1), "b": pixels(1)}, ["2 4-D arrays"]),
        ({"x": np.full((1, 8, 8, 3), None)}, ["object arrays are refused"]),
    ],
)
def test_unusable_npz_is_refused(tmp_path, arrays, parts):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", *parts)


def test_what_is_no_npz_is_refused(tmp_path, monkeypatch):
    refused(tmp_path / "none.npz", "no such file")
    (tmp_path / "a.npz").write_text("hello")
    refused(tmp_path / "a.npz", "not a zip archive", "savez")
    file = io.BytesIO()
    header = {"shape": (2**40, 8, 8, 3), "fortran_order": False, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", file.getvalue())
    refused(tmp_path / "b.npz", "the file holds 0 of it")
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    np.savez(tmp_path / "c.npz", x=pixels(1, 8))
    refused(tmp_path / "c.npz", "at most 100")


# --- Sets -----------------------------------------------------------------------


def digits(seed=0, **changes):
    return images.open_images(settings_of("digits", channels=1, **changes), seed)


def test_digits_are_split_evenly_by_class():
    opened = digits()
    train, test = images.stack(opened.train), images.stack(opened.test)
    assert opened.event_shape == train.shape[1:] == (8, 8, 1)
    assert len(train) + len(test) == 1797
    assert train.min() == 0 and train.max() == 255
    for label in range(10):
        kept = (opened.train_labels == label).sum()
        held_out = (opened.test_labels == label).sum()
        assert abs(held_out / (kept + held_out) - 0.25) < 0.01
    assert opened.fingerprint() == digits().fingerprint() != digits(1).fingerprint()
    few = digits(limit=7)
    np.testing.assert_array_equal(few.train_labels, opened.train_labels[:7])


def test_photos_keep_the_held_out_strip_apart():
    from sklearn import datasets

    opened = images.open_images(settings_of("photos", num_patches=60), 3)
    assert opened.event_shape == (8, 8, 3)
    assert (len(opened.train), len(opened.test)) == (45, 15)
    photos = datasets.load_sample_images().images
    windows = [
        np.lib.stride_tricks.sliding_window_view(photo, (8, 8, 3))[:, :, 0]
        for photo in photos
    ]

    def columns(part, photo):
        """The left edges at which the part's patches are found in the photograph."""
        found = []
        for patch in images.stack(part)[photo::2]:
            near = np.argwhere((windows[photo][..., 0, 0, :] == patch[0, 0]).all(-1))
            place = [p for p in near if (windows[photo][tuple(p)] == patch).all()]
            assert place
            found.append(place[0][1])
        return np.array(found)

    for photo in (0, 1):  # Patches alternate between the photographs.
        assert (columns(opened.train, photo) + 8 <= 480).all()
        assert (columns(opened.test, photo) >= 480).all()
    again = images.open_images(settings_of("photos", num_patches=60), 3)
    np.testing.assert_array_equal(images.stack(again.train), images.stack(opened.train))
    other = images.open_images(settings_of("photos", num_patches=60), 4)
    assert opened.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    "name,changes,part",
    [
        ("digit", {}, "data.name is 'digit'; allowed: digits, photos, folder, tfds"),
        ("digits", {"channels": 2}, "data.channels is 2; allowed: 1"),
        ("digits", {"channels": 3}, "data.channels = 1"),
        ("digits", {"channels": 1, "image_size": 16}, "data.image_size is 16"),
        ("digits", {"channels": 1, "test_fraction": 1.0}, "test_fraction is 1.0"),
        ("photos", {"channels": 1}, "data.channels = 3"),
        ("photos", {"num_patches": 1}, "data.num_patches: .* of 1 images"),
        ("photos", {"image_size": 161}, "leave room for 160"),
        ("tfds", {}, "data.tfds is empty"),
    ],
)
def test_impossible_sets_are_refused(name, changes, part):
    with pytest.raises(InputError, match=part):
        images.open_images(settings_of(name, **changes), 0)


@FEW
@given(st.integers(0, 30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_held_out_part_is_disjoint_and_covers_all(num, share, seed):
    if not 1 <= round(num * share) < num:
        with pytest.raises(InputError, match="test_fraction"):
            records.hold_out(num, share, seed, "these")
        return
    split = records.hold_out(num, share, seed, "these")
    assert len(split.test) == round(num * share)
    assert sorted([*split.train, *split.test]) == list(range(num))


def test_stack_reads_all_in_order_and_tells_of_damage():
    data = pixels(300, 2)
    np.testing.assert_array_equal(images.stack(data), data)
    np.testing.assert_array_equal(images.stack(data, 5, "pictures"), data[:5])
    with pytest.raises(InputError, match=r"7\.png"):
        images.stack(Damaged())
    with pytest.raises(InputError, match="none to load"):
        images.stack(data[:0])
