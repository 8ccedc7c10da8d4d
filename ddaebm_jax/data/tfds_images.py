"""Image sets of TensorFlow Datasets, read at random places from ArrayRecord files.

Reading a prepared set needs neither TensorFlow nor a network; preparing one needs
both, once. Everything is opened through the prepared folder, so that a set that was
prepared elsewhere is as good as one prepared here.
"""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddaebm_jax.data.decoding import Crop, prepare
from ddaebm_jax.data.records import (
    ImageSet,
    Records,
    UnusableRecord,
    WithoutUnusable,
    digest,
    hold_out,
    one_line,
    split_set,
)
from ddaebm_jax.errors import InputError

_FORMAT = "array_record"
# TFDS would go on for three minutes where there is no network.
_RETRIES = 3
# Records of a split that its fingerprint reads.
_FINGERPRINTED = 16


class _TfdsImages:
    """The images of a split; can be pickled: each process opens the files itself."""

    def __init__(
        self, folder: str, split: str, size: int, channels: int, crop: Crop | None
    ) -> None:
        self._folder = folder
        self._split = split
        self._how = (size, channels, crop)
        self._source = _open_source(folder, split)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._source = _open_source(self._folder, self._split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        name = f"{self._folder}: record {index} of '{self._split}'"
        # A damaged file shows itself in many kinds of errors.
        try:
            pixels = self._source[index]["image"]
        except Exception as error:
            fault = f"{name}: cannot be read ({one_line(error)})"
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(
                    f"{fault}; check that the folder is there and the file system "
                    "works, and start again"
                ) from error
            raise UnusableRecord(
                f"{fault}; remove the folder and prepare the set again"
            ) from error
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return prepare(image, *self._how, name)


def load_tfds(
    name: str,
    tfds_dir: str,
    split: str,
    test_split: str,
    image_size: int,
    channels: int,
    crop: Crop | None,
    test_fraction: float,
    seed: int,
    skip_corrupt: bool = False,
) -> ImageSet:
    """Loads the `image` feature of a TFDS set; downloads and prepares it if needed.

    Args:
      name: of the builder, as TFDS writes it: `cifar10`, `lsun/church_outdoor`.
      tfds_dir: where TFDS keeps its sets; empty: TFDS's own default.
      split: to train on, as TFDS writes it: `train`, `train[:90%]`.
      test_split: that is held out; empty: a part of `split`.
      image_size: as in `decoding.prepare`.
      channels: as in `decoding.prepare`.
      crop: as in `decoding.prepare`.
      test_fraction: share of `split` that is held out if `test_split` is empty.
      seed: of that choice.
      skip_corrupt: do without records of no use; reading them is still refused, see
        `records.WithoutUnusable`.

    Raises:
      InputError: if there is no such set or split, it cannot be prepared, or its
        images cannot be used; the message says what to do.
    """
    if not name:
        raise InputError(
            "data.tfds is empty; data.name = 'tfds' needs the name of a TFDS set, for "
            "example cifar10"
        )
    builder = _prepared(name, tfds_dir, channels)
    folder = os.fspath(builder.data_dir)
    if test_split:
        _check_apart(folder, split, test_split)

    def images(part: str) -> _TfdsImages:
        return _open_images(folder, part, image_size, channels, crop, skip_corrupt)

    event_shape = (image_size, image_size, channels)
    train = images(split)
    how = repr((builder.info.full_name, split, len(train), event_shape, crop))
    some = WithoutUnusable(train, folder) if skip_corrupt else train
    content = digest(how.encode(), _some_pixels(some))
    if not test_split:
        held_out = hold_out(len(train), test_fraction, seed, f"data.tfds = '{name}'")
        return split_set("tfds", train, event_shape, held_out, content)
    test = images(test_split)
    return ImageSet(
        name="tfds",
        event_shape=event_shape,
        train=train,
        test=test,
        content=digest(content.encode(), repr((test_split, len(test))).encode()),
    )


def open_split(
    name: str,
    tfds_dir: str,
    split: str,
    image_size: int,
    channels: int,
    crop: Crop | None,
    skip_corrupt: bool = False,
) -> Records:
    """Opens the images of one split of a TFDS set; prepares the set if needed.

    Args:
      name: as in `load_tfds`.
      tfds_dir: as in `load_tfds`.
      split: as TFDS writes it.
      image_size: as in `decoding.prepare`.
      channels: as in `decoding.prepare`.
      crop: as in `decoding.prepare`.
      skip_corrupt: put the next usable record in the place of one of no use.

    Raises:
      InputError: as `load_tfds`.
    """
    builder = _prepared(name, tfds_dir, channels)
    folder = os.fspath(builder.data_dir)
    records = _open_images(folder, split, image_size, channels, crop, skip_corrupt)
    return WithoutUnusable(records, folder) if skip_corrupt else records


def _prepared(name: str, tfds_dir: str, channels: int) -> Any:
    """Finds a set of images, and prepares it if it is not yet."""
    builder = _builder(name, tfds_dir)
    _check_feature(builder, name, channels)
    if not builder.is_prepared():
        _prepare(builder, name)
    return builder


def _open_images(
    folder: str,
    split: str,
    size: int,
    channels: int,
    crop: Crop | None,
    skip_corrupt: bool,
) -> _TfdsImages:
    records = _TfdsImages(folder, split, size, channels, crop)
    # What cannot be prepared shows itself before training.
    (WithoutUnusable(records, folder) if skip_corrupt else records)[0]
    return records


def _some_pixels(records: Records) -> np.ndarray:
    """Reads a few records from all over a split.

    A set prepared again may hold the same images in another order, which would give
    a resumed run other batches; reading all of them would take too long.
    """
    places = np.linspace(0, len(records) - 1, _FINGERPRINTED).round().astype(int)
    return np.stack([records[int(place)] for place in places])


def _check_apart(folder: str, split: str, test_split: str) -> None:
    """Refuses splits that share records: what is held out must not be trained on."""
    tfds = _tfds()
    splits = tfds.builder_from_directory(folder).info.splits

    def ranges(part: str) -> list[tuple[str, int, int]]:
        try:
            instructions = tfds.core.ReadInstruction.from_spec(part).to_absolute(splits)
        except Exception as error:  # TFDS raises several kinds for a bad split.
            raise _bad_split(folder, part, splits, error) from error
        return [
            (one.splitname, one.from_ or 0, splits[one.splitname].num_examples)
            if one.to is None
            else (one.splitname, one.from_ or 0, one.to)
            for one in instructions
        ]

    for name, start, stop in ranges(split):
        for other, other_start, other_stop in ranges(test_split):
            if name == other and max(start, other_start) < min(stop, other_stop):
                raise InputError(
                    f"data.split '{split}' and data.test_split '{test_split}' share "
                    "records; what is held out must be another part, for example "
                    "train[:90%] and train[90%:], or '' for a share of data.split"
                )


def _bad_split(folder: str, split: str, splits: Any, error: Exception) -> InputError:
    return InputError(
        f"{folder}: the split '{split}' cannot be opened ({one_line(error)}); the set "
        f"has {', '.join(splits)}: correct data.split or data.test_split, or prepare "
        "the set again"
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"data.name = 'tfds' needs TensorFlow Datasets ({error}); install it with "
            "pip install tensorflow-datasets"
        ) from error
    return tensorflow_datasets


def _builder(name: str, tfds_dir: str) -> Any:
    """Finds a set by name, among TFDS's own and among the prepared folders."""
    tfds = _tfds()
    directory = os.path.expanduser(tfds_dir) if tfds_dir else None
    try:
        return tfds.builder(name, data_dir=directory)
    except tfds.core.registered.DatasetNotFoundError as error:
        bare = name.partition("/")[0].partition(":")[0]
        close = difflib.get_close_matches(bare, tfds.list_builders(), 4)
        raise InputError(
            f"data.tfds is '{name}'; TFDS knows no such set"
            + (f"; close: {', '.join(close)}" if close else "")
            + "; see https://www.tensorflow.org/datasets/catalog"
        ) from error
    except Exception as error:  # A bad config, version or folder: of many kinds.
        raise InputError(
            f"data.tfds is '{name}', which TFDS cannot open ({one_line(error)}); give "
            "builder/config, for example lsun/church_outdoor"
        ) from error


def _open_source(folder: str, split: str) -> Any:
    """Opens a split of a prepared folder; reads no TensorFlow."""
    builder = _tfds().builder_from_directory(folder)
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise InputError(
            f"{folder}: prepared as {builder.info.file_format.value}, which cannot be "
            "read at random places; convert it with tfds convert_format "
            f"--out_file_format={_FORMAT}, or give another data.tfds_dir to prepare it "
            "anew"
        ) from error
    except Exception as error:  # TFDS and array_record raise many kinds.
        raise _bad_split(folder, split, builder.info.splits, error) from error
    return source


def _check_feature(builder: Any, name: str, channels: int) -> None:
    """Refuses a set whose records hold no image of this kind."""
    features = builder.info.features
    image = features["image"] if "image" in features else None
    if not isinstance(image, _tfds().features.Image):
        raise InputError(
            f"data.tfds = '{name}' has no feature 'image'; it has "
            f"{', '.join(list(features)[:12])}; choose a set of images"
        )
    if image.np_dtype != np.uint8:
        raise InputError(
            f"data.tfds = '{name}': its images are {np.dtype(image.np_dtype)}; uint8 "
            "is needed; choose another set"
        )
    found = image.shape[-1]
    if found not in (1, channels):
        remedy = f"set data.channels = {found}, or " if found == 3 else ""
        raise InputError(
            f"data.tfds = '{name}': its images have {found} channels, and "
            f"data.channels is {channels}; {remedy}choose another set"
        )


# --- Preparing ------------------------------------------------------------------


def _prepare(builder: Any, name: str) -> None:
    """Downloads a set and writes it as ArrayRecord files.

    TFDS writes under another name and renames at the end: a set that failed half-way
    is not taken for a prepared one.
    """
    size = builder.info.download_size or "unknown size"
    logging.info(
        "data.tfds = '%s' is not in %s: downloading it (%s) and preparing it once",
        name,
        builder.data_dir,
        size,
    )
    if builder.name == "lsun":
        builder._generate_examples = _lsun_examples
    try:
        _hide_accelerators()
        with _few_retries():
            builder.download_and_prepare(
                download_config=_tfds().download.DownloadConfig(try_download_gcs=False),
                file_format=_FORMAT,
            )
    except ModuleNotFoundError as error:
        raise InputError(
            f"preparing data.tfds = '{name}' needs the Python package {error.name}; "
            f"install it, or {_elsewhere(builder)}"
        ) from error
    except Exception as error:  # Network, disk, checksums, manual downloads, ….
        raise InputError(
            f"data.tfds = '{name}' is not in {builder.data_dir} and cannot be prepared "
            f"({one_line(error)}); {_elsewhere(builder)}"
        ) from error


def _elsewhere(builder: Any) -> str:
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    command = f" (or: tfds build {builder.name}{config} --file_format={_FORMAT})"
    return (
        "run this config"
        + command * (builder.name != "lsun")  # Which TFDS itself cannot, see below.
        + " on a machine with a network, copy the folder that it prepares, and set "
        "data.tfds_dir to where that lies"
    )


def _hide_accelerators() -> None:
    """Keeps TensorFlow off the GPU or TPU on which JAX trains."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or it logs at import
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Makes TFDS give up soon where there is no network."""
    from tensorflow_datasets.core.download import downloader

    before = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = min(before, _RETRIES)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


def _lsun_examples(
    extracted_dir: os.PathLike | str, file_path: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields LSUN's records from its LMDB file, as TFDS's builder does.

    TFDS reads it with tensorflow-io, which has no release for TensorFlow ≥ 2.17.
    """
    import lmdb

    folder = Path(os.fspath(extracted_dir)) / file_path
    with (
        lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as database,
        database.begin() as transaction,
    ):
        for index, (key, image) in enumerate(transaction.cursor()):
            yield index, {"id": key.decode(), "image": io.BytesIO(image)}
