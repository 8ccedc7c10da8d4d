"""Image sets bundled with scikit-learn: digits, and patches of photographs."""

import dataclasses

import numpy as np
from jaxtyping import Integer, UInt8

from ddaebm_jax.data.records import (
    ImageSet,
    Split,
    check_fraction,
    digest,
    hold_out,
    split_set,
)
from ddaebm_jax.errors import InputError

_DIGIT_SIZE = 8
_DIGIT_WHITE = 16  # scikit-learn's digits hold 0 … 16.


def load_digits(
    image_size: int, channels: int, test_fraction: float, seed: int
) -> ImageSet:
    """Loads scikit-learn's 1,797 handwritten digits, 8×8, grey.

    The same share of every digit is held out. Raises InputError for another shape, or
    a fraction out of range.
    """
    _require("digits", "data.image_size", image_size, _DIGIT_SIZE)
    _require("digits", "data.channels", channels, 1)
    check_fraction(test_fraction)
    from sklearn import datasets

    raw = datasets.load_digits()
    images = np.round(raw.images * (255 / _DIGIT_WHITE)).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int64)
    # A digit's own seed: how many another has does not move its choice.
    parts = []
    for label in range(10):
        places = np.flatnonzero(labels == label)
        split = hold_out(len(places), test_fraction, seed + label, f"digits {label}")
        parts.append((places[split.train], places[split.test]))
    train, test = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return split_set(
        "digits",
        images,
        (_DIGIT_SIZE, _DIGIT_SIZE, 1),
        Split(train, test),
        digest(images, labels),
        labels,
    )


def _require(name: str, field: str, found: int, needed: int) -> None:
    if found != needed:
        raise InputError(
            f"{field} is {found}; the images of data.name = '{name}' have {needed}; "
            f"set {field} = {needed}"
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
    lie in a strip at the right side that no training patch touches; the strip's share
    of the width, and theirs of `num_patches`, is `test_fraction`. Raises InputError
    for another number of channels, or patches that do not fit.
    """
    _require("photos", "data.channels", channels, 3)
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
