"""Threads that read, and that never keep the program from ending.

The standard library's pools wait at exit for all that they have begun; where a file
system stalls that is for ever. These threads are daemons: Python ends over them.
"""

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Pool:
    """A few daemon threads, and the calls that wait for them."""

    def __init__(self, num_threads: int, name: str) -> None:
        """Starts the threads.

        Args:
          num_threads: at least 1.
          name: of the threads.
        """
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        for i in range(num_threads):
            threading.Thread(
                target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True
            ).start()
        # Threads know the queue, not the pool: one that is forgotten ends them too.
        self._end = weakref.finalize(self, _end, self._tasks, num_threads)

    def submit(
        self, function: Callable[..., Any], *arguments: Any
    ) -> concurrent.futures.Future:
        """Returns the future of a call; calls begin in the order of submission."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._tasks.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancels what has not begun; what has is not waited for."""
        self._end()


def _end(tasks: queue.SimpleQueue, num_threads: int) -> None:
    while True:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            break
        if task is not None:
            task[0].cancel()
    for _ in range(num_threads):
        tasks.put(None)


def _work(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        # Or a result would be held until the next task comes.
        del task, future, function, arguments
