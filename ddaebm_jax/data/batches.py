"""The order of training examples, and the batches that follow it.

Epoch e is a permutation of the records drawn from (seed, e); epochs follow one another
without a gap, and batch s takes the places s·B … s·B + B − 1. So a batch does not
depend on who reads it, nor on what was read ahead when a run was cut off.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags
from jaxtyping import Int32, Shaped

from ddaebm_jax.data.records import Records
from ddaebm_jax.errors import InputError, listed, one_line


@functools.lru_cache(maxsize=8)
def _epoch(num_records: int, seed: int, epoch: int) -> Int32[np.ndarray, " n"]:
    """Returns the order of one epoch, the same under any version of NumPy.

    NumPy promises that of a bit generator's raw numbers, but not of its permutations.
    grain's shuffle adds the epoch to the seed: neighbouring seeds would share epochs.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    keys = bits.random_raw(num_records)
    return np.argsort(keys, kind="stable").astype(np.int32)


def order(
    num_records: int, seed: int, start: int, stop: int
) -> Int32[np.ndarray, " n"]:
    """Returns the records at places start … stop − 1 of the global order."""
    first, last = start // num_records, (stop - 1) // num_records
    epochs = [_epoch(num_records, seed, epoch) for epoch in range(first, last + 1)]
    offset = first * num_records
    return np.concatenate(epochs)[start - offset : stop - offset]


@dataclasses.dataclass
class _Reader:
    """Reads one process's part of a global batch; picklable, for worker processes."""

    num_records: int
    batch_size: int
    seed: int
    records: Records | None
    places: slice

    def indices(self, step: int) -> Int32[np.ndarray, " local"]:
        start = step * self.batch_size
        stop = start + self.batch_size
        return order(self.num_records, self.seed, start, stop)[self.places]

    def __call__(self, step: int) -> Shaped[np.ndarray, "local ..."]:
        indices = self.indices(step)
        if self.records is None:
            return indices
        return np.stack([self.records[int(index)] for index in indices])


class Batches:
    """An endless stream of batches that can be put back to any of its states.

    Of every global batch of B examples, process j of n delivers the places
    j·B/n … (j + 1)·B/n − 1.
    """

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        seed: int,
        records: Records | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 8,
        prefetch: int = 8,
        num_workers: int = 0,
    ) -> None:
        """Opens the stream at its first batch.

        Args:
          num_records: at least 1.
          batch_size: B, over all processes, a multiple of them; else InputError.
          seed: of the order, not negative.
          records: what to read; None: the stream is of record indices.
          process_index: j.
          process_count: n.
          num_threads: that read, in each worker; each reads a whole local batch.
          prefetch: local batches that are read ahead, in each worker; at least 1.
          num_workers: processes that read; 0: threads of this one.
        """
        if batch_size % process_count:
            raise InputError(
                f"data.batch_size is {batch_size}; a multiple of the {process_count} "
                "processes is needed"
            )
        names = "num_records", "batch_size", "seed"
        self._identity = dict(zip(names, (num_records, batch_size, seed), strict=True))
        local = batch_size // process_count
        places = slice(process_index * local, (process_index + 1) * local)
        self._reader = _Reader(num_records, batch_size, seed, records, places)
        # More threads than batches to read ahead would find nothing to do.
        self._num_threads = min(num_threads, prefetch)
        self._prefetch = prefetch
        self._num_workers = num_workers
        self._delivered = 0
        self._iterator: Iterator[np.ndarray] | None = None

    def next(self, length: int) -> Shaped[np.ndarray, "length batch ..."]:
        """Returns the next `length` local batches: records, or int32 [length, B/n].

        After an InputError, if a record cannot be read or a worker process dies, the
        stream is where it was, and can be read again.
        """
        try:
            steps = range(self._delivered, self._delivered + length)
            result = np.stack([self._next(step) for step in steps])
        except BaseException:
            self.close()
            raise
        self._delivered += length
        return result

    def state(self) -> dict[str, int]:
        """Returns the position, as JSON values that are the same in all processes."""
        return {"batches": self._delivered, **self._identity}

    def restore(self, state: dict[str, int]) -> None:
        """Puts the stream where `state` was taken; InputError for another stream's."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the saved input position has {name} {state.get(name)}, this run "
                    f"has {value}; go on with the data, batch size and seed as before"
                )
        self.close()
        self._delivered = int(state["batches"])

    def close(self) -> None:
        """Ends threads and workers; the next call of `next` starts them again."""
        if self._iterator is not None and self._reader.records is not None:
            self._iterator.close()
        self._iterator = None

    def _next(self, step: int) -> np.ndarray:
        try:
            self._iterator = self._iterator or self._open(step)
            return next(self._iterator)
        except InputError:
            raise
        except Exception as error:
            indices = listed(self._reader.indices(step), 5)
            raise InputError(
                f"batch {step} (counted from 0; records {indices}) cannot be read "
                f"({one_line(error)}); if a worker process was killed (exit code -9), "
                f"lower data.num_workers={self._num_workers} or data.prefetch; the "
                "same command continues the run from its last checkpoint"
            ) from error

    def _open(self, step: int) -> Iterator[np.ndarray]:
        if self._reader.records is None:
            return map(self._reader, itertools.count(step))
        import grain

        # grain reads flags of its own, which a notebook does not parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = grain.MapDataset.range(step, sys.maxsize).map(self._reader)
        read_ahead = grain.ReadOptions(self._num_threads, self._prefetch)
        batches = batches.to_iter_dataset(read_ahead)
        if self._num_workers:
            workers = grain.MultiprocessingOptions(self._num_workers, self._prefetch)
            batches = batches.mp_prefetch(workers)
        return iter(batches)
