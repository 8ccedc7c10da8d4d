"""Sets of images of one shape: how they are held, split and loaded whole.

Images are uint8 and channels-last wherever they are on the host.
"""

import dataclasses
import hashlib
import itertools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Integer, UInt8

from ddaebm_jax.data.threads import TIMEOUT, in_parallel
from ddaebm_jax.errors import InputError

# Share of the records that may be skipped while reading, and the least number of
# records of which that share is taken. More is no accident.
_MAX_UNUSABLE = 0.01
_MIN_COUNTED = 1_000


class UnusableRecord(InputError):
    """A record that is damaged or does not fit, whoever reads it and whenever."""


@runtime_checkable
class Records(Protocol):
    """Images that can be read in any order, by several threads; an array is one.

    All can be pickled, so that grain's worker processes can read them too.
    """

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns one image, uint8 [height, width, channels].

        Raises InputError, which names the file or the record, if it cannot be read.
        """


class Subset:
    """The records at `indices` of another source, without a copy."""

    def __init__(self, whole: Records, indices: Integer[np.ndarray, " n"]) -> None:
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._whole[int(self._indices[index])]


class SkipUnusable:
    """Records of which each unusable one is replaced by the next usable one.

    The replacement depends on the records alone, so it is the same in all processes,
    threads and runs. Each process warns once of each record that it skips. Errors of
    the file system are no fault of a record, and are raised.
    """

    def __init__(self, whole: Records, name: str) -> None:
        self._whole = whole
        self._name = name
        self._limit = int(max(len(whole), _MIN_COUNTED) * _MAX_UNUSABLE)
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> np.ndarray:
        for place in itertools.chain(range(index, len(self)), range(index)):
            if place in self._skipped:
                continue
            try:
                return self._whole[place]
            except UnusableRecord as error:
                self._skip(place, error)
        raise InputError(f"{self._name}: none of the {len(self)} records is usable")

    def _skip(self, place: int, error: UnusableRecord) -> None:
        self._skipped.add(place)
        count = len(self._skipped)
        if count > self._limit:
            raise InputError(
                f"{self._name}: {count} of {len(self)} records are unusable, more than "
                f"the {self._limit} that data.skip_corrupt skips (1% of them, or of "
                f"{_MIN_COUNTED}); the last: {error}"
            )
        logging.warning(
            f"{self._name}: skipped, and the next taken: {error} ({count} so far, at "
            f"most {self._limit})"
        )


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images, split.

    Attributes:
      name: as in the config.
      event_shape: height, width and channels of every image.
      train: images to train on.
      test: images that training does not see.
      fingerprint: SHA-256 of the images and their split; for a TFDS set of its name,
        version, splits and a few records, for others of all pixels.
      train_labels: the class of each training image; None where there are none.
      test_labels: of each test image.
      skipped: number of unusable files that were skipped.
      left_out: images of `data.held_out_classes`.
    """

    name: str
    event_shape: tuple[int, int, int]
    train: Records
    test: Records
    fingerprint: str
    train_labels: Integer[np.ndarray, " n"] | None = None
    test_labels: Integer[np.ndarray, " m"] | None = None
    skipped: int = 0
    left_out: Records | None = None

    def metadata(self) -> dict[str, Any]:
        """Returns what must travel with a checkpoint, as plain JSON values."""
        return {
            "fingerprint": self.fingerprint,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "skipped": self.skipped,
        }


class Split(NamedTuple):
    """Indices, ascending, of the records for training and of those held out."""

    train: Integer[np.ndarray, " n"]
    test: Integer[np.ndarray, " m"]


def split_set(
    name: str,
    records: Records,
    event_shape: tuple[int, int, int],
    split: Split,
    content: str,
    labels: Integer[np.ndarray, " n"] | None = None,
    skipped: int = 0,
) -> ImageSet:
    """Returns a set split from one source, whose images' SHA-256 is `content`."""
    return ImageSet(
        name=name,
        event_shape=event_shape,
        train=Subset(records, split.train),
        test=Subset(records, split.test),
        fingerprint=digest(content.encode(), split.train, split.test),
        train_labels=None if labels is None else labels[split.train],
        test_labels=None if labels is None else labels[split.test],
        skipped=skipped,
    )


def check_fraction(test_fraction: float) -> None:
    """Raises InputError for a `data.test_fraction` that is not between 0 and 1."""
    if not 0.0 < test_fraction < 1.0:
        raise InputError(
            f"data.test_fraction is {test_fraction}; a number between 0 and 1 is "
            "needed, for example 0.1"
        )


def hold_out(
    num: int, test_fraction: float, seed: int, what: str, min_train: int = 1
) -> Split:
    """Holds out a random share of `num` records; a pure function of its arguments.

    Raises InputError, in which `what` names the records, for a fraction out of range
    or one that holds out none or leaves fewer than `min_train`.
    """
    check_fraction(test_fraction)
    num_test = round(num * test_fraction)
    if num_test < 1 or num - num_test < min_train:
        raise InputError(
            f"{what}: data.test_fraction {test_fraction} of {num} holds out {num_test} "
            f"and leaves {num - num_test} to train on; at least 1 and {min_train} are "
            "needed; give more data or another fraction"
        )
    order = np.random.default_rng(seed).permutation(num)
    return Split(np.sort(order[num_test:]), np.sort(order[:num_test]))


def digest(*parts: bytes | np.ndarray) -> str:
    """Returns the SHA-256 of bytes and arrays, one after another."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            result.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part)
        result.update(part)
    return result.hexdigest()


def stack(
    records: Records,
    limit: int | None = None,
    progress_name: str = "",
    timeout: int | float = TIMEOUT,
) -> UInt8[np.ndarray, "n height width channels"]:
    """Loads records into one array, by several threads.

    Args:
      records: all of one shape.
      limit: the first so many only; None: all.
      progress_name: as in `in_parallel`.
      timeout: as in `in_parallel`.

    Raises:
      InputError: if there is no record, or one cannot be read.
    """
    num = len(records) if limit is None else min(limit, len(records))
    if num < 1:
        raise InputError(f"{progress_name or 'images'}: there is none to load")
    images = np.empty((num, *records[0].shape), np.uint8)

    def load(index: int) -> None:
        images[index] = records[index]

    in_parallel(load, num, progress_name, timeout)
    return images
