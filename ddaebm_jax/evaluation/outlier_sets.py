"""Sets of images for outlier detection: derived, generated, read from files or TFDS."""

import difflib
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from ddaebm_jax.data import Source, image_files, image_sets, tfds_images
from ddaebm_jax.data.records import Subset, stack
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import scores
from ddaebm_jax.paths import user_path

# The run's own held-out images, and the images of the classes it never saw.
HELD_OUT, HELD_OUT_CLASSES = "test", "held_out_classes"
# Made from the inliers.
DERIVED = ("inverted", "shuffled")
BUILT_IN = (*DERIVED, "noise", "photos", "digits")

# Images that are made where there are no inliers to count.
_DEFAULT_NUM = 10_000
# Patches of the photographs have the most room with a half.
_TEST_FRACTION = 0.5
# ITU-R BT.601's weights of red, green and blue in grey, as Pillow's.
_LUMA = np.array([0.299, 0.587, 0.114])

# A TFDS set, perhaps with its version, then perhaps a split: "mnist:3.0.1:train[:9]".
_SET_AND_SPLIT = re.compile(r"(?P<set>[^:]+(:[\d.*]+)?)(:(?P<split>.+))?")

Images = UInt8[np.ndarray, "n height width channels"]


def open_set(
    name: str,
    source: Source,
    data: Any,
    inliers: UInt8[np.ndarray, "n height width channels"] | None,
    seed: int,
    limit: int,
) -> UInt8[np.ndarray, "m height width channels"]:
    """Returns the images that a name stands for, of the model's shape.

    - `test`: the run's own held-out images, but those that scores are fitted to
      (`scores.unseen_places`). `held_out_classes`: those of the classes that were left
      out of it.
    - `inverted`: 255 − x of each inlier.
    - `shuffled`: each inlier's pixels in a random order of its own, by (seed, i); the
      channels of a pixel stay together.
    - `noise`: uniform random bytes, as many images as inliers.
    - `photos`: patches of scikit-learn's two photographs at random places, as many as
      inliers; grey for a model of one channel.
    - `digits`: scikit-learn's 1,797 digits, enlarged (bilinear), and the same in all
      channels.
    - A folder, or an NPZ file: as `image_files.read_images`, cropped as the config
      says, as in `--mode=score`.
    - Else a set of TFDS, prepared if needed, of which the split `test` or the one
      behind a colon is taken: `svhn_cropped:train[:10%]`. The config's crop is for
      the config's own set. Grey images are repeated for a model of colours.

    Names are looked for in this order. `data` is the config's section; `inliers` is
    None where the set to open is that of the inliers. At most `limit` images are
    taken (0: all), those that are read at random by the seed.

    Raises:
      FileNotFoundError: if a path is not there.
      InputError: if nothing has this name, or what has it cannot be used.
    """
    if name in (HELD_OUT, HELD_OUT_CLASSES):
        records = source.image_set.test
        if name == HELD_OUT_CLASSES:
            records = source.image_set.left_out
        if records is None:
            raise InputError(
                f"{HELD_OUT_CLASSES}: this run left no class out; train one with "
                "--config.data.held_out_classes='(9,)'"
            )
        places = np.arange(len(records))
        if name == HELD_OUT:
            places = scores.unseen_places(len(records))
        chosen = Subset(records, places[choose(len(places), limit, seed)])
        return stack(chosen)
    if name in BUILT_IN:
        num = (limit or _DEFAULT_NUM) if inliers is None else len(inliers)
        makers = {
            "inverted": lambda: 255 - inliers,
            "shuffled": lambda: _shuffled(inliers, seed),
            "noise": lambda: np.random.default_rng(seed).integers(
                0, 256, (num, *source.event_shape), np.uint8
            ),
            "photos": lambda: _photos(num, source.event_shape, seed),
            "digits": lambda: _digits(source.event_shape),
        }
        images = makers[name]()
        return images[: limit or len(images)]
    if is_path(name):
        images, _ = image_files.read_images(
            user_path(name, "--out"), source.event_shape, data.skip_corrupt, data.crop
        )
        return images[choose(len(images), limit, seed)]
    return _read_tfds(name, source.event_shape, data, seed, limit)


def choose(num: int, limit: int, seed: int) -> Integer[np.ndarray, " n"]:
    """Returns which of `num` images are taken, ascending; limit 0: all."""
    order = np.random.default_rng(seed).permutation(num)
    return np.sort(order[: limit or num])


def _shuffled(images: Images, seed: int) -> Images:
    number, height, width, channels = images.shape
    pixels = images.reshape(number, height * width, channels)
    rngs = (np.random.default_rng((seed, i)) for i in range(number))
    moved = [rng.permutation(image) for rng, image in zip(rngs, pixels, strict=True)]
    return np.stack(moved).reshape(images.shape)


def _photos(num: int, event_shape: tuple[int, int, int], seed: int) -> Images:
    size, _, channels = event_shape
    # A split needs at least one patch in either part.
    photos = image_sets.load_photos(size, 3, max(num, 2), _TEST_FRACTION, seed)
    patches = np.concatenate([stack(photos.train), stack(photos.test)])[:num]
    if channels == 1:
        return np.round(patches @ _LUMA).astype(np.uint8)[..., None]
    return patches


def _digits(event_shape: tuple[int, int, int]) -> Images:
    from PIL import Image
    from sklearn import datasets

    height, width, channels = event_shape
    raw = datasets.load_digits().images
    levels = np.round(raw * (255 / raw.max())).astype(np.uint8)
    enlarged = [
        Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        for image in levels
    ]
    return np.stack(enlarged)[..., None].repeat(channels, axis=3)


def is_path(name: str) -> bool:
    """Returns whether a name is a file's or a folder's, there or not.

    A TFDS set may have a slash in its name, but neither begins nor ends so.
    """
    written_as_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".npz"))
    written_as_path |= ":/" in name  # A URL.
    return written_as_path or (name != "" and Path(name).exists())


def _read_tfds(
    name: str, event_shape: tuple[int, int, int], data: Any, seed: int, limit: int
) -> Images:
    size, _, channels = event_shape
    typed = difflib.get_close_matches(name, BUILT_IN, 1, 0.8)
    if typed:
        raise InputError(f"there is no set '{name}'; did you mean '{typed[0]}'?")
    match = _SET_AND_SPLIT.fullmatch(name)
    found, split = (match["set"], match["split"] or "test") if match else (name, "test")
    crop = data.crop if found == data.tfds else None
    try:
        records = tfds_images.open_split(
            found, data.tfds_dir, split, size, channels, crop, data.skip_corrupt
        )
    except InputError as error:
        raise InputError(
            f"'{name}' is no path and none of {', '.join(BUILT_IN)}; taken for a set "
            f"of TFDS: {error}"
        ) from error
    chosen = choose(len(records), limit, seed)
    num_bytes = len(chosen) * size * size * channels
    if num_bytes > image_files.MAX_BYTES:
        raise InputError(
            f"'{name}': {len(chosen)} images take {num_bytes} bytes; at most "
            f"{image_files.MAX_BYTES} are allowed; take a part, for example "
            f"{found}:{split.partition('[')[0]}[:10000]"
        )
    return stack(Subset(records, chosen))
