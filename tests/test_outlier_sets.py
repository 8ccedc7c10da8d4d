"""Sets of outliers: made from the inliers, drawn, read from files and from TFDS."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import datasets

from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import outlier_sets

COLOUR, GREY = (16, 16, 3), (8, 8, 1)
DATA = SimpleNamespace(crop=None, skip_corrupt=False, tfds="", tfds_dir="", timeout=60)


def drawn(event_shape, num=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, *event_shape), np.uint8)


def opened(name, event_shape=COLOUR, num=6, seed=0, limit=0, **data):
    settings = SimpleNamespace(**{**vars(DATA), **data})
    return outlier_sets.open_outliers(
        str(name), drawn(event_shape, num), event_shape, settings, seed, limit
    )


# Built-in sets.


@pytest.mark.parametrize("event_shape", [COLOUR, GREY])
@pytest.mark.parametrize("name", outlier_sets.BUILT_IN)
def test_built_in_sets_have_the_models_shape_and_repeat(name, event_shape):
    found = opened(name, event_shape)
    num = 1797 if name == "digits" else 6
    assert (found.dtype, found.shape) == (np.uint8, (num, *event_shape))
    np.testing.assert_array_equal(opened(name, event_shape), found)
    np.testing.assert_array_equal(opened(name, event_shape, limit=2), found[:2])
    other = opened(name, event_shape, seed=1)
    assert (other != found).any() == (name in ("shuffled", "noise", "photos"))


def test_inverted_twice_is_the_inliers():
    inliers = drawn(GREY)
    found = opened("inverted", GREY)
    assert (found.astype(int) + inliers == 255).all()


@settings(max_examples=5)
@given(st.integers(0, 10), st.sampled_from([COLOUR, GREY]))
def test_shuffled_moves_whole_pixels_each_image_in_its_own_way(seed, event_shape):
    inliers = drawn(event_shape)
    inliers[1] = inliers[0]
    found = outlier_sets.open_outliers("shuffled", inliers, event_shape, DATA, seed, 0)

    def pixels(image):
        return sorted(map(tuple, image.reshape(-1, event_shape[2]).tolist()))

    for before, after in zip(inliers, found, strict=True):
        assert pixels(after) == pixels(before)
        assert (after != before).any()
    assert (found[0] != found[1]).any()
    fewer = outlier_sets.open_outliers(
        "shuffled", inliers[:3], event_shape, DATA, seed, 0
    )
    np.testing.assert_array_equal(fewer, found[:3])


def test_noise_is_uniform():
    counts = np.bincount(opened("noise", num=200).ravel(), minlength=256)
    expected = counts.sum() / 256
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()


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


def test_photos_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="leave room for 320"):
        opened("photos", (512, 512, 3), 2)


def test_digits_are_scikit_learns_and_alike_in_all_channels():
    raw = datasets.load_digits().images
    np.testing.assert_array_equal(
        opened("digits", GREY)[..., 0], np.round(raw * (255 / 16))
    )
    large = opened("digits")
    assert (large == large[..., :1]).all()
    means = large[..., 0].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    assert np.corrcoef(means.ravel(), raw.ravel())[0, 1] > 0.97


# Files.


def test_folder_is_read_and_cropped_like_the_models_images(tmp_path):
    pictures = drawn((20, 20, 3), 3)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(opened(tmp_path), opened(f"{tmp_path}/"))
    cropped = opened(tmp_path, crop=(1, 3, 17, 19))
    np.testing.assert_array_equal(cropped, pictures[:, 3:19, 1:17])
    np.testing.assert_array_equal(
        opened(tmp_path, crop=[1, 3, 17, 19], limit=2),
        cropped[outlier_sets.some(len(cropped), 2, 0)],
    )


def test_files_of_no_use_are_left_out_only_if_the_config_says_so(tmp_path):
    Image.fromarray(drawn(COLOUR, 1)[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 2 images are unusable"):
        opened(tmp_path)
    assert len(opened(tmp_path, skip_corrupt=True)) == 1


def test_npz_is_read(tmp_path):
    pictures = drawn(GREY, 4, seed=3)
    np.savez(tmp_path / "x.npz", x=pictures)
    found = opened(tmp_path / "x.npz", GREY)
    np.testing.assert_array_equal(found, pictures)
    assert len(opened(tmp_path / "x.npz", GREY, limit=3)) == 3
    with pytest.raises(InputError, match="not of the model's shape"):
        opened(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "no.npz", "no/where/"])
def test_paths_that_are_not_there_are_named(name):
    with pytest.raises(FileNotFoundError, match="no such"):
        opened(name)


# TFDS.


def pictures_of(shape, split):
    return drawn(shape, {"train": 5, "test": 4}[split], seed=len(split))


def tiny_set(tfds, name, version, shape):
    """A builder of a few records under a name that TFDS knows already."""

    def info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=shape)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def examples(self, split):
        for i, image in enumerate(pictures_of(shape, split)):
            yield i, {"image": image}

    members = {
        "VERSION": tfds.core.Version(version),
        "_info": info,
        "_split_generators": generators,
        "_generate_examples": examples,
        "__module__": __name__,
        "name": name,
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), members)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a set of colours and a grey one."""
    tfds = pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("tfds")
    for known in (
        ("svhn_cropped", "3.1.0", (32, 32, 3)),
        ("mnist", "3.0.1", (28, 28, 1)),
    ):
        builder = tiny_set(tfds, *known)(data_dir=directory, file_format="array_record")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    return str(directory)


