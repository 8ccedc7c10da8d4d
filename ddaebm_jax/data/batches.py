"""The order of training examples, and the batches that follow it.

The order is a function of a seed alone. Epoch e is a permutation of the records drawn
from (seed, e); epochs follow one another without a gap, and batch s takes the places
s·B … s·B + B − 1. So a batch does not depend on how many processes, workers or
threads read it, nor on what was read ahead when a run was cut off.
"""

import functools
import sys
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int32, Shaped

from ddaebm_jax.data.records import Records
from ddaebm_jax.errors import InputError


@functools.lru_cache(maxsize=8)
def _epoch(num_records: int, seed: int, epoch: int) -> Int32[np.ndarray, " n"]:
    """Returns the order of one epoch.

    NumPy promises that a bit generator's raw numbers never change, which it does not
    for its own permutations: a run can be resumed under any version. grain's shuffle
    adds the epoch to the seed, so that neighbouring seeds would share epochs.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    keys = bits.random_raw(num_records)
    return np.argsort(keys, kind="stable").astype(np.int32)


def order(
    num_records: int, seed: int, start: int, stop: int
) -> Int32[np.ndarray, " n"]:
    """Returns the records at places start … stop − 1 of the global order.

    Places e·N … e·N + N − 1 are epoch e.

    Args:
      num_records: N.
      seed: of the order, not negative.
      start: the first place.
      stop: the place after the last.
    """
    first, last = start // num_records, (stop - 1) // num_records
    epochs = [_epoch(num_records, seed, epoch) for epoch in range(first, last + 1)]
    offset = first * num_records
    return np.concatenate(epochs)[start - offset : stop - offset]


class _Indices:
    """For each step, the record indices of its global batch; a source for grain."""

    def __init__(self, num_records: int, batch_size: int, seed: int) -> None:
        self._num_records = num_records
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        start = step * self._batch_size
        return order(self._num_records, self._seed, start, start + self._batch_size)


class _Read:
    """Reads one process's part of a batch of record indices; can be pickled."""

    def __init__(self, records: Records | None, places: slice) -> None:
        self._records = records
        self._places = places

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        local = indices[self._places]
        if self._records is None:
            return local
        return np.stack([self._records[int(index)] for index in local])


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
          num_records: how many records there are.
          batch_size: B, over all processes.
          seed: of the order, not negative.
          records: what to read; None: the stream is of record indices.
          process_index: j.
          process_count: n.
          num_threads: that read, in each worker; each reads a whole local batch. 0:
            the caller's own.
          prefetch: local batches that are read ahead, in each worker.
          num_workers: processes that read; 0: none but this.

        Raises:
          InputError: if there are no records, their number is not `num_records`, or
            the batch is not a multiple of the processes.
        """
        if num_records < 1 or (records is not None and len(records) != num_records):
            found = "no records" if records is None else f"{len(records)} records"
            raise InputError(
                f"batches of {num_records} records were asked for and there are "
                f"{found}; at least 1 is needed"
            )
        if batch_size < 1 or batch_size % process_count:
            raise InputError(
                f"data.batch_size is {batch_size}; a positive multiple of the "
                f"{process_count} processes is needed, for example "
                f"{process_count * max(1, round(batch_size / process_count))}"
            )
        import grain

        self._identity = {
            "num_records": num_records,
            "batch_size": batch_size,
            "seed": seed,
        }
        local = batch_size // process_count
        places = slice(process_index * local, (process_index + 1) * local)
        indices = _Indices(num_records, batch_size, seed)
        self._batches = grain.MapDataset.source(indices).map(_Read(records, places))
        self._num_threads = num_threads if prefetch else 0
        self._prefetch = prefetch
        self._num_workers = num_workers
        self._delivered = 0
        self._iterator: Any = None

    def next(self, length: int) -> Shaped[np.ndarray, "length batch ..."]:
        """Returns the next `length` local batches.

        Returns:
          uint8 images [length, B/n, height, width, channels], or int32 record
          indices [length, B/n].

        Raises:
          InputError: if a record cannot be read; the stream stays where it was.
        """
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batches = np.stack([next(self._iterator) for _ in range(length)])
        except BaseException:
            self.close()
            raise
        self._delivered += length
        return batches

    def state(self) -> dict[str, int]:
        """Returns where the stream is, as plain JSON values.

        It is the same in all processes, and does not depend on what was read ahead.
        """
        return {"batches": self._delivered, **self._identity}

    def restore(self, state: dict[str, int]) -> None:
        """Puts the stream where `state` was taken.

        Raises:
          InputError: if it is the state of another stream.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the saved input position has {name} {state.get(name)}, this run "
                    f"has {value}; go on with the data, batch size and seed that "
                    "the run was started with"
                )
        self.close()
        self._delivered = int(state["batches"])

    def close(self) -> None:
        """Ends threads and workers; the next call of `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> Any:
        """Returns grain's iterator over what is not yet delivered."""
        import grain

        # grain warns of threads that its buffer cannot feed.
        read = grain.ReadOptions(
            num_threads=min(self._num_threads, self._prefetch),
            prefetch_buffer_size=self._prefetch,
        )
        dataset = self._batches[self._delivered :].to_iter_dataset(read)
        if self._num_workers:
            # grain reads flags of its own, which a notebook does not parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers,
                    per_worker_buffer_size=max(1, self._prefetch),
                )
            )
        return iter(dataset)
