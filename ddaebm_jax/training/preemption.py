"""Preemption and Ctrl-C: a signal ends a run after its dispatch, with a checkpoint."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging


class Stopped(BaseException):
    """A run that a signal has ended, with everything saved.

    Like KeyboardInterrupt not an Exception, so that `except Exception` lets it pass.

    Attributes:
      exit_code: 0 after SIGTERM; 130, the shells' convention, after SIGINT.
    """

    def __init__(self, by: signal.Signals, step: int, total: int) -> None:
        super().__init__(
            f"stopped by {by.name} after step {step} of {total}, which is saved; the "
            "same command with the same --workdir continues from there"
        )
        self.exit_code = 0 if by == signal.SIGTERM else 128 + by


class Preemption:
    """Handlers of SIGTERM and SIGINT while it is entered, for a loop that polls.

    A second SIGINT raises KeyboardInterrupt at once. With several processes JAX's
    preemption service handles SIGTERM, so that all of them stop after the same step
    whichever was signalled; SIGINT is passed on to it.
    Outside the main thread, where Python allows no handlers, signals are left alone.

    Attributes:
      signal: the newest signal; None: none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._several = jax.process_count() > 1
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        logging.info(
            "%s: stopping after these steps, with a checkpoint%s",
            self.signal.name,
            "; press Ctrl-C again to quit at once" if number == signal.SIGINT else "",
        )
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def poll(self, before: int, step: int) -> signal.Signals | None:
        """Return the signal for which to stop at `step`, if any; after `before`.

        All processes stop at the same step.
        """
        if not self._several:
            return self.signal
        from jax.experimental import multihost_utils

        # JAX chooses one step to stop after, and reports it for that one only.
        for number in range(before + 1, step + 1):
            if multihost_utils.reached_preemption_sync_point(number):
                return self.signal or signal.SIGTERM
        return None