def as_set(images):
    return {image.tobytes() for image in images}


def test_tfds_set_gives_its_test_split_or_the_named_one(prepared):
    shape = (32, 32, 3)

    def read(name, **changes):
        return opened(name, shape, tfds_dir=prepared, **changes)

    test = read("svhn_cropped")
    assert as_set(test) == as_set(pictures_of(shape, "test"))
    np.testing.assert_array_equal(read("svhn_cropped:test"), test)
    np.testing.assert_array_equal(
        read("svhn_cropped", limit=3), test[outlier_sets.some(len(test), 3, 0)]
    )
    train = read("svhn_cropped:train")
    assert as_set(train) == as_set(pictures_of(shape, "train"))
    np.testing.assert_array_equal(read("svhn_cropped:train[1:3]"), train[1:3])
    np.testing.assert_array_equal(read("svhn_cropped:3.1.0:train[:2]"), train[:2])
    np.testing.assert_array_equal(read("svhn_cropped:3.1.0"), test)


def test_tfds_images_are_brought_to_the_models_shape(prepared):
    found = opened("svhn_cropped", tfds_dir=prepared)
    whole = opened("svhn_cropped", (32, 32, 3), tfds_dir=prepared)
    assert found.shape == (4, *COLOUR)
    means = whole.mean(axis=(1, 2)), found.mean(axis=(1, 2))
    np.testing.assert_allclose(*means, atol=6)
    grey = opened("mnist", tfds_dir=prepared)
    assert grey.shape == (4, *COLOUR)
    assert (grey == grey[..., :1]).all()
    assert opened("mnist", GREY, tfds_dir=prepared).shape == (4, *GREY)


def test_crop_is_for_the_configs_own_set_only(prepared):
    crop, shape = (2, 4, 18, 20), (32, 32, 3)
    own = {"tfds_dir": prepared, "crop": crop, "tfds": "svhn_cropped"}
    whole = opened("svhn_cropped", shape, tfds_dir=prepared)
    np.testing.assert_array_equal(opened("svhn_cropped", **own), whole[:, 4:20, 2:18])
    np.testing.assert_array_equal(
        opened("svhn_cropped", **{**own, "tfds": "celeb_a"}),
        opened("svhn_cropped", tfds_dir=prepared),
    )


@pytest.mark.parametrize(
    "name,event_shape,part",
    [
        ("svhn_cropped", GREY, "images have 3 channels, and data.channels is 1"),
        ("svhn_cropped", (64, 64, 3), "at least 64 a side are needed"),
        ("svhn_cropped:nope", COLOUR, "split 'nope' cannot be opened"),
        ("svhn_croped", COLOUR, r"none of inverted, .*close: svhn_cropped"),
        ("invert", COLOUR, r"there is no set 'invert'; did you mean 'inverted'"),
        ("shufled:test", COLOUR, "close: shuffled.*TFDS"),
        ("", COLOUR, "'' is no path"),
        (":test", COLOUR, "':test' is no path"),
    ],
)
def test_names_of_no_use_are_refused(prepared, name, event_shape, part):
    with pytest.raises(InputError, match=part) as caught:
        opened(name, event_shape, tfds_dir=prepared)
    assert "\n" not in str(caught.value)


def test_sets_too_large_for_memory_are_refused(prepared, monkeypatch):
    monkeypatch.setattr(outlier_sets.image_files, "MAX_BYTES", 3 * 16 * 16 * 3)
    with pytest.raises(InputError, match=r"svhn_cropped:test\[:10000\]"):
        opened("svhn_cropped", tfds_dir=prepared)
    assert len(opened("svhn_cropped", tfds_dir=prepared, limit=3)) == 3
