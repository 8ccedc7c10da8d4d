"""Image sets of TensorFlow Datasets, read at random places from ArrayRecord files.

Reading a prepared folder needs neither TensorFlow nor a network; preparing it does.
"""

import dataclasses
import difflib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from ddaebm_jax.data import records
from ddaebm_jax.data.decoding import Crop, prepare
from ddaebm_jax.errors import InputError, listed, one_line
from ddaebm_jax.paths import user_path

_FORMAT = "array_record"
_RETRIES = 3  # TFDS would go on for three minutes without a network.
# Records of a split that its fingerprint reads.
_FINGERPRINTED = 16


class _TfdsImages:
    """The images of a split; when unpickled, it opens the files anew."""

    def __init__(
        self, folder: str, split: str, size: int, channels: int, crop: Crop | None
    ) -> None:
        self._folder = folder
        self._split = split
        self._how = (size, channels, crop)
        self._source = _open_source(folder, split)

    def __reduce__(self) -> tuple:
        return _TfdsImages, (self._folder, self._split, *self._how)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        name = f"{self._folder}: record {index} of '{self._split}'"
        with records.reading(name, "remove the folder and prepare the set again"):
            pixels = self._source[index]["image"]
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            return prepare(image, *self._how, name)


def load_tfds(data: Any, seed: int) -> records.ImageSet:
    """Loads the set that a config's `data` section names; prepares it if needed.

    `data.test_split` is held out, or, if that is empty, a share of `data.split` chosen
    by the seed. With `data.skip_corrupt` unusable records do not keep the set from
    being opened; reading them is still refused. Raises InputError if there is no such
    set or split, it cannot be prepared, or its images cannot be used.
    """
    builder = _prepared(data.tfds, data.tfds_dir, data.channels)
    folder = os.fspath(builder.data_dir)
    crop = None if data.crop is None else tuple(data.crop)
    event_shape = (data.image_size, data.image_size, data.channels)

    train = _TfdsImages(folder, data.split, *event_shape[1:], crop)
    readable = records.SkipUnusable(train, folder) if data.skip_corrupt else train
    how = repr((builder.info.full_name, data.split, len(train), event_shape, crop))
    # A set prepared again may have another order; to read all would take too long.
    places = np.linspace(0, len(train) - 1, _FINGERPRINTED).round().astype(int)
    some = np.stack([readable[int(place)] for place in places])
    content = records.digest(how.encode(), some)
    if data.test_split:
        test = _TfdsImages(folder, data.test_split, *event_shape[1:], crop)
        _check_apart(folder, data.split, data.test_split)
        part = repr((data.test_split, len(test)))
        fingerprint = records.digest(content.encode(), part.encode())
        images = records.ImageSet("tfds", event_shape, train, test, fingerprint)
    else:
        share, name = data.test_fraction, f"data.tfds = '{data.tfds}': records"
        held_out = records.hold_out(len(train), share, seed, name)
        images = records.split_set("tfds", train, event_shape, held_out, content)
    if not 0 < data.limit < len(images.train):
        return images
    return dataclasses.replace(
        images,
        train=records.Subset(images.train, np.arange(data.limit)),
        fingerprint=records.digest(images.fingerprint.encode(), np.array(data.limit)),
    )


def open_split(
    name: str,
    tfds_dir: str,
    split: str,
    image_size: int,
    channels: int,
    crop: Crop | None,
    skip_corrupt: bool = False,
) -> records.Records:
    """Opens the images of one split of a TFDS set; otherwise as `load_tfds`."""
    folder = os.fspath(_prepared(name, tfds_dir, channels).data_dir)
    images = _TfdsImages(folder, split, image_size, channels, crop)
    return records.SkipUnusable(images, folder) if skip_corrupt else images


def _check_apart(folder: str, split: str, test_split: str) -> None:
    """Refuses splits that share records: what is held out must not be trained on."""
    import tensorflow_datasets as tfds

    splits = tfds.builder_from_directory(folder).info.splits
    train, test = (
        {
            (one.splitname, place)
            for one in tfds.core.ReadInstruction.from_spec(part).to_absolute(splits)
            for place in range(splits[one.splitname].num_examples)[one.from_ : one.to]
        }
        for part in (split, test_split)
    )
    if train & test:
        raise InputError(
            f"data.split '{split}' and data.test_split '{test_split}' share records; "
            "hold out another part, for example train[:90%] and train[90%:], or '' for "
            "a share of data.split"
        )


