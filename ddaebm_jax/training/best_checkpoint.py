"""The checkpoint of the lowest FID, kept beside the newest ones."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoint_files
from ddaebm_jax.training.checkpoint_files import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
)
from ddaebm_jax.training.checkpoints import ABANDONED, Checkpoints, agreed

# What two FIDs must have in common to be compared.
MEASUREMENT = (
    "num_images",
    "num_reference",
    "preprocessing",
    "reference",
    "reference_images",
    "inception_weights",
)


class BestCheckpoint:
    """Keeps the checkpoint of the lowest FID, all measured in one way."""

    def __init__(self, workdir: Path) -> None:
        """Opens what a run directory has kept, if anything.

        One that is damaged is moved to `<workdir>/damaged`, and the best starts anew.
        """
        self._checkpoints = Checkpoints(workdir, keep=1, folder=checkpoint_files.BEST)
        self._look()

    def _look(self) -> None:
        """Takes the FID from the checkpoint that is kept."""
        self._fid, self._measurement = math.inf, None
        self._kept = self._fid, self._measurement  # Before the save that is going on.
        for step in reversed(self._checkpoints.same_steps()):
            path = self._checkpoints.directory / str(step)
            try:
                with agreed(path):
                    info = checkpoint_files.read_info(path)
                    fid, measurement = float(info["fid"]), info["measurement"]
            except DamagedCheckpointError as error:
                logging.warning("the best checkpoint is of no use: %s", error)
                self._checkpoints.set_aside([step])
                continue
            self._fid, self._measurement = fid, measurement
            self._kept = fid, measurement
            return

    def offer(
        self, state: TrainState, found: dict[str, Any], info: dict[str, Any]
    ) -> None:
        """Saves a state if its FID is the lowest so far.

        One measured in another way, as after a resume with other settings, compares
        with none before it.

        Raises:
          CheckpointWriteError: as `Checkpoints.save`; the one kept before stands.
        """
        fid = found["fid"]
        measurement = {name: found[name] for name in MEASUREMENT}
        self.check()
        if self._measurement not in (None, measurement):
            logging.info("FID is measured in another way now; the best starts anew")
            self._fid = math.inf
        if fid < self._fid:
            own = {"input": None, "fid": fid, "measurement": measurement}
            self.wait()
            step = int(state.step)
            if step in self._checkpoints.same_steps():
                # Of a run that went another way; `save` would leave it there.
                self._checkpoints.set_aside([step], ABANDONED)
                self._look()
            self._checkpoints.save(state, {**info, **own})
            self._kept = self._fid, self._measurement
            self._fid, self._measurement = fid, measurement
            logging.info("step %d has the lowest FID so far, %.3f", state.step, fid)

    def forget_after(self, step: int) -> None:
        """Forgets a best that a rollback has taken back; all processes call this.

        It is moved to `<workdir>/abandoned/best-<step>`.

        Args:
          step: from which the run goes on.
        """
        with self._told():
            self.wait()
        with self._told():
            later = [one for one in self._checkpoints.same_steps() if one > step]
            if later:
                self._checkpoints.set_aside(later, ABANDONED)
                self._look()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Only warns of what fails, in all processes: the run itself can go on."""
        try:
            yield
        except CheckpointError as error:
            logging.warning("%s", error)

    def wait(self) -> None:
        """Waits for the save that is going on; see `Checkpoints.wait`."""
        with self._undone():
            self._checkpoints.wait()

    def check(self) -> None:
        """Tells of a save that has failed since; see `Checkpoints.check`."""
        with self._undone():
            self._checkpoints.check()

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Forgets the FID of a checkpoint that could not be written."""
        try:
            yield
        except CheckpointWriteError:
            self._fid, self._measurement = self._kept
            raise

    def close(self) -> None:
        """Waits for saves and releases the directory; what fails is only logged."""
        self._checkpoints.close()
