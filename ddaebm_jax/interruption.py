"""Ends a run in good order when it is asked to: preemption and Ctrl-C."""

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
from absl import logging

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A run that ended because of a signal, with all that it did saved.

    Attributes:
      exit_code: 0 for SIGTERM; 130, as shells have it, for SIGINT.
    """

    def __init__(self, by: signal.Signals, step: int, total: int) -> None:
        """Says by which signal, after which step of how many."""
        super().__init__(
            f"stopped by {by.name} after step {step} of {total}, which is saved; the "
            "same command with the same --workdir goes on from there"
        )
        self.exit_code = 0 if by == signal.SIGTERM else 128 + by


class Interruption:
    """Notes SIGTERM and SIGINT while it is entered, for a loop that looks.

    The first one is noted; a second SIGINT raises KeyboardInterrupt at once. When all
    is saved (`all_saved`) the first one raises Interrupted itself. With
    several processes JAX's preemption service takes SIGTERM, so that all of them
    stop after the same step wherever it came; SIGINT is passed on as one.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        """Notes nothing yet."""
        self._noted: signal.Signals | None = None
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, object] = {}
        self._saved: tuple[int, int] | None = None

    def all_saved(self, step: int, total: int) -> None:
        """Says that nothing is lost any more if the run ends: step of how many."""
        self._saved = step, total

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                if one == signal.SIGTERM and self._several:
                    continue
                self._before[one] = signal.signal(one, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = signal.Signals(number)
        if self._saved is not None and not self._several:
            raise Interrupted(self._noted, *self._saved)
        logging.info(
            "%s: stopping after these steps, with a checkpoint%s",
            self._noted.name,
            "; once more leaves at once" if number == signal.SIGINT else "",
        )
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(self, step: int) -> signal.Signals | None:
        """Returns the signal to stop after this step for, or None.

        With several processes all of them must ask, after the same steps, and get the
        same answer.
        """
        if not self._several:
            return self._noted
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return self._noted or signal.SIGTERM
        return None
