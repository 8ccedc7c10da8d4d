"""Sets of images of one shape: how they are held, split and loaded whole.

Images are uint8 and channels-last wherever they are on the host.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Integer, UInt8

from ddaebm_jax import progress
from ddaebm_jax.errors import InputError, one_line

# Share of the records that may be skipped while reading, and the least such limit.
_MAX_UNUSABLE, _MIN_LIMIT = 0.01, 10
# Threads of `in_parallel`, and the most indices that a thread takes at once.
_NUM_THREADS, _CHUNK = 8, 64

_Result = TypeVar("_Result")


class UnusableRecord(InputError):
    """A record that is damaged or does not fit."""


@contextlib.contextmanager
def reading(name: str, remedy: str) -> Iterator[None]:
    """Turns errors into an UnusableRecord, or InputError if the file system fails."""
    try:
        yield
    except UnusableRecord:
        raise
    except InputError as error:
        raise UnusableRecord(str(error)) from error
    except Exception as error:  # Damaged bytes show themselves in many kinds.
        # Pillow's own OSErrors have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"{name}: cannot be read ({one_line(error)}); check that it is there "
                "and the file system works, and start again"
            ) from error
        raise UnusableRecord(
            f"{name}: cannot be decoded ({one_line(error)}); {remedy}"
        ) from error


@runtime_checkable
class Records(Protocol):
    """Images that threads can read in any order; picklable, for worker processes."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns one image, uint8 [height, width, channels]; else InputError."""


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

    So the replacement is the same in all processes, threads and runs.
    """

    def __init__(self, whole: Records, name: str) -> None:
        self._whole = whole
        self._name = name
        self._limit = max(int(len(whole) * _MAX_UNUSABLE), _MIN_LIMIT)
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
                self._skipped.add(place)
                count = f"{len(self._skipped)} of {len(self)} records are unusable"
                if len(self._skipped) > self._limit:
                    raise InputError(
                        f"{self._name}: {count}, more than the {self._limit} that "
                        f"data.skip_corrupt skips; the last: {error}"
                    ) from error
                logging.warning(f"{self._name}: {error}; the next is taken ({count})")
        raise InputError(f"{self._name}: none of the {len(self)} records is usable")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images, split.

    The fingerprint is a SHA-256 of the images and their split; for a TFDS set of its
    name, version, splits and a few records, for others of all pixels.
    """

    name: str  # As in the config.
    event_shape: tuple[int, int, int]  # Height, width and channels of every image.
    train: Records
    test: Records
    fingerprint: str
    train_labels: Integer[np.ndarray, " n"] | None = None
    test_labels: Integer[np.ndarray, " m"] | None = None
    skipped: int = 0  # Number of unusable files.
    left_out: Records | None = None  # Images of `data.held_out_classes`.

    def metadata(self) -> dict[str, Any]:
        """Returns what must travel with a checkpoint, as plain JSON values."""
        return {
            "fingerprint": self.fingerprint,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "skipped": self.skipped,
        }


class Split(NamedTuple):
    """Ascending indices of the records for training and of those held out."""

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


def hold_out(
    num: int, test_fraction: float, seed: int, what: str, min_train: int = 1
) -> Split:
    """Holds out a random share of `num` records; a pure function of its arguments.

    Raises InputError, which calls the records `what`, if too few are on either side.
    """
    num_test = round(num * test_fraction) if 0.0 < test_fraction < 1.0 else 0
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


def in_parallel(function: Callable[[int], _Result], num: int) -> list[_Result]:
    """Returns function(0), …, function(num − 1), each of an image, by several threads.

    The first exception stops it.
    """
    size = max(1, min(_CHUNK, num // _NUM_THREADS))

    def work(start: int) -> list[_Result]:
        return [function(i) for i in range(start, min(start + size, num))]

    results: list[_Result] = []
    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        with progress.loop_bar(num, "image", "reading or writing") as bar:
            for found in pool.map(work, range(0, num, size)):
                results += found
                bar.update(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def stack(records: Records) -> UInt8[np.ndarray, "n height width channels"]:
    """Loads records of one shape, of which there must be one, into an array."""
    images = np.empty((len(records), *records[0].shape), np.uint8)

    def load(index: int) -> None:
        images[index] = records[index]

    in_parallel(load, len(records))
    return images
