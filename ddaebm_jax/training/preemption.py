"""Ends a run in good order when it is asked to: preemption and Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from absl import logging

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A run that ended because of a signal, with all that it did saved.

    Like KeyboardInterrupt no Exception: who catches those must not hold it up.

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


class Noted(BaseException):
    """A signal that came within `Interruption.at_once`."""


class Interruption:
    """Notes SIGTERM and SIGINT while it is entered, for a loop that looks.

    The first one is noted; a second SIGINT raises KeyboardInterrupt at once. When all
    is saved (`all_saved`) the first one raises Interrupted itself. With
    several processes JAX's preemption service takes SIGTERM, so that all of them
    stop after the same step wherever it came; SIGINT is passed on as one, and nothing
    is cut short.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        """Notes nothing yet."""
        self._noted: signal.Signals | None = None
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}
        self._saved: tuple[int, int] | None = None
        self._at_once = False

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
        # JAX turns what is raised within some of its callbacks into errors of its own.
        if self._saved and self._noted and isinstance(error, Exception):
            raise Interrupted(self._noted, *self._saved) from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = signal.Signals(number)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._saved is not None:
            raise Interrupted(self._noted, *self._saved)
        logging.info(
            "%s: stopping after these steps, with a checkpoint%s",
            self._noted.name,
            "; once more leaves at once" if number == signal.SIGINT else "",
        )
        if self._at_once:
            raise Noted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is done in here is left as soon as a signal comes, by Noted.

        Raises:
          Noted: also where one has come before; never with several processes, which
            would not leave together.
        """
        if self._several:
            yield
            return
        self._at_once = True
        try:
            if self._noted is not None:
                raise Noted
            yield
        except Exception as error:
            # See __exit__.
            if self._noted is None:
                raise
            raise Noted from error
        finally:
            self._at_once = False

    def all_saved(self, step: int, total: int) -> None:
        """Says that nothing is lost any more if the run ends: step of how many.

        Raises:
          Interrupted: if a signal has come already; not with several processes.
        """
        self._saved = step, total
        if self._noted is not None and not self._several:
            raise Interrupted(self._noted, step, total)

    def noted(self, start: int, step: int) -> signal.Signals | None:
        """Returns the signal to stop for after some steps, or None.

        With several processes all of them must ask, after the same steps, and get the
        same answer.

        Args:
          start: where the steps began; the last call's `step`.
          step: where they ended.
        """
        if not self._several:
            return self._noted
        from jax.experimental import multihost_utils

        # JAX chooses one step to stop after, and says so for that one only.
        for number in range(start + 1, step + 1):
            if multihost_utils.reached_preemption_sync_point(number):
                return self._noted or signal.SIGTERM
        return None
