"""Where processes that save together wait for each other, and learn if one fails.

Orbax's own barriers know nothing of failures: a process that cannot write leaves the
others waiting for it, and waits for them in turn, for twenty minutes. Here a process
tells the others that it will not come, as soon as it knows.
"""

import itertools
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from ddaebm_jax import sharding as parallel

# What Orbax 0.12 calls its barriers, in the order of a save: its beginning; all have
# written; the first process has renamed; its end, whatever has happened in between.
_BEGINNING_OR_END = "set_value_start"
_MEETINGS = ("async_write_complete", "async_commit_complete")
_HERE, _NOT_COMING = "here", "not coming"
# All processes open the same directories in the same order.
_OPENED = itertools.count()


class AnotherFailedError(Exception):
    """Another process could not write its part of a checkpoint."""


class Meetings:
    """Orbax's barriers for the background of saves; see the module.

    They use the store of keys and values that JAX's coordination service keeps, and no
    collectives, which belong to the main thread. The first process collects who has
    come, and tells all what came of it.
    """

    def __init__(self, name: str) -> None:
        """Prepares the meetings of one directory's saves.

        Args:
          name: the same in all processes, and another for each directory.
        """
        # JAX has no public way to it; Orbax takes this one, too.
        self._client = jax._src.distributed.global_state.client
        self._prefix = f"ddaebm_jax/{next(_OPENED)}-{name}"
        self._plain = ocp.multihost.get_barrier_sync_fn()
        self._save, self._passed = 0, 0
        self._came: set[str] = set()

    def begin(self) -> None:
        """Begins a save; all processes call this, when the one before has ended."""
        if parallel.is_first_process() and self._save:
            self._client.key_value_delete(f"{self._prefix}/{self._save}/")
        self._save, self._passed = self._save + 1, 0
        self._came = set()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes.

        Args:
          key: which of Orbax's barriers.
          timeout_ms: how long at most.

        Raises:
          AnotherFailedError: if one of them will not come.
          JaxRuntimeError: if time is up, or a process is gone.
        """
        for meeting in _MEETINGS:
            if meeting in key:
                self._meet(meeting, timeout_ms)
                return
        if _BEGINNING_OR_END in key:
            self._passed += 1
            if self._passed == 2:
                self._call_off()
        self._plain(key=key, timeout_ms=timeout_ms)

    def _meet(self, meeting: str, timeout_ms: int) -> None:
        self._came.add(meeting)
        if parallel.is_first_process():
            end = time.monotonic() + timeout_ms / 1000
            found = _HERE
            for process in range(1, jax.process_count()):
                left = max(1, int(1000 * (end - time.monotonic())))
                key = self._key(meeting, process)
                if self._client.blocking_key_value_get(key, left) != _HERE:
                    found = _NOT_COMING
            self._tell(meeting, "all", found)
        else:
            self._tell(meeting, jax.process_index(), _HERE)
            key = self._key(meeting, "all")
            found = self._client.blocking_key_value_get(key, timeout_ms)
        if found != _HERE:
            raise AnotherFailedError("another process could not write its part")

    def _call_off(self) -> None:
        """Tells the others of the meetings that this process has not come to."""
        to = "all" if parallel.is_first_process() else jax.process_index()
        for meeting in _MEETINGS:
            if meeting not in self._came:
                self._tell(meeting, to, _NOT_COMING)

    def _key(self, meeting: str, process: int | str) -> str:
        return f"{self._prefix}/{self._save}/{meeting}/{process}"

    def _tell(self, meeting: str, process: int | str, value: str) -> None:
        key = self._key(meeting, process)
        self._client.key_value_set(key, value, allow_overwrite=True)


def options(name: str) -> tuple[Meetings | None, dict[str, Any]]:
    """Returns the meetings of a directory's saves, and options of Orbax's manager.

    None and nothing where there is only one process.

    Args:
      name: as in `Meetings`.
    """
    if jax.process_count() == 1:
        return None, {}
    meetings = Meetings(name)
    return meetings, {
        "async_options": ocp.AsyncOptions(barrier_sync_fn=meetings),
        # Two managers may save at one time.
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=name
        ),
    }
