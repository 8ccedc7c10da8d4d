"""TFDS sets: read as prepared, without TensorFlow, and refused when they cannot be."""

import errno
import io
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from cli import ROOT, environment
from PIL import Image

from ddaebm_jax.data import images, tfds_images
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")

NUM_TRAIN, NUM_TEST = 20, 8


def opened(directory, seed=0, **changes):
    """The set that a config's data section names."""
    defaults = {
        "name": "tfds",
        "tfds": "cifar10",
        "tfds_dir": str(directory),
        "split": "train",
        "test_split": "test",
        "limit": 0,
        "image_size": 32,
        "channels": 3,
        "crop": None,
        "skip_corrupt": False,
        "test_fraction": 0.25,
    }
    return images.open_images(SimpleNamespace(**{**defaults, **changes}), seed)


def pictures(split):
    """The pictures of a split, lossless: PNG is CIFAR-10's encoding in TFDS."""
    num = {"train": NUM_TRAIN, "test": NUM_TEST}[split]
    rng = np.random.default_rng(num)
    return rng.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)


# TFDS knows this name already; the test's builder stays out of its register.
with tfds.core.registered.skip_registration():

    class Cifar10(tfds.core.GeneratorBasedBuilder):
        """A few records with CIFAR-10's name and features."""

        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                split: self._generate_examples(split) for split in ("train", "test")
            }

        def _generate_examples(self, split):
            for i, image in enumerate(pictures(split)):
                yield i, {"id": f"{split}_{i}", "image": image, "label": i % 10}


