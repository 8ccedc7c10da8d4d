"""Checkpoints of a run, by Orbax: asynchronous, the newest few kept.

A checkpoint holds two items: `state`, the whole TrainState, and `info`, plain JSON
(format version, the config, a table's columns, standardisation and fingerprint).
A step's data and noise are functions of (seed, step), so that the state alone fixes
how a run goes on: a resumed run is bit-identical to an unbroken one.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from ddaebm_jax.errors import InputError
from ddaebm_jax.minimax import TrainState

FORMAT_VERSION = 1
# Folders of a run directory: the newest checkpoints, and the one of the lowest FID.
NEWEST, BEST = "checkpoints", "best"
_STATE, _INFO = "state", "info"


class CheckpointError(InputError):
    """A checkpoint that is missing or does not fit what is asked of it."""


class Checkpoints:
    """The checkpoints of one run directory.

    Attributes:
      directory: `<workdir>/checkpoints`, or `<workdir>/best`.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 3,
        read_only: bool = False,
        folder: str = NEWEST,
    ) -> None:
        """Opens the checkpoints of a run.

        Args:
          workdir: the run directory.
          keep: newest checkpoints kept.
          read_only: for modes that only restore; nothing is created or cleaned.
          folder: NEWEST or BEST.

        Raises:
          CheckpointError: with `read_only`, if there is no checkpoint directory.
        """
        self.directory = Path(workdir).resolve() / folder
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                no_best_checkpoint(workdir)
                if folder == BEST
                else no_checkpoint(workdir)
            )
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0
            )
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                # A process killed while saving leaves an unfinished directory.
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            )
        self._manager = ocp.CheckpointManager(
            self.directory, item_names=(_STATE, _INFO), options=options
        )

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, info: dict[str, Any]) -> None:
        """Starts saving; device buffers may be reused as soon as this returns.

        Args:
          state: to be saved under its own step.
          info: JSON values that travel along.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # There NumPy sees device memory itself, which the next step reuses.
            state = jax.tree.map(jnp.copy, state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state),
                    _INFO: ocp.args.JsonSave({"format": FORMAT_VERSION, **info}),
                }
            ),
            force=True,
        )

    def info(self, step: int) -> dict[str, Any]:
        """Returns the JSON values saved at `step`.

        Raises:
          CheckpointError: if they are of another format.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_INFO: ocp.args.JsonRestore()})
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self.directory}/{step} is damaged ({_first_line(error)}); remove "
                "that checkpoint to go on from the one before"
            ) from error
        info = restored[_INFO]
        if info.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.directory}/{step} has format {info.get('format')!r}; this "
                f"version reads {FORMAT_VERSION}: use the version that wrote it"
            )
        return info

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Restores a state.

        Args:
          like: a state of the same shapes, with the shardings wanted.
          step: which; None: the newest.

        Raises:
          CheckpointError: if there is none, or its arrays differ from `like`'s.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(no_checkpoint(self.directory.parent))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)}),
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self.directory}/{step} does not hold the state that this run's "
                f"config describes ({_first_line(error)}); use the config that made "
                "it, or another --workdir"
            ) from error
        logging.info("restored step %d from %s", step, self.directory)
        return restored[_STATE]

    def wait(self) -> None:
        """Waits until every started save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves and releases the directory."""
        self._manager.close()


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
        """Opens what a run directory has kept, if anything."""
        self._checkpoints = Checkpoints(workdir, keep=1, folder=BEST)
        self._fid, self._measurement = math.inf, None
        step = self._checkpoints.latest_step()
        if step is not None:
            info = self._checkpoints.info(step)
            self._fid, self._measurement = float(info["fid"]), info["measurement"]

    def offer(
        self, state: TrainState, found: dict[str, Any], info: dict[str, Any]
    ) -> None:
        """Saves a state if its FID is the lowest so far.

        One measured in another way, as after a resume with other settings, compares
        with none before it.
        """
        fid = found["fid"]
        measurement = {name: found[name] for name in MEASUREMENT}
        if self._measurement not in (None, measurement):
            logging.info("FID is measured in another way now; the best starts anew")
            self._fid = math.inf
        if fid < self._fid:
            self._fid, self._measurement = fid, measurement
            own = {"input": None, "fid": fid, "measurement": measurement}
            self._checkpoints.save(state, {**info, **own})
            logging.info("step %d has the lowest FID so far, %.3f", state.step, fid)

    def close(self) -> None:
        """Waits for saves and releases the directory."""
        self._checkpoints.close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def no_checkpoint(workdir: str | Path) -> str:
    """Returns the message for a run directory without a checkpoint."""
    return (
        f"{workdir} holds no checkpoint; train first, with "
        f"--mode=train --workdir={workdir}"
    )


def no_best_checkpoint(workdir: str | Path) -> str:
    """Returns the message for a run directory that keeps no best checkpoint."""
    return (
        f"{workdir} keeps no best checkpoint; training keeps one by FID where the "
        "config has evaluation.inception=True and a train.evaluate_every; use "
        "--checkpoint=latest"
    )
