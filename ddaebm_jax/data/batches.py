"""The order of training examples, and the batches that follow it.

The order is a function of a seed alone. Epoch e is a permutation of the records drawn
from (seed, e); epochs follow one another without a gap, and batch s takes the places
s·B … s·B + B − 1. So a batch does not depend on how many processes, workers or
threads read it, nor on what was read ahead when a run was cut off.
"""

import collections
import concurrent.futures
import functools
import math
import multiprocessing
import multiprocessing.process
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int32, Shaped

from ddaebm_jax.data import threads
from ddaebm_jax.data.records import Records, one_line
from ddaebm_jax.errors import InputError

# How grain calls its workers.
_GRAIN_NAME = "grain-process-prefetch"
# Seconds between two looks at the workers, that grain has to tell why one ended, and
# that closing takes at most before workers are killed.
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_CLOSE_SECONDS = 10.0
# Records that a message names.
_NAMED_RECORDS = 5


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
        local = self.local(indices)
        if self._records is None:
            return local
        return np.stack([self._record(int(index)) for index in local])

    def local(self, indices: np.ndarray) -> np.ndarray:
        """Returns the indices that this process reads."""
        return indices[self._places]

    def _record(self, index: int) -> np.ndarray:
        try:
            return self._records[index]
        except InputError:
            raise
        # Whatever it is: it must name the record, and come whole out of a worker.
        except Exception as error:
            raise InputError(
                f"record {index} (counted from 0) cannot be read "
                f"({one_line(error)}); check the data, and start the run again"
            ) from error


