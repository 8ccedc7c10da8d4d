"""Sets of images of one shape: how they are held, split and loaded whole.

Images are uint8 and channels-last wherever they are on the host.
"""

import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Integer, UInt8

from ddaebm_jax.data import threads
from ddaebm_jax.errors import InputError

# Threads that decode images. Decoders spend their time outside Python's lock.
DECODE_THREADS = 8
# Seconds between two lines of progress.
_REPORT_SECONDS = 10.0
# Records that a thread takes at once.
_CHUNK = 64
# Seconds without progress after which loading is given up.
STALL_SECONDS = 600
# Of the records that may be left out while reading: a share, and that of how many at
# least. More is no accident.
_MOST_UNUSABLE = 0.01
_LEAST_COUNTED = 1_000

_Result = TypeVar("_Result")


class UnusableRecord(InputError):
    """A record that is damaged or does not fit, whoever reads it and whenever."""


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns an error as one short line, to be part of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}{'…' * (len(text) > most)}"


@runtime_checkable
class Records(Protocol):
    """Images that can be read in any order, by several threads.

    An array of images is one. All can be pickled, so that grain's worker processes
    can read them too.
    """

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns one image, uint8 [height, width, channels].

        Raises:
          InputError: if it cannot be read; the message names the file or the record.
        """


class Subset:
    """Some of the records of another source, in an order of its own; no copy."""

    def __init__(self, whole: Records, indices: Integer[np.ndarray, " n"]) -> None:
        """Chooses the records at `indices` of `whole`."""
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._whole[int(self._indices[index])]


class WithoutUnusable:
    """Records of which the unusable ones are replaced, each by the next usable one.

    Which one that is depends on the records alone, so it is the same for all
    processes, threads and runs. Each process warns once of each record that it finds.
    A file system's errors are no fault of a record, and are raised.
    """

    def __init__(self, whole: Records, what: str) -> None:
        """Wraps records.

        Args:
          whole: what is read; after the last record comes the first.
          what: the records are, for messages.
        """
        self._whole = whole
        self._what = what
        self._most = int(max(len(whole), _LEAST_COUNTED) * _MOST_UNUSABLE)
        self._found: set[int] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": set(self._found), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> np.ndarray:
        number = len(self._whole)
        for step in range(number):
            place = (index + step) % number
            if place in self._found:
                continue
            try:
                return self._whole[place]
            except UnusableRecord as error:
                self._note(place, error)
        raise InputError(f"{self._what}: none of the {number} records is of use")

    def _note(self, place: int, error: UnusableRecord) -> None:
        with self._lock:
            if place in self._found:
                return
            self._found.add(place)
            count = len(self._found)
        if count > self._most:
            raise InputError(
                f"{self._what}: {count} of {len(self._whole)} records are of no use, "
                f"more than the {self._most} that data.skip_corrupt leaves out (1% of "
                f"them, or of {_LEAST_COUNTED}); the last: {error}"
            )
        logging.warning(
            "%s: left out, and the next taken: %s (%d so far, at most %d)",
            self._what,
            error,
            count,
            self._most,
        )


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images, split.

    Attributes:
      name: as in the config.
      event_shape: height, width and channels of every image.
      train: images to train on.
      test: images that training does not see.
      content: SHA-256 that tells the images and their split from others; of a TFDS
        set of its name, version, splits and a few records, of others of all pixels.
      train_labels: the class of each training image; None where there are none.
      test_labels: of each test image.
      skipped: number of corrupt files that were left out.
      left_out: images of the classes that are neither trained on nor tested with.
    """

    name: str
    event_shape: tuple[int, int, int]
    train: Records
    test: Records
    content: str
    train_labels: Integer[np.ndarray, " n"] | None = None
    test_labels: Integer[np.ndarray, " m"] | None = None
    skipped: int = 0
    left_out: Records | None = None

    def fingerprint(self) -> str:
        """Returns a SHA-256 that tells this set, and its split, from others."""
        return self.content

    def metadata(self) -> dict[str, Any]:
        """Returns what must travel with a checkpoint, as plain JSON values."""
        return {
            "fingerprint": self.fingerprint(),
            "num_train": len(self.train),
            "num_test": len(self.test),
            "skipped": self.skipped,
        }


