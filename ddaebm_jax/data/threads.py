"""Daemon threads that read: a stalled file system does not keep a program from ending.

`concurrent.futures` would join its threads at the end.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from absl import logging

from ddaebm_jax.errors import InputError

# Seconds without progress before reading is given up.
TIMEOUT = 600
# Threads of `in_parallel`, and the indices that a thread takes at once.
_NUM_THREADS, _CHUNK = 8, 64
_REPORT_SECONDS = 10.0

_Result = TypeVar("_Result")


class DaemonPool:
    """A few daemon threads and a queue of calls, begun in the order of submission."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[[int], Any], argument: int) -> Future:
        """Returns the future of a call."""
        future: Future = Future()
        self._calls.put((future, function, argument))
        return future

    def close(self) -> None:
        """Drops the calls that have not begun, and waits for none."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in range(self._num_threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, argument = call
            try:
                future.set_result(function(argument))
            except BaseException as error:
                future.set_exception(error)


def in_parallel(
    function: Callable[[int], _Result],
    num: int,
    progress_name: str = "",
    timeout: int | float = TIMEOUT,
) -> list[_Result]:
    """Returns function(0), …, function(num − 1), computed by several threads.

    The first exception stops it. Long work is reported in the log, unless
    `progress_name` is empty. Raises InputError if there is no progress for `timeout`
    seconds; 0: never.
    """

    def work(start: int) -> list[_Result]:
        return [function(i) for i in range(start, min(start + _CHUNK, num))]

    results: list[_Result] = []
    reported = time.monotonic()
    pool = DaemonPool(_NUM_THREADS)
    try:
        for future in [pool.submit(work, i) for i in range(0, num, _CHUNK)]:
            results += future.result(timeout or None)
            if progress_name and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                logging.info("%s: %d of %d images", progress_name, len(results), num)
    except TimeoutError as error:
        raise InputError(
            f"{progress_name or 'reading images'}: no progress for {timeout} s after "
            f"{len(results)} of {num}; a file system may stall: fix that, or raise "
            "data.timeout (0: no limit)"
        ) from error
    finally:
        pool.close()
    return results
