"""What a run does about faults: saves that fail, and energies that run away."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import TrainingError
from ddaebm_jax.training.checkpoint_files import CheckpointWriteError
from ddaebm_jax.training.checkpoints import Checkpoints

_LONGEST_DELAY = 60.0


class Saver:
    """Saves checkpoints, again and again for a while where that fails.

    Training goes on meanwhile. With several processes all must call the same methods
    after the same steps; they agree on what failed.

    Attributes:
      failing: whether the newest checkpoint could not be written yet.
    """

    def __init__(self, checkpoints: Checkpoints, patience: int | float) -> None:
        """Wraps the checkpoints of a run.

        Args:
          checkpoints: where to.
          patience: seconds from the first failure to giving up.
        """
        self._checkpoints = checkpoints
        self._patience = patience
        self._since: float | None = None
        self._next = 0.0
        self._delay = 1.0

    @property
    def failing(self) -> bool:
        """Whether the newest checkpoint could not be written yet."""
        return self._since is not None

    def save(self, state: Any, info: dict[str, Any]) -> None:
        """Starts saving.

        Raises:
          TrainingError: if patience is at its end.
        """
        reason = self._failure(lambda: self._checkpoints.save(state, info))
        self._settle(reason, done=False)

    def look(self, meeting: bool = True) -> None:
        """Looks whether what was started has failed.

        Args:
          meeting: whether several processes may wait for each other here; if not, only
            a single one looks. The same in all of them.

        Raises:
          TrainingError: if patience is at its end.
        """
        if not self.failing and (meeting or jax.process_count() == 1):
            self._settle(self._failure(self._checkpoints.check), done=False)

    def due(self) -> bool:
        """Whether it is time to try again."""
        return self.failing and parallel.all_agree(time.monotonic() >= self._next)

    def finish(self, state: Any, info: dict[str, Any], wait: bool) -> None:
        """Saves, and waits until all is on disk.

        Args:
          state: to save.
          info: JSON values that travel along.
          wait: try until it is done, or patience at its end; False: once.

        Raises:
          TrainingError: if patience is at its end.
        """
        while True:
            reason = self._failure(lambda: self._checkpoints.save(state, info))
            if reason is None:
                reason = self._failure(self._checkpoints.wait)
            self._settle(reason, done=True)
            if not (wait and self.failing):
                return
            time.sleep(max(0.0, self._next - time.monotonic()))

    def _failure(self, action: Callable[[], None]) -> str | None:
        reason = None
        try:
            action()
        except CheckpointWriteError as error:
            reason = str(error)
        if parallel.all_agree(reason is None):
            return None
        return reason or "another process could not write its part"

    def _settle(self, reason: str | None, done: bool) -> None:
        now = time.monotonic()
        if reason is None:
            if done and self._since is not None:
                logging.warning(
                    "a checkpoint is written at last, after %.0f s", now - self._since
                )
                self._since = None
            return
        if self._since is None:
            self._since, self._delay = now, 1.0
        waited = now - self._since
        try:
            last = self._checkpoints.latest_step()
            kept = "there is none yet" if last is None else f"step {last} is intact"
        except OSError as error:  # Perhaps only here, and the others go on.
            kept = f"nothing can be told ({error.strerror})"
        if not parallel.all_agree(waited < self._patience):
            raise TrainingError(
                f"no checkpoint could be written for {waited:.0f} s "
                f"(recovery.save_patience {self._patience}): {reason}; of earlier "
                f"ones, {kept}. Make room or the directory writable, and start the "
                "same command again"
            )
        logging.warning(
            "a checkpoint cannot be written: %s; training goes on and tries again for "
            "%.0f s more; of earlier ones, %s",
            reason,
            self._patience - waited,
            kept,
        )
        # Once more when patience is at its end, and not long after.
        self._next = now + min(self._delay, max(0.0, self._patience - waited))
        self._delay = min(2 * self._delay, _LONGEST_DELAY)


class EnergyWatch:
    """Recognises an adversarial game that runs away, from its mean energies."""

    def __init__(self, max_energy: int | float | None, max_gap: int | float | None):
        """Sets the thresholds.

        Args:
          max_energy: of either mean energy's absolute value; None: none.
          max_gap: of the difference of the two; None: none.
        """
        self._max_energy = max_energy
        self._max_gap = max_gap
        self._beyond: set[str] = set()

    def warnings(self, values: Mapping[str, float]) -> list[str]:
        """Returns what to warn of, once for each time that a threshold is passed.

        Args:
          values: the metrics of some steps.
        """
        real, fake = values["energy/real"], values["energy/fake"]
        found = []
        for name, value, field, most in (
            ("energy/real", real, "max_energy", self._max_energy),
            ("energy/fake", fake, "max_energy", self._max_energy),
            ("energy/real - energy/fake", real - fake, "max_gap", self._max_gap),
        ):
            if most is None or abs(value) <= most:
                self._beyond.discard(name)
                continue
            if name not in self._beyond:
                found.append(
                    f"{name} is {value:.4g}, beyond recovery.{field} {most:g}: the "
                    "game may be diverging. Try a higher game.gamma, a lower "
                    "optimizer.energy_learning_rate, or game.energy_l2"
                )
            self._beyond.add(name)
        return found