def _open_source(folder: str, split: str) -> Any:
    """Opens a split of a prepared folder; reads no TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise InputError(
            f"{folder}: prepared as {builder.info.file_format.value}, which cannot be "
            "read at random places; convert it with tfds convert_format "
            f"--out_file_format={_FORMAT}, or give another data.tfds_dir to prepare it "
            "anew"
        ) from error
    except Exception as error:  # TFDS and array_record raise many kinds.
        raise InputError(
            f"{folder}: the split '{split}' cannot be opened ({one_line(error)}); the "
            f"set has {', '.join(builder.info.splits)}: correct data.split or "
            "data.test_split, or prepare the set again"
        ) from error


def _prepared(name: str, tfds_dir: str, channels: int) -> Any:
    """Returns the builder of a set of such images, prepared if it was not yet."""
    import tensorflow_datasets as tfds

    # Without a home directory TFDS would make a folder `~`.
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    directory = user_path(tfds_dir or default, "data.tfds_dir")
    try:
        builder = tfds.builder(name, data_dir=directory if tfds_dir else None)
    except Exception as error:  # A bad name, config, version or folder: of many kinds.
        bare = name.partition("/")[0].partition(":")[0]
        close = difflib.get_close_matches(bare, set(tfds.list_builders()), 4)
        raise InputError(
            f"data.tfds is '{name}', which TFDS cannot open ({one_line(error, 100)}); "
            f"close: {listed(close)}; give builder or builder/config, for example "
            "lsun/church_outdoor; see tensorflow.org/datasets/catalog"
        ) from error
    features = builder.info.features
    image = features["image"] if "image" in features else None
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise InputError(
            f"data.tfds = '{name}' has no feature 'image' of uint8; it has "
            f"{listed(features)}; choose a set of images"
        )
    if image.shape[-1] not in (1, channels):
        raise InputError(
            f"data.tfds = '{name}': its images have {image.shape[-1]} channels, and "
            f"data.channels is {channels}; set data.channels, or choose another set"
        )
    if not builder.is_prepared():
        _prepare(builder, name)
    return builder


# --- Preparing ------------------------------------------------------------------


def import_tensorflow() -> None:
    """Imports TensorFlow, and hides from it the devices on which JAX trains.

    Where it is already in use, as in a notebook, it keeps what it has.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # Or it logs at import.
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        try:
            tf.config.set_visible_devices([], kind)
        except RuntimeError as error:
            logging.info("TensorFlow keeps its devices (%s)", one_line(error))


def _prepare(builder: Any, name: str) -> None:
    """Downloads a set and writes it as ArrayRecord files, under its name once whole."""
    logging.info(
        "data.tfds = '%s' is not in %s: downloading it (%s) and preparing it once",
        name,
        builder.data_dir,
        builder.info.download_size or "unknown size",
    )
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    command = f" (or: tfds build {builder.name}{config} --file_format={_FORMAT})"
    if builder.name == "lsun":
        builder._generate_examples, command = _lsun_examples, ""
    try:
        import_tensorflow()
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader

        downloader.MAX_RETRIES = _RETRIES
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format=_FORMAT,
        )
    except Exception as error:  # Network, disk, checksums, packages, ….
        raise InputError(
            f"data.tfds = '{name}' is not in {builder.data_dir} and cannot be prepared "
            f"({one_line(error)}); pip install 'ddaebm_jax[tf,lsun]' if a package is "
            f"missing, or run this config{command} on a machine with a network, copy "
            "the folder that it prepares, and set data.tfds_dir to where that lies"
        ) from error


def _lsun_examples(
    extracted_dir: os.PathLike | str, file_path: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields LSUN's records as TFDS does by tensorflow-io, which TensorFlow outgrew."""
    import lmdb

    folder = Path(os.fspath(extracted_dir)) / file_path
    with (
        lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as database,
        database.begin() as transaction,
    ):
        for index, (key, image) in enumerate(transaction.cursor()):
            yield index, {"id": key.decode(), "image": io.BytesIO(image)}
