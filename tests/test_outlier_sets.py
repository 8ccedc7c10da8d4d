"""Sets of outliers: made from the inliers, drawn, read from files and from TFDS."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from ddaebm_jax.data import Source, images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import outlier_sets

COLOUR, GREY = (16, 16, 3), (8, 8, 1)
DATA = SimpleNamespace(crop=None, skip_corrupt=False, tfds="", tfds_dir="")


def drawn(event_shape, num=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, *event_shape), np.uint8)


def source_of(event_shape, **image_set):
    return Source("made", event_shape, None, None, **image_set)


def opened(name, event_shape=COLOUR, num=6, seed=0, limit=0, **data):
    settings = SimpleNamespace(**(vars(DATA) | data))
    inliers = drawn(event_shape, num)
    return outlier_sets.open_set(
        str(name), source_of(event_shape), settings, inliers, seed, limit
    )


def test_own_images_are_held_out_ones_and_left_out_classes():
    test, left_out = drawn(GREY, 5, seed=1), drawn(GREY, 4, seed=2)

    def own(name, limit=0, **image_set):
        found = images.ImageSet("made", GREY, test[:1], test, "", **image_set)
        source = source_of(GREY, image_set=found)
        return outlier_sets.open_set(name, source, DATA, None, 0, limit)

    np.testing.assert_array_equal(own(outlier_sets.HELD_OUT), test)
    some = own(outlier_sets.HELD_OUT, limit=3)
    np.testing.assert_array_equal(some, test[outlier_sets.choose(5, 3, 0)])
    name = outlier_sets.HELD_OUT_CLASSES
    np.testing.assert_array_equal(own(name, left_out=left_out), left_out)
    with pytest.raises(InputError, match="left no class out"):
        own(name)


@pytest.mark.parametrize("event_shape", [COLOUR, GREY])
@pytest.mark.parametrize("name", outlier_sets.BUILT_IN)
def test_built_in_sets_have_the_models_shape_and_repeat(name, event_shape):
    found = opened(name, event_shape)
    num = 1797 if name == "digits" else 6
    assert (found.dtype, found.shape) == (np.uint8, (num, *event_shape))
    np.testing.assert_array_equal(opened(name, event_shape), found)
    np.testing.assert_array_equal(opened(name, event_shape, limit=2), found[:2])
    source = source_of(event_shape)
    if name not in outlier_sets.DERIVED:  # Also as inliers.
        alone = outlier_sets.open_set(name, source, DATA, None, 0, 6)
        np.testing.assert_array_equal(alone, found[:6])
    if name == "inverted":
        assert (found.astype(int) + drawn(event_shape) == 255).all()
    other = opened(name, event_shape, seed=1)
    assert (other != found).any() == (name in ("shuffled", "noise", "photos"))


@pytest.mark.parametrize("event_shape", [COLOUR, GREY])
def test_shuffled_moves_whole_pixels_each_image_in_its_own_way(event_shape):
    found, inliers = opened("shuffled", event_shape), drawn(event_shape)
    orders = []
    for before, after in zip(inliers, found, strict=True):
        old, new = (x.reshape(-1, event_shape[2]).tolist() for x in (before, after))
        assert sorted(old) == sorted(new) and old != new
        orders.append([old.index(pixel) for pixel in new])
    assert orders[0] != orders[1]
    np.testing.assert_array_equal(opened("shuffled", event_shape, num=3), found[:3])


@pytest.mark.parametrize("num", [1, 9])
def test_photos_are_patches_of_the_photographs(num):
    photos = np.stack(datasets.load_sample_images().images)
    size = COLOUR[0]
    windows = np.lib.stride_tricks.sliding_window_view(photos, (size, size), (1, 2))
    corners = photos[:, : windows.shape[1], : windows.shape[2]]
    colour, grey = opened("photos", num=num), opened("photos", (16, 16, 1), num)
    assert len(colour) == len(grey) == num
    for patch, of_grey in zip(colour, grey, strict=True):
        places = np.argwhere((corners == patch[0, 0]).all(axis=3))
        found = (windows[tuple(place)].transpose(1, 2, 0) for place in places)
        assert any((window == patch).all() for window in found)
        pillows = np.asarray(Image.fromarray(patch).convert("L"), int)
        assert abs(pillows - of_grey[..., 0]).max() <= 1


def test_digits_are_scikit_learns_and_alike_in_all_channels():
    raw = datasets.load_digits().images
    small, large = opened("digits", GREY), opened("digits")
    np.testing.assert_array_equal(small[..., 0], np.round(raw * (255 / 16)))
    assert (large == large[..., :1]).all()
    means = large[..., 0].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    assert np.corrcoef(means.ravel(), raw.ravel())[0, 1] > 0.97


def test_files_are_read_and_cropped_as_in_scoring(tmp_path):
    pictures = drawn((20, 20, 3), 3)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(opened(tmp_path), opened(f"{tmp_path}/"))
    crop = (1, 3, 17, 19)
    cropped = opened(tmp_path, crop=crop)
    np.testing.assert_array_equal(cropped, pictures[:, 3:19, 1:17])
    two = cropped[outlier_sets.choose(3, 2, 0)]
    np.testing.assert_array_equal(opened(tmp_path, crop=crop, limit=2), two)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 4 images are"):
        opened(tmp_path)
    assert len(opened(tmp_path, skip_corrupt=True)) == 3
    np.savez(tmp_path / "x.npz", x=drawn(GREY, 4))
    np.testing.assert_array_equal(opened(tmp_path / "x.npz", GREY), drawn(GREY, 4))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "no.npz", "no/where/"])
def test_paths_that_are_not_there_are_named(name):
    with pytest.raises(FileNotFoundError, match="no such"):
        opened(name)


@pytest.fixture
def asked(monkeypatch):
    """What is asked of TFDS: set, split and crop; it answers with 5 images."""
    calls = []

    def open_split(name, directory, split, size, channels, crop, skip_corrupt):
        if not name.startswith("svhn"):
            raise InputError(f"no data set '{name}'")
        calls.append((name, split, crop))
        return drawn((size, size, channels), 5)

    monkeypatch.setattr(outlier_sets.tfds_images, "open_split", open_split)
    return calls


@pytest.mark.parametrize(
    ("name", "found", "split"),
    [
        ("svhn_cropped", "svhn_cropped", "test"),
        ("svhn_cropped:train[1:3]", "svhn_cropped", "train[1:3]"),
        ("svhn_cropped:3.1.0", "svhn_cropped:3.1.0", "test"),
        ("svhn_cropped:3.1.0:train", "svhn_cropped:3.1.0", "train"),
        ("svhn/config", "svhn/config", "test"),
    ],
)
def test_tfds_set_gives_its_test_split_or_the_named_one(asked, name, found, split):
    """Cropped as the config says if it is the config's own set."""
    crop = (2, 4, 18, 20)
    images = opened(name, crop=crop, tfds="celeb_a")
    np.testing.assert_array_equal(images, drawn(COLOUR, 5))
    some = opened(name, crop=crop, tfds=found, limit=3)
    np.testing.assert_array_equal(some, images[outlier_sets.choose(5, 3, 0)])
    assert asked == [(found, split, None), (found, split, crop)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mnist", r"none of inverted, .*taken for a set of TFDS: no data set 'mnist'"),
        ("invert", r"there is no set 'invert'; did you mean 'inverted'"),
        ("", "'' is no path"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_names_of_no_use_are_refused(name, part):
    with pytest.raises(InputError, match=part) as caught:
        opened(name)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("asked")
def test_sets_too_large_for_memory_are_refused(monkeypatch):
    monkeypatch.setattr(outlier_sets.image_files, "MAX_BYTES", 3 * 16 * 16 * 3)
    with pytest.raises(InputError, match=r"svhn_cropped:test\[:10000\]"):
        opened("svhn_cropped")
    assert len(opened("svhn_cropped", limit=3)) == 3