class Split(NamedTuple):
    """Which records are for training and which are held out.

    Attributes:
      train: their indices, ascending.
      test: their indices, ascending.
    """

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
    """Returns a set that is split from one source.

    Args:
      name: as in the config.
      records: all images.
      event_shape: of every image.
      split: of the records.
      content: SHA-256 of all images.
      labels: the class of each record.
      skipped: number of corrupt files that were left out.
    """
    return ImageSet(
        name=name,
        event_shape=event_shape,
        train=Subset(records, split.train),
        test=Subset(records, split.test),
        content=digest(content.encode(), split.train, split.test),
        train_labels=None if labels is None else labels[split.train],
        test_labels=None if labels is None else labels[split.test],
        skipped=skipped,
    )


def check_fraction(test_fraction: float) -> None:
    """Refuses a share that is not between 0 and 1.

    Raises:
      InputError: naming the field.
    """
    if not 0.0 < test_fraction < 1.0:
        raise InputError(
            f"data.test_fraction is {test_fraction}; a number between 0 and 1 is "
            "needed, for example 0.1"
        )


def hold_out(num: int, test_fraction: float, seed: int, what: str) -> Split:
    """Holds out a random share of `num` records; a pure function of its arguments.

    Args:
      num: of records.
      test_fraction: share that is held out, in (0, 1).
      seed: of the choice.
      what: the records, for messages.

    Raises:
      InputError: for a fraction out of range, or one that leaves either part empty.
    """
    check_fraction(test_fraction)
    num_test = round(num * test_fraction)
    if not 1 <= num_test < num:
        raise InputError(
            f"{what}: data.test_fraction {test_fraction} of {num} images holds out "
            f"{num_test}; at least 1 to train on and 1 to hold out are needed; give "
            "more images or another fraction"
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
    timeout: int | float = STALL_SECONDS,
) -> UInt8[np.ndarray, "n height width channels"]:
    """Loads records into one array, by several threads.

    Args:
      records: at least one, all of one shape.
      limit: the first so many only; None: all.
      progress_name: what to call them in the log, if loading takes long.
      timeout: seconds without progress before giving up; 0: never.

    Raises:
      InputError: if there is no record, or one cannot be read.
    """
    num = len(records) if limit is None else min(limit, len(records))
    if num < 1:
        raise InputError(f"{progress_name or 'images'}: there is none to load")
    first = records[0]
    images = np.empty((num, *first.shape), np.uint8)

    def load(index: int) -> None:
        images[index] = records[index]

    in_parallel(load, num, progress_name, timeout)
    return images


def in_parallel(
    function: Callable[[int], _Result],
    num: int,
    progress_name: str = "",
    timeout: int | float = STALL_SECONDS,
) -> list[_Result]:
    """Returns function(0), …, function(num − 1), computed by several threads.

    The first exception stops it. Long work is reported in the log.

    Args:
      function: of an index.
      num: how many.
      progress_name: what to call them in the log; empty: nothing is logged.
      timeout: seconds without progress before giving up; 0: never.

    Raises:
      InputError: if there is no progress for so long.
    """

    def work(start: int) -> list[_Result]:
        return [function(i) for i in range(start, min(start + _CHUNK, num))]

    results: list[_Result] = []
    last = time.monotonic()
    pool = threads.Pool(DECODE_THREADS, "ddaebm-load")
    try:
        starts = range(0, num, _CHUNK)
        for future in [pool.submit(work, start) for start in starts]:
            try:
                results += future.result(timeout or None)
            except TimeoutError as error:
                if future.done():
                    raise  # It is the function's own.
                raise InputError(
                    f"{progress_name or 'reading images'}: no progress for {timeout} s "
                    f"after {len(results)} of {num}; a file system may stall: mend "
                    "that, or raise data.timeout (0: wait for ever)"
                ) from error
            now = time.monotonic()
            if progress_name and now - last > _REPORT_SECONDS:
                last = now
                logging.info("%s: %d of %d images", progress_name, len(results), num)
    finally:
        pool.close()
    return results