def write(directory, file_format, kind=Cifar10):
    builder = kind(data_dir=directory, file_format=file_format)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that TFDS prepared in ArrayRecord format."""
    return write(tmp_path_factory.mktemp("tfds"), "array_record")


class Turned(Cifar10, skip_registration=True):
    """The same records in another order."""

    name = "cifar10"

    def _generate_examples(self, split):
        found = list(super()._generate_examples(split))
        for i, (_, record) in enumerate(reversed(found)):
            yield i, record


def as_set(stack):
    return {image.tobytes() for image in stack}


def test_prepared_set_is_read_bit_for_bit_and_its_order_is_fingerprinted(
    prepared, tmp_path
):
    found = opened(prepared)
    turned = opened(write(tmp_path, "array_record", Turned))
    for images_of in (found, turned):
        assert images_of.event_shape == (32, 32, 3)
        assert as_set(images.stack(images_of.train)) == as_set(pictures("train"))
        assert as_set(images.stack(images_of.test)) == as_set(pictures("test"))
    assert turned.fingerprint != found.fingerprint


_READ = '''
import sys
from importlib.machinery import PathFinder
from types import SimpleNamespace
from ddaebm_jax.data import images


class Without(PathFinder):
    """A machine on which these are not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "importlib_resources"):
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [f for f in sys.meta_path if f is not PathFinder] + [Without]
data = SimpleNamespace(
    name="tfds", tfds="cifar10", tfds_dir=sys.argv[1], split="train",
    test_split="test", limit=0, image_size=32, channels=3, crop=None,
    test_fraction=0.1, held_out_classes=(), skip_corrupt=False,
)
print(images.stack(images.open_images(data, 0).train).shape)
'''


def test_reading_needs_no_tensorflow(prepared):
    result = subprocess.run(
        [sys.executable, "-c", _READ, str(prepared)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"({NUM_TRAIN}, 32, 32, 3)"


class Spoiled(list):
    """Records of which some cannot be read."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        if isinstance(record, Exception):
            raise record
        return record


@pytest.fixture
def spoil(monkeypatch):
    """Replaces records of the sets that are opened from then on by errors."""
    whole = tfds_images._open_source

    def replace(errors):
        def spoiled(folder, split):
            return Spoiled(errors.get(i, r) for i, r in enumerate(whole(folder, split)))

        monkeypatch.setattr(tfds_images, "_open_source", spoiled)

    return replace


def test_damaged_records_are_named_or_passed_over(prepared, spoil):
    whole = images.stack(opened(prepared).train)
    # The first is looked at when the set is opened, the second is not.
    spoil({0: ValueError("checksum\nfails"), 2: ValueError("checksum fails")})
    with pytest.raises(InputError, match=r"record 0 of 'train': .*checksum fails"):
        opened(prepared)
    found = opened(prepared, skip_corrupt=True)
    expected = whole[[1, 1, 3, *range(3, NUM_TRAIN)]]
    np.testing.assert_array_equal(images.stack(found.train), expected)
    stream = Batches(NUM_TRAIN, 4, 0, found.train, num_workers=0)
    index = Batches(NUM_TRAIN, 4, 0).next(9)
    np.testing.assert_array_equal(stream.next(9), expected[index])


def test_faults_of_the_file_system_are_not_passed_over(prepared, spoil):
    spoil({2: OSError(errno.EIO, "Input/output error")})
    found = opened(prepared, skip_corrupt=True)
    with pytest.raises(InputError, match=r"record 2 .* the file system works"):
        found.train[2]


def test_limit_takes_the_first_and_a_share_is_held_out(prepared, caplog):
    found = opened(prepared)
    whole = images.stack(found.train)
    with caplog.at_level("INFO", logger="absl"):
        few = opened(prepared, limit=5)
    assert f"'tfds': 5 images to train on, {NUM_TEST} held out" in caplog.text
    np.testing.assert_array_equal(images.stack(few.train), whole[:5])
    assert len(few.test) == NUM_TEST
    split, again, other = (opened(prepared, s, test_split="") for s in (0, 0, 1))
    both = np.concatenate([images.stack(split.train), images.stack(split.test)])
    assert len(split.test) == 5 and as_set(both) == as_set(whole)
    sliced = opened(prepared, split="train[:50%]", test_split="train[50%:]")
    assert (len(sliced.train), len(sliced.test)) == (10, 10)
    prints = {s.fingerprint for s in (found, few, split, again, other, sliced)}
    assert len(prints) == 5 and split.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    "changes,part",
    [
        ({"channels": 1}, "have 3 channels, and data.channels is 1; set data.channels"),
        ({"image_size": 33}, "record 0 of 'train': 32×32 pixels; at least 33"),
        ({"split": "nope"}, "split 'nope' cannot be opened .* has train, test"),
        ({"split": "train[:0]"}, "split 'train"),
        ({"test_split": "train"}, "share records"),
        ({"split": "train[:60%]", "test_split": "train[50%:]"}, "share records"),
        ({"split": "train+test[:1]"}, "share records"),
        ({"tfds": "cifar10/nope"}, "data.tfds is 'cifar10/nope', which TFDS cannot"),
        ({"tfds": "../up"}, "which TFDS cannot open"),
        ({"tfds": "cifr10"}, "'cifr10', .*close: cifar10, cifar100"),
        ({"tfds": "wikipedia"}, "has no feature 'image' of uint8; it has title"),
    ],
)
def test_unusable_sets_are_refused(prepared, changes, part):
    with pytest.raises(InputError, match=part) as caught:
        opened(prepared, **changes)
    assert "\n" not in str(caught.value)


def test_set_that_is_not_there_fails_soon_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("importlib_resources")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Where nobody answers.
    start = time.monotonic()
    for _ in range(2):  # A failure does not look like a prepared set.
        with pytest.raises(
            InputError, match=r"cannot be prepared .*tfds build cifar10"
        ):
            opened(tmp_path)
    assert time.monotonic() - start < 20
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_lsun_is_prepared_from_its_database(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    pytest.importorskip("importlib_resources")
    colours = {"train": [10, 90, 170, 250], "val": [50, 130]}
    for part, levels in colours.items():
        folder = tmp_path / part / f"church_outdoor_{part}_lmdb"
        folder.mkdir(parents=True)
        with (
            lmdb.open(str(folder), map_size=2**24) as base,
            base.begin(write=True) as t,
        ):
            for i, level in enumerate(levels):
                file = io.BytesIO()
                Image.new("RGB", (70, 64), (level,) * 3).save(file, "JPEG")
                t.put(f"{i:040x}".encode(), file.getvalue())
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: {part: str(tmp_path / part) for part in urls},
    )
    found = opened(
        tmp_path / "tfds", tfds="lsun/church_outdoor", test_split="validation", limit=3
    )
    assert (len(found.train), len(found.test)) == (3, 2)
    levels = images.stack(found.test).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(sorted(levels), colours["val"], atol=1)
