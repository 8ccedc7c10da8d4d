"""Checkpoints of a run, by Orbax: asynchronous, the newest few kept, and verified.

A step's data and noise are functions of (seed, step), so that the state alone fixes
how a run goes on: a resumed run is bit-identical to an unbroken one. What lies on disk
is in `checkpoint_files`.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import LostProcessError, OutOfStepError
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoint_files, checksums, meetings
from ddaebm_jax.training.checkpoint_files import (
    CheckpointError,
    CheckpointReadError,
    CheckpointWriteError,
    DamagedCheckpointError,
    reason_of,
)

# Errors that one failed save can leave behind; it writes a handful of small files.
_MOST_ERRORS = 20
# Steps that processes tell each other; a run keeps a handful.
_MOST_STEPS = 256
# What Orbax calls the thread that waits for those that write, and keeps their error.
_COLLECTOR = "async_save"
# One in the other.
_MORE_FOLDERS_THAN_A_SAVE_MAKES = ("trial",) * 8
# Where what cannot be used is put, in case somebody wants to look at it.
DAMAGED = "damaged"
# Where the best goes whose step a rollback has taken back.
ABANDONED = "abandoned"


class Restored(NamedTuple):
    """A verified checkpoint.

    Attributes:
      step: its step.
      state: its state.
      info: the JSON values that travelled along.
    """

    step: int
    state: Any
    info: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

    With several processes all of them make the same calls.

    Attributes:
      directory: `<workdir>/checkpoints`, or `<workdir>/best`.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 3,
        read_only: bool = False,
        folder: str = checkpoint_files.NEWEST,
    ) -> None:
        """Opens the checkpoints of a run.

        What a killed process has left unfinished is moved to
        `<workdir>/damaged/unfinished-<folder>-<step>`. Only the newest such remains is
        kept, there too: older ones are deleted, or a run that is killed again and
        again would fill the disk.

        Args:
          workdir: the run directory.
          keep: newest checkpoints kept.
          read_only: for modes that only restore; nothing is created, moved or cleaned.
          folder: checkpoint_files.NEWEST or checkpoint_files.BEST.

        Raises:
          CheckpointError: with `read_only`, if there is no checkpoint directory.
          CheckpointWriteError: if the directory cannot be made.
        """
        self._workdir = Path(workdir).resolve()
        self._folder = folder
        self.directory = self._workdir / folder
        self._pending: int | None = None  # The step that is being saved.
        self._manager: ocp.CheckpointManager | None = None
        self._meetings: meetings.Meetings | None = None
        if read_only:
            if not self.directory.is_dir():
                raise CheckpointError(
                    checkpoint_files.no_best_checkpoint(workdir)
                    if folder == checkpoint_files.BEST
                    else checkpoint_files.no_checkpoint(workdir)
                )
            return

        def prepare() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._set_unfinished_aside()

        _by_the_first(
            prepare,
            f"{self.directory} cannot be made ({{}}); make room, or name another "
            "--workdir",
        )
        self._meetings, together = meetings.options(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            # What else it reads of old checkpoints may be damaged.
            lightweight_initialize=True,
            **together,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(checkpoint_files.STATE, checkpoint_files.INFO),
            options=options,
        )

    # Looking.

    def latest_step(self) -> int | None:
        """Returns the newest checkpoint's step, or None; see `steps`."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, damaged ones too, ascending."""
        return checkpoint_files.folders_in(self.directory)

    def info(self, step: int) -> dict[str, Any]:
        """Returns the JSON values saved at `step`.

        Raises:
          DamagedCheckpointError: if they are not what was saved.
          CheckpointError: if they are of another format.
        """
        try:
            return checkpoint_files.read_info(self.directory / str(step))
        except DamagedCheckpointError as error:
            raise _named_as_damaged(self.directory / str(step), error) from error

    # Writing.

    def save(self, state: TrainState, info: dict[str, Any]) -> None:
        """Starts saving; device buffers may be reused as soon as this returns.

        A step that is there already is left alone; one that lacks a part is moved to
        `<workdir>/damaged` first. An older checkpoint is deleted only
        after this one is complete.

        Args:
          state: to be saved under its own step.
          info: JSON values that travel along.

        Raises:
          CheckpointWriteError: if it could not be written; or if an earlier one could
            not, and then this one has not been started. What was left of the failed
            one is removed, and saving may be tried again. All processes raise it, if
            one does.
          OutOfStepError: with several processes, if this one could not even begin;
            LostProcessError, if because another one is gone.
        """
        if self._manager is None:
            raise ValueError("these checkpoints were opened to be read only")
        step = int(state.step)
        self._in_all(self.check)
        path = self.directory / str(step)
        if self._first_finds(
            lambda: step == self._pending or checkpoint_files.is_complete(path)
        ):
            return
        self._in_all(self.wait)
        if self._first_finds(lambda: os.path.lexists(path)):
            self.set_aside([step])
        if jax.process_count() > 1:
            _by_the_first(
                lambda: self._make_ready(step),
                f"{path} could not be written ({{}}); the checkpoints before it are "
                f"intact ({self._listed()}): make room, or see to the rights of the "
                "directory",
            )
        if jax.default_backend() == "cpu":
            # There NumPy sees device memory itself, which the next step reuses.
            state = jax.tree.map(jnp.copy, state)
        values = checkpoint_files.sealed(
            {
                "format": checkpoint_files.FORMAT_VERSION,
                **info,
                checkpoint_files.CHECKSUMS: checksums.of_tree(state),
            }
        )
        if self._meetings is not None:
            self._meetings.begin()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        checkpoint_files.STATE: ocp.args.StandardSave(state),
                        checkpoint_files.INFO: ocp.args.JsonSave(values),
                    }
                ),
                force=True,
            )
        except Exception as error:  # The system's, TensorStore's, Orbax's own.
            if parallel.comes_of_others(error):
                raise LostProcessError(error) from error
            if jax.process_count() > 1:
                # The others wait within Orbax, where they cannot be told. What writes
                # files comes later; so this is a fault of memory, or of the program.
                raise OutOfStepError(
                    f"{path}: this process could not begin to save "
                    f"({reason_of(error)}); the checkpoints before it are intact "
                    f"({self._listed()}): see to its memory, or to what another "
                    "process says, and start all of them again with the same command"
                ) from error
            raise self._failed(step, error) from error
        self._pending = step

    def check(self) -> None:
        """Tells of a save that has failed since; waits for none that is under way.

        Of several processes all call it, and all look at what they have come to when
        all of them have ended.

        Raises:
          CheckpointWriteError: if one has failed.
        """
        if self._pending is None:
            return
        if parallel.all_agree(not self._manager.is_saving_in_progress()):
            self.wait()

    def wait(self) -> None:
        """Waits until every started save is complete on disk.

        Raises:
          CheckpointWriteError: if one has failed.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            step, self._pending = self._pending, None
            raise self._failed(step, error) from error
        self._pending = None  # Not before: an interruption may end the waiting.

    def close(self) -> None:
        """Waits for saves and releases the directory; what fails is only logged.

        Other errors may be on their way here. `wait` tells whether all was saved.
        """
        if self._manager is None:
            return
        try:
            self.wait()
        except CheckpointWriteError as error:
            logging.error("%s", error)
        self._forget_errors()
        try:
            self._manager.close()
        except Exception as error:
            logging.error("closing %s: %s", self.directory, reason_of(error))

    def _in_all(self, action: Callable[[], None]) -> None:
        """Looks for failed saves in all processes; all raise if one of them finds one.

        Raises:
          CheckpointWriteError: as said.
        """
        problem = None
        try:
            action()
        except CheckpointWriteError as error:
            problem = error
        if not parallel.all_agree(problem is None):
            raise problem or CheckpointWriteError(
                f"a checkpoint in {self.directory} could not be written by another "
                "process; see what that one says"
            )

    def _first_finds(self, question: Callable[[], bool]) -> bool:
        """Returns what process 0 finds; another's view of the disk may be out of date.

        Raises:
          CheckpointWriteError: in all processes, if it cannot look.
        """
        answers: list[bool] = []
        _by_the_first(
            lambda: answers.append(question()),
            f"{self.directory} cannot be read ({{}}); see to the disk and its rights",
        )
        return parallel.all_agree(all(answers))

    @staticmethod
    def _first_says(value: bool) -> bool:
        """Returns process 0's value; another's view of the disk may be out of date."""
        return parallel.all_agree(value or not parallel.is_first_process())

    def _failed(self, step: int | None, error: Exception) -> CheckpointWriteError:
        """Removes what is left of a save that failed; returns the error to raise."""
        ended = _join_writers()
        if ended and parallel.is_first_process():
            self._remove_unfinished()
        self._forget_errors()
        try:
            # Orbax has counted it in, and those out that would have been deleted after.
            self._manager.reload()
        except OSError as problem:  # The save's own error is the one to be told.
            logging.warning(
                "%s cannot be read (%s)",
                self.directory,
                reason_of(problem),
            )
        return CheckpointWriteError(
            f"{self.directory}/{step} could not be written ({reason_of(error)}); the "
            f"checkpoints before it are intact ({self._listed()}): make room, or see "
            "to the rights of the directory"
        )

    def _forget_errors(self) -> None:
        """Takes what a failed save has left in Orbax's queues.

        It gives one error at a time, and would blame the next save for the others.
        """
        for _ in range(_MOST_ERRORS):
            try:
                self._manager.check_for_errors()
                return
            except Exception as error:
                logging.debug("of the same failed save: %s", reason_of(error))

    def _make_ready(self, step: int) -> None:
        """Makes sure that folders can be made; process 0 makes those of all.

        Where it cannot, the others would wait for them within Orbax, for minutes.
        """
        # When an earlier save had failed here, others may have been writing still.
        self._remove_unfinished()
        trial = self.directory / f"{step}{checkpoint_files.UNFINISHED}"
        trial.joinpath(*_MORE_FOLDERS_THAN_A_SAVE_MAKES).mkdir(parents=True)
        _remove(trial)

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{checkpoint_files.UNFINISHED}*"):
            _remove(path)

    def _listed(self) -> str:
        try:
            return ", ".join(map(str, self.steps())) or "there are none yet"
        except OSError as error:
            return f"they cannot be listed: {reason_of(error)}"

    # Restoring.

    def restore(self, like: Any, step: int | None = None) -> Any:
        """Restores and verifies a state; see `restore_one`.

        Args:
          like: a state of the same shapes, with the shardings wanted.
          step: which; None: the newest.

        Raises:
          DamagedCheckpointError: if it is not what was saved.
          CheckpointError: if there is none, or its arrays differ from `like`'s.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(checkpoint_files.no_checkpoint(self.directory.parent))
        return self.restore_one(like, step).state

    def restore_one(self, like: Any, step: int) -> Restored:
        """Restores and verifies the checkpoint of a step.

        Args:
          like: a state of the same shapes, with the shardings wanted.
          step: of the checkpoint.

        Raises:
          DamagedCheckpointError: if it is not what was saved.
          CheckpointError: if its arrays differ from `like`'s.
        """
        self.wait()
        try:
            return self._load(like, step)
        except DamagedCheckpointError as error:
            raise _named_as_damaged(self.directory / str(step), error) from error

    def restore_newest(self, like: Any) -> Restored | None:
        """Restores the newest checkpoint that is intact.

        Every one that is not is logged with the reason. Where an older one is intact,
        the damaged ones are then moved to `<workdir>/damaged/<folder>-<step>`, so that
        their steps can be saved again; with `read_only` they stay.

        Args:
          like: a state of the same shapes, with the shardings wanted.

        Returns:
          The checkpoint; None if there is none at all.

        Raises:
          CheckpointError: if there are some but none is intact, or an intact one does
            not fit `like`, or one cannot be read for now. Nothing has been moved then.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.same_steps()):
            try:
                found = self._load(like, step)
            except DamagedCheckpointError as error:
                damaged[step] = str(error)
                logging.warning("a checkpoint is of no use: %s", error)
                continue
            if damaged and self._manager is not None:
                self.set_aside(sorted(damaged))
            return found
        if not damaged:
            return None
        raise CheckpointError(
            f"no checkpoint in {self.directory} is intact: "
            f"{'; '.join(damaged.values())}. Nothing was changed: bring a copy of one "
            "back, or name a new --workdir"
        )

    def same_steps(self) -> list[int]:
        """Returns process 0's steps in all processes; see `steps`.

        Raises:
          CheckpointReadError: if the directory cannot be read.
        """
        steps, problem = [], None
        try:
            steps = self.steps()[-_MOST_STEPS:]
        except OSError as error:
            problem = reason_of(error)
        if not self._first_says(problem is None):
            raise CheckpointReadError(
                f"{self.directory} could not be read ({problem or 'by process 0'}); "
                "see to the disk and its rights, and try again"
            )
        if jax.process_count() == 1:
            return steps
        from jax.experimental import multihost_utils

        told = np.full((_MOST_STEPS, 2), -1, np.int32)  # JAX has no int64 here.
        told[: len(steps)] = np.reshape([divmod(one, 2**31) for one in steps], (-1, 2))
        found = np.asarray(multihost_utils.broadcast_one_to_all(told))
        return [int(high) * 2**31 + int(low) for high, low in found if low >= 0]

    def _load(self, like: Any, step: int) -> Restored:
        """Restores and verifies one checkpoint; all processes come to one verdict."""
        path = self.directory / str(step)
        with agreed(path):
            info = checkpoint_files.read_info(path)
            self._check_fits(path, info, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Without Orbax's manager, which makes processes wait for one that has failed.
        with (
            agreed(path),
            contextlib.closing(ocp.StandardCheckpointHandler()) as handler,
        ):
            state = handler.restore(
                epath.Path(path / checkpoint_files.STATE),
                args=ocp.args.StandardRestore(abstract),
            )
        with agreed(path):
            if checkpoint_files.CHECKSUMS in info:
                checkpoint_files.check_sums(
                    path, info[checkpoint_files.CHECKSUMS], state
                )
            else:
                logging.warning(
                    "%s was saved without checksums, by an older version: it cannot be "
                    "verified",
                    path,
                )
            if int(state.step) != step:
                raise DamagedCheckpointError(
                    f"{path} holds the state of step {int(state.step)}"
                )
        logging.info("restored step %d from %s", step, self.directory)
        return Restored(step, state, info)

    def _check_fits(self, path: Path, info: dict[str, Any], like: Any) -> None:
        """Compares the arrays with those wanted, before anything of them is read.

        What was saved decides whether it fits; only where that is not known, what
        the files declare.
        """
        wanted = checksums.described(like)
        if checkpoint_files.CHECKSUMS in info:
            saved = {
                n: v.partition(" ")[0]
                for n, v in info[checkpoint_files.CHECKSUMS].items()
            }
        else:
            saved = checksums.described(checkpoint_files.declared(path))
        found = checksums.difference(wanted, saved)
        if found is not None:
            raise CheckpointError(
                f"{path} does not hold the state that this run's config describes "
                f"({found}); use the config that made it, or another --workdir"
            )
        if checkpoint_files.CHECKSUMS in info:
            checkpoint_files.check_described(
                path, info[checkpoint_files.CHECKSUMS], checkpoint_files.declared(path)
            )

    # Setting aside.

    def set_aside(self, steps: list[int], to: str = DAMAGED) -> None:
        """Moves checkpoints to another folder; their steps can be saved again.

        Args:
          steps: of the checkpoints.
          to: that folder of the run directory.

        Raises:
          CheckpointWriteError: in all processes, if they cannot be moved.
        """

        def move() -> None:
            for step in steps:
                self._move(
                    self.directory / str(step),
                    self._workdir / to / f"{self._folder}-{step}",
                )

        _by_the_first(
            move,
            f"what is of no use in {self.directory} cannot be moved to "
            f"{self._workdir / to} ({{}}); see to the room and the rights there",
        )
        self._manager.reload()

    def _set_unfinished_aside(self) -> None:
        """Moves the newest unfinished checkpoint away, and deletes older ones."""
        found = checkpoint_files.unfinished_in(self.directory)
        if not found:
            return
        found.sort(key=lambda path: path.lstat().st_mtime)
        target = self._workdir / DAMAGED
        prefix = f"unfinished-{self._folder}-"
        older = [*target.glob(f"{prefix}*"), *found[:-1]]
        for path in older:
            logging.info("deleting what was left of an unfinished save: %s", path)
            _remove(path)
        newest = found[-1]
        step = newest.name.partition(checkpoint_files.UNFINISHED)[0]
        try:
            self._move(newest, target / f"{prefix}{step}")
        except OSError as error:  # On a full disk it would only be in the way.
            logging.warning("deleting %s (%s)", newest, reason_of(error))
            _remove(newest)

    def _move(self, path: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        free, count = target, 0
        while free.exists() or free.is_symlink():
            count += 1
            free = target.with_name(f"{target.name}-{count}")
        shutil.move(path, free)  # The folder may lie on another disk.
        logging.warning("moved %s to %s", path, free)


def _join_writers(seconds: float = 60.0) -> bool:
    """Waits for Orbax's threads that go on when one of them has failed.

    They would disturb the next try, which writes into a directory of the same name,
    and would have it blamed for what they come to.

    Returns:
      Whether all have ended; what one still writes must not be removed.
    """
    end, ended = time.monotonic() + seconds, True
    for thread in threading.enumerate():
        orbax = type(thread).__module__.startswith("orbax.")
        if (orbax or thread.name == _COLLECTOR) and not thread.daemon:
            with contextlib.suppress(Exception):  # Its own, known already.
                thread.join(max(0.1, end - time.monotonic()))
            ended = ended and not thread.is_alive()
    return ended


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        for _ in range(3):  # Something may still be written into it.
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                return
            time.sleep(0.05)


def _by_the_first(action: Callable[[], None], message: str) -> None:
    """Lets process 0 do something with the disk, while the others wait.

    Args:
      action: what to do.
      message: of the error, with a place for the reason.

    Raises:
      CheckpointWriteError: in all processes, if the system does not let it.
    """
    problem = None
    if parallel.is_first_process():
        try:
            action()
        except OSError as error:
            problem = error
    if not parallel.all_agree(problem is None):
        reason = "in process 0" if problem is None else reason_of(problem)
        raise CheckpointWriteError(message.format(reason)) from problem


@contextlib.contextmanager
def agreed(path: Path) -> Iterator[None]:
    """Reads a checkpoint; if one process cannot, none of them can.

    It is damaged for all where no process has an error of another kind.
    """
    problem: CheckpointError | None = None
    try:
        with checkpoint_files.damage(path):
            yield
    except CheckpointError as error:
        problem = error
    damaged = isinstance(problem, DamagedCheckpointError)
    good = parallel.all_agree(problem is None)
    if not parallel.all_agree(problem is None or damaged):
        if problem is None or damaged:
            raise CheckpointReadError(
                f"{path}: another process could not read it; see what that one says"
            ) from problem
    elif not good and problem is None:
        problem = DamagedCheckpointError(f"{path}: another process could not read it")
    if problem is not None:
        raise problem


def _named_as_damaged(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged ({error}); name another --checkpoint, or move that one "
        "away to go on from the one before"
    )