class _Threads:
    """Reads ahead in threads of this process.

    Not grain's: a thread of its pools that a file system holds up would keep the
    program from ending.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        start: int,
        num_threads: int,
        prefetch: int,
        timeout: int | float,
    ) -> None:
        """Starts reading.

        Args:
          read: batch → its records.
          start: the first batch.
          num_threads: 0: the caller's own; with a time-out one that it waits for.
          prefetch: batches read ahead.
          timeout: seconds to wait for a batch; 0: for ever.
        """
        self._read = read
        self._next = start
        self._timeout = timeout or None
        self._pool = None
        if num_threads or timeout:
            self._pool = threads.Pool(max(num_threads, 1), "ddaebm-read")
        self._ahead = max(prefetch, 1) if num_threads else 1
        self._reading: collections.deque = collections.deque()

    def next(self) -> np.ndarray:
        """Returns the next batch.

        Raises:
          TimeoutError: if it does not come in time.
        """
        if self._pool is None:
            self._next += 1
            return self._read(self._next - 1)
        self._fill(self._pool)
        batch = self._reading.popleft().result(self._timeout)
        if self._ahead > 1:
            self._fill(self._pool)
        return batch

    def close(self) -> None:
        """Ends the threads, but waits for none."""
        if self._pool is not None:
            self._pool.close()

    def _fill(self, pool: threads.Pool) -> None:
        while len(self._reading) < self._ahead:
            self._reading.append(pool.submit(self._read, self._next))
            self._next += 1


class _Workers:
    """Reads in processes, by grain.

    grain waits for ever for a worker that hangs, and when closed too; so it is waited
    for from a thread, and its workers are killed before it is given up.
    """

    def __init__(self, dataset: Any, timeout: int | float) -> None:
        """Makes ready; the workers start with the first batch.

        Args:
          dataset: grain's, with `mp_prefetch`.
          timeout: seconds to wait for a batch; 0: for ever.
        """
        self._iterator = iter(dataset)
        self._timeout = timeout or math.inf
        self._pool = threads.Pool(1, "ddaebm-workers")
        self._others = _grain_workers()
        self._workers: list[multiprocessing.process.BaseProcess] = []

    def next(self) -> np.ndarray:
        """Returns the next batch.

        Raises:
          TimeoutError: if it does not come in time.
          StopIteration: if grain's stream ends.
          InputError: if a record cannot be read, or a worker dies.
        """
        future = self._pool.submit(next, self._iterator)
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            done, _ = concurrent.futures.wait([future], min(_POLL_SECONDS, left))
            self._note_workers()
            if (
                not done
                and left > 0
                and any(w.exitcode is not None for w in self._workers)
            ):
                # grain may be telling why, for it ends workers after an error.
                done, _ = concurrent.futures.wait([future], _GRACE_SECONDS)
                if not done:
                    raise self._died()
            if done:
                break
            if left <= 0:
                self._kill()
                raise TimeoutError
        try:
            return future.result()
        except (InputError, StopIteration):
            raise
        except Exception as error:
            if any(worker.exitcode for worker in self._workers):
                raise self._died() from error
            raise InputError(
                f"the reading processes (data.num_workers) failed ({one_line(error)}); "
                "look above for their own messages, or try data.num_workers=0"
            ) from error

    def close(self) -> None:
        """Ends the workers: gently, and those that do not end so by force."""
        self._note_workers()
        closing = threading.Thread(target=self._iterator.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            self._kill()
            closing.join(_CLOSE_SECONDS)
        self._pool.close()

    def _note_workers(self) -> None:
        known = {id(worker) for worker in (*self._others, *self._workers)}
        self._workers += [w for w in _grain_workers() if id(w) not in known]

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()

    def _died(self) -> InputError:
        ended = [w.exitcode for w in self._workers if w.exitcode is not None]
        code = min(ended)
        if code < 0:
            try:
                how = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was killed by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        self._kill()
        why = (
            "out of memory is the usual reason: lower data.num_workers or "
            "data.prefetch; "
            if code == -signal.SIGKILL
            else "look above for its own message; "
        )
        return InputError(
            f"a reading process (one of data.num_workers={len(self._workers)}) {how}; "
            f"{why}then start the run again: it goes on from its last checkpoint"
        )


def _grain_workers() -> list[multiprocessing.process.BaseProcess]:
    """This process's children that read for grain."""
    children = multiprocessing.active_children()
    return [child for child in children if child.name.startswith(_GRAIN_NAME)]


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
        timeout: int | float = 0,
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
          timeout: seconds to wait for a batch before giving up; 0: for ever.

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
        self._identity = {
            "num_records": num_records,
            "batch_size": batch_size,
            "seed": seed,
        }
        local = batch_size // process_count
        places = slice(process_index * local, (process_index + 1) * local)
        self._indices = _Indices(num_records, batch_size, seed)
        self._read = _Read(records, places)
        self._num_threads = num_threads if prefetch else 0
        self._prefetch = prefetch
        self._num_workers = num_workers
        self._timeout = timeout
        self._delivered = 0
        self._reader: _Threads | _Workers | None = None

    def next(self, length: int) -> Shaped[np.ndarray, "length batch ..."]:
        """Returns the next `length` local batches.

        Returns:
          uint8 images [length, B/n, height, width, channels], or int32 record
          indices [length, B/n].

        Raises:
          InputError: if a record cannot be read, none comes in time, a reading
            process dies, or the stream ends, which it never should. The stream stays
            where it was, and the next call begins anew.
        """
        if self._reader is None:
            self._reader = self._open()
        batches: list[np.ndarray] = []
        try:
            for _ in range(length):
                batches.append(self._reader.next())
            result = np.stack(batches)
        except TimeoutError as error:
            self.close()
            raise InputError(
                f"no batch came for {self._timeout} s: "
                f"{self._described(self._delivered + len(batches))} is waited for; a "
                "file system may stall or a worker hang: mend that and start the run "
                "again, or raise data.timeout (0: wait for ever)"
            ) from error
        except StopIteration as error:
            self.close()
            raise InputError(
                "the stream of batches ended at "
                f"{self._described(self._delivered + len(batches))}; it must not: "
                "start the run again, with data.num_workers=0 if that does not help"
            ) from error
        except BaseException:
            self.close()
            raise
        self._delivered += length
        return result

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
        """Ends threads and workers; the next call of `next` starts them again.

        It takes a bounded time, whatever they are waiting for.
        """
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.close()

    def _described(self, step: int) -> str:
        """A batch for messages: its place, and some of its records."""
        records = self._read.local(self._indices[step])
        some = ", ".join(map(str, records[:_NAMED_RECORDS]))
        more = f" and {len(records) - _NAMED_RECORDS} more"
        return (
            f"batch {step} (counted from 0; records {some}"
            f"{more * (len(records) > _NAMED_RECORDS)})"
        )

    def _batch(self, step: int) -> np.ndarray:
        return self._read(self._indices[step])

    def _open(self) -> _Threads | _Workers:
        """Starts to read what is not yet delivered."""
        # More threads than batches to read ahead would find nothing to do.
        num_threads = min(self._num_threads, self._prefetch)
        if not self._num_workers:
            return _Threads(
                self._batch, self._delivered, num_threads, self._prefetch, self._timeout
            )
        import grain

        # grain reads flags of its own, which a notebook does not parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = grain.MapDataset.source(self._indices).map(self._read)
        read = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=self._prefetch
        )
        workers = grain.MultiprocessingOptions(
            num_workers=self._num_workers,
            per_worker_buffer_size=max(1, self._prefetch),
        )
        return _Workers(
            dataset[self._delivered :].to_iter_dataset(read).mp_prefetch(workers),
            self._timeout,
        )
