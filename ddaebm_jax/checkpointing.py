"""Checkpoints of a run, by Orbax: asynchronous, the newest few kept, and verified.

A checkpoint holds two items: `state`, the whole TrainState, and `info`, plain JSON
(format version, the config, a table's columns, standardisation and fingerprint).
A step's data and noise are functions of (seed, step), so that the state alone fixes
how a run goes on: a resumed run is bit-identical to an unbroken one.

`info` also holds a checksum of every array of the state, and one of its own. They
become visible together with what they vouch for, by Orbax's one rename.

Checkpoints are taken for what a stranger may have written. Orbax and TensorStore read
JSON, protocol buffers and compressed arrays; neither loads a pickle, and no code of a
checkpoint is run. What it declares is compared with what is wanted before it is read.
"""

import contextlib
import errno
import hashlib
import json
import math
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

from ddaebm_jax import checksums, meetings, parallel
from ddaebm_jax.errors import InputError, OutOfStepError
from ddaebm_jax.minimax import TrainState

FORMAT_VERSION = 1
# Folders of a run directory: the newest checkpoints, and the one of the lowest FID.
NEWEST, BEST = "checkpoints", "best"
# Where what cannot be used is put, in case somebody wants to look at it.
DAMAGED = "damaged"
# Where the best goes whose step a rollback has taken back.
ABANDONED = "abandoned"
_STATE, _INFO = "state", "info"
_CHECKSUMS, _OWN_CHECKSUM = "checksums", "sha256"
# Orbax's names.
_INFO_FILE, _STEP_FILE = "metadata", "_CHECKPOINT_METADATA"
_TEXTS = (_INFO_FILE, _STEP_FILE, "_METADATA", "_sharding", ".zarray")
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX

_LARGEST_TEXT = 64 * 2**20
# Arrays that declare more bytes than this times their files are not believed; below
# the allowance they are harmless. Zeros, as of a young optimiser, compress well.
_LARGEST_COMPRESSION, _ALLOWANCE = 200, 256 * 2**20
# Errors that one failed save can leave behind; it writes a handful of small files.
_MOST_ERRORS = 20
# Steps that processes tell each other; a run keeps a handful.
_MOST_STEPS = 256
# One in the other.
_MORE_FOLDERS_THAN_A_SAVE_MAKES = ("trial",) * 8
# What says of an error that the content is at fault, and of TensorStore's text that it
# is not.
_DAMAGE_NUMBERS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_PASSING_WORDS = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
    *(
        os.strerror(number)
        for number in (
            errno.EIO,
            errno.ESTALE,
            errno.EMFILE,
            errno.ENFILE,
            errno.EACCES,
            errno.EPERM,
            errno.ENOSPC,
            errno.ENOMEM,
            errno.ETIMEDOUT,
        )
    ),
)


class CheckpointError(InputError):
    """A checkpoint that is missing or does not fit what is asked of it."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that does not hold what was once saved."""


class CheckpointReadError(CheckpointError):
    """A checkpoint that could not be read for now; nothing is said of what it holds."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written; those before it are intact."""


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


# What lies on disk.


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints of a directory, ascending.

    Complete means that all parts are there; `verify` tells whether they are intact.
    """
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if _is_complete(path)]
    return sorted(int(name) for name in names)


def unfinished_in(directory: Path) -> list[Path]:
    """Returns what a process has left that was killed while it saved.

    Orbax writes into a directory of another name, and renames it at the end.
    """
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _UNFINISHED in path.name)


def incomplete_in(directory: Path) -> list[int]:
    """Returns the steps of folders that lack a part, ascending.

    They were being deleted when a process was killed, or are damaged.
    """
    return sorted(set(_folders_in(directory)) - set(steps_in(directory)))


def _folders_in(directory: Path) -> list[int]:
    """Returns the steps of all folders with a step's name, ascending."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _is_step(path.name)]
    return sorted(int(path.name) for path in found if path.is_dir())


def _is_step(name: str) -> bool:
    plain = name.isascii() and name.isdigit() and len(name) <= 18
    return plain and str(int(name)) == name


def _is_complete(path: Path) -> bool:
    files = (path / _INFO / _INFO_FILE, path / _STEP_FILE)
    return (
        _is_step(path.name)
        and (path / _STATE).is_dir()
        and all(file.is_file() for file in files)
    )


def size_of(path: Path) -> int:
    """Returns the bytes of all files below a path; links are not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # It may just be deleted.
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns whatever reading a checkpoint raises into one of two errors.

    Orbax, TensorStore, JSON and the system raise a dozen kinds between them.

    Raises:
      CheckpointReadError: for a fault of the machine, which may pass.
      DamagedCheckpointError: for any other.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if _may_pass(error):
            raise CheckpointReadError(
                f"{path} could not be read ({_reason(error)}); it is not judged as "
                "damaged: see to the disk, its rights or memory, and try again"
            ) from error
        raise DamagedCheckpointError(f"{path}: {_reason(error)}") from error


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error tells of the machine rather than of what a file holds."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno not in _DAMAGE_NUMBERS
        if any(word in str(error) for word in _PASSING_WORDS):
            return True
        error = error.__cause__
    return False


def _not_looked_into(error: OSError) -> None:
    """Refuses to go on without a folder; `os.walk` would."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _check_files(path: Path) -> None:
    """Refuses what must not be opened: links out of the directory, pipes, devices."""
    root = path.parent.resolve()
    for folder, names, files in os.walk(path, onerror=_not_looked_into):
        for one in (Path(folder), *(Path(folder) / name for name in (*names, *files))):
            if one.is_symlink() and not one.resolve().is_relative_to(root):
                raise DamagedCheckpointError(
                    f"{one} is a link out of {root}, which is not followed"
                )
            if not (one.is_file() or one.is_dir()):
                raise DamagedCheckpointError(f"{one} is neither a file nor a folder")
            if one.name in _TEXTS and one.stat().st_size > _LARGEST_TEXT:
                raise DamagedCheckpointError(
                    f"{one} has {one.stat().st_size} bytes; at most {_LARGEST_TEXT} "
                    "are read"
                )


def _digest(info: dict[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, however they were laid out."""
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sealed(info: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(info))  # as it will be read
    return {**plain, _OWN_CHECKSUM: _digest(plain)}


def read_info(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's JSON values, and verifies them.

    Args:
      path: of the checkpoint, `<workdir>/<folder>/<step>`.

    Raises:
      DamagedCheckpointError: if they are not what was saved.
      CheckpointError: if they are of another format.
    """
    with _damage(path):
        _check_files(path)
        file = path / _INFO / _INFO_FILE
        if not _is_complete(path):
            raise DamagedCheckpointError(f"{path} lacks a part: it was never finished")
        info = json.loads(file.read_text())
        if not isinstance(info, dict):
            raise DamagedCheckpointError(f"{file} holds no JSON object")
        if _CHECKSUMS in info or _OWN_CHECKSUM in info:
            rest = {name: v for name, v in info.items() if name != _OWN_CHECKSUM}
            if info.get(_OWN_CHECKSUM) != _digest(rest):
                raise DamagedCheckpointError(f"{file} does not match its checksum")
            sums = info.get(_CHECKSUMS)
            if not isinstance(sums, dict) or not all(
                isinstance(one, str) for one in sums.values()
            ):
                raise DamagedCheckpointError(f"{file} lacks the state's checksums")
    if info.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {info.get('format')!r}; this version reads "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    return info


def _declared(path: Path) -> Any:
    """Returns the tree of a checkpoint's arrays as their files describe them.

    Raises:
      DamagedCheckpointError: if their sizes cannot be true.
    """
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(path / _STATE)).tree
    declared = 0
    for keys, leaf in jax.tree.leaves_with_path(tree):
        chunk = leaf.storage.chunk_shape if leaf.storage else leaf.shape
        if any(
            part > max(size, 1) for part, size in zip(chunk, leaf.shape, strict=True)
        ):
            raise DamagedCheckpointError(
                f"{path / _STATE}: {checksums.name_of(keys)} has parts of {chunk}, "
                f"larger than the whole, {leaf.shape}"
            )
        declared += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    on_disk = size_of(path / _STATE)
    if declared > _ALLOWANCE + _LARGEST_COMPRESSION * on_disk:
        raise DamagedCheckpointError(
            f"{path / _STATE} declares {declared} bytes of arrays in files of "
            f"{on_disk}; that much does not fit into them"
        )
    return tree


def verify(workdir: str | Path, folder: str, step: int) -> CheckpointError | None:
    """Verifies a checkpoint; no device computes, and no config is needed.

    The arrays are read into host memory. One that was saved by a version that made no
    checksums is only read.

    Args:
      workdir: the run directory.
      folder: NEWEST or BEST.
      step: of the checkpoint.

    Returns:
      What is wrong with it, None: nothing. A DamagedCheckpointError: it is not what
      was saved; a CheckpointReadError: it could not be read for now; another
      CheckpointError: it is of another format.
    """
    path = Path(workdir).resolve() / folder / str(step)
    try:
        with _damage(path):
            info = read_info(path)
            tree = _declared(path)
            expected = info.get(_CHECKSUMS)
            if expected is not None:
                _check_described(path, expected, tree)
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
            )
            with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                state = handler.restore(
                    epath.Path(path / _STATE),
                    args=ocp.args.PyTreeRestore(restore_args=as_numpy),
                )
            if expected is not None:
                _check_sums(path, expected, state)
    except CheckpointError as error:
        return error
    return None


def _check_described(path: Path, expected: dict[str, str], tree: Any) -> None:
    """Compares what the checksums are of with the arrays that the files declare."""
    kinds = {name: one.partition(" ")[0] for name, one in expected.items()}
    found = checksums.difference(kinds, checksums.described(tree))
    if found is not None:
        raise DamagedCheckpointError(f"{path / _STATE}: {found}")


def _check_sums(path: Path, expected: dict[str, str], state: Any) -> None:
    found = checksums.of_tree(state)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    if wrong or found.keys() != expected.keys():
        named = f" ({wrong[0]} first)" if wrong else ""
        raise DamagedCheckpointError(
            f"{path / _STATE}: {len(wrong)} of {len(expected)} arrays do not match "
            f"their checksums{named}"
        )


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
        folder: str = NEWEST,
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
          folder: NEWEST or BEST.

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
                    no_best_checkpoint(workdir)
                    if folder == BEST
                    else no_checkpoint(workdir)
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
            self.directory, item_names=(_STATE, _INFO), options=options
        )

    # Looking.

    def latest_step(self) -> int | None:
        """Returns the newest checkpoint's step, or None; see `steps`."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, damaged ones too, ascending."""
        return _folders_in(self.directory)

    def info(self, step: int) -> dict[str, Any]:
        """Returns the JSON values saved at `step`.

        Raises:
          DamagedCheckpointError: if they are not what was saved.
          CheckpointError: if they are of another format.
        """
        try:
            return read_info(self.directory / str(step))
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
          OutOfStepError: with several processes, if this one could not even begin.
        """
        if self._manager is None:
            raise ValueError("these checkpoints were opened to be read only")
        step = int(state.step)
        self._in_all(self.check)
        path = self.directory / str(step)
        if self._first_finds(lambda: step == self._pending or _is_complete(path)):
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
        values = _sealed(
            {"format": FORMAT_VERSION, **info, _CHECKSUMS: checksums.of_tree(state)}
        )
        if self._meetings is not None:
            self._meetings.begin()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(state),
                        _INFO: ocp.args.JsonSave(values),
                    }
                ),
                force=True,
            )
        except Exception as error:  # The system's, TensorStore's, Orbax's own.
            if jax.process_count() > 1:
                # The others wait within Orbax, where they cannot be told. What writes
                # files comes later; so this is a fault of memory, or of the program.
                raise OutOfStepError(
                    f"{path}: this process could not begin to save ({_reason(error)}); "
                    f"the checkpoints before it are intact ({self._listed()}): see to "
                    "its memory, or to what another process says, and start all of "
                    "them again with the same command"
                ) from error
            raise self._failed(step, error) from error
        self._pending = step

    def check(self) -> None:
        """Tells of a save that has failed since.

        One process waits for none. Several do, so that all come to know it here, and
        not one of them now and another at the next call.

        Raises:
          CheckpointWriteError: if one has failed.
        """
        if self._pending is None:
            return
        if jax.process_count() > 1 or not self._manager.is_saving_in_progress():
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
            logging.error("closing %s: %s", self.directory, _reason(error))

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
            logging.warning("%s cannot be read (%s)", self.directory, _reason(problem))
        return CheckpointWriteError(
            f"{self.directory}/{step} could not be written ({_reason(error)}); the "
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
                logging.debug("of the same failed save: %s", _reason(error))

    def _make_ready(self, step: int) -> None:
        """Makes sure that folders can be made; process 0 makes those of all.

        Where it cannot, the others would wait for them within Orbax, for minutes.
        """
        # When an earlier save had failed here, others may have been writing still.
        self._remove_unfinished()
        trial = self.directory / f"{step}{_UNFINISHED}"
        trial.joinpath(*_MORE_FOLDERS_THAN_A_SAVE_MAKES).mkdir(parents=True)
        _remove(trial)

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{_UNFINISHED}*"):
            _remove(path)

    def _listed(self) -> str:
        try:
            return ", ".join(map(str, self.steps())) or "there are none yet"
        except OSError as error:
            return f"they cannot be listed: {_reason(error)}"

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
            raise CheckpointError(no_checkpoint(self.directory.parent))
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
        for step in reversed(self._same_steps()):
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

    def _same_steps(self) -> list[int]:
        """Returns process 0's steps in all processes; see `steps`.

        Raises:
          CheckpointReadError: if the directory cannot be read.
        """
        steps, problem = [], None
        try:
            steps = self.steps()[-_MOST_STEPS:]
        except OSError as error:
            problem = _reason(error)
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
        with _agreed(path):
            info = read_info(path)
            self._check_fits(path, info, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Without Orbax's manager, which makes processes wait for one that has failed.
        with (
            _agreed(path),
            contextlib.closing(ocp.StandardCheckpointHandler()) as handler,
        ):
            state = handler.restore(
                epath.Path(path / _STATE), args=ocp.args.StandardRestore(abstract)
            )
        with _agreed(path):
            if _CHECKSUMS in info:
                _check_sums(path, info[_CHECKSUMS], state)
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
        if _CHECKSUMS in info:
            saved = {n: v.partition(" ")[0] for n, v in info[_CHECKSUMS].items()}
        else:
            saved = checksums.described(_declared(path))
        found = checksums.difference(wanted, saved)
        if found is not None:
            raise CheckpointError(
                f"{path} does not hold the state that this run's config describes "
                f"({found}); use the config that made it, or another --workdir"
            )
        if _CHECKSUMS in info:
            _check_described(path, info[_CHECKSUMS], _declared(path))

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
        found = unfinished_in(self.directory)
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
        step = newest.name.partition(_UNFINISHED)[0]
        try:
            self._move(newest, target / f"{prefix}{step}")
        except OSError as error:  # On a full disk it would only be in the way.
            logging.warning("deleting %s (%s)", newest, _reason(error))
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
    """Waits for Orbax's threads that go on writing when one of them has failed.

    They would disturb the next try, which writes into a directory of the same name.

    Returns:
      Whether all have ended; what one still writes must not be removed.
    """
    end, ended = time.monotonic() + seconds, True
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax.") and not thread.daemon:
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
        reason = "in process 0" if problem is None else _reason(problem)
        raise CheckpointWriteError(message.format(reason)) from problem


@contextlib.contextmanager
def _agreed(path: Path) -> Iterator[None]:
    """Reads a checkpoint; if one process cannot, none of them can.

    It is damaged for all where no process has an error of another kind.
    """
    problem: CheckpointError | None = None
    try:
        with _damage(path):
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
        self._checkpoints = Checkpoints(workdir, keep=1, folder=BEST)
        self._look()

    def _look(self) -> None:
        """Takes the FID from the checkpoint that is kept."""
        self._fid, self._measurement = math.inf, None
        self._kept = self._fid, self._measurement  # Before the save that is going on.
        for step in reversed(self._checkpoints._same_steps()):
            path = self._checkpoints.directory / str(step)
            try:
                with _agreed(path):
                    info = read_info(path)
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
            if step in self._checkpoints._same_steps():
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
        try:
            self.wait()
        except CheckpointWriteError as error:
            logging.warning("%s", error)
        later = [one for one in self._checkpoints._same_steps() if one > step]
        if later:
            self._checkpoints.set_aside(later, ABANDONED)
            self._look()

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


def _reason(error: Exception) -> str:
    """Returns an error's first line; of TensorStore's long chains, the end."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0].partition(" [tensorstore_spec")[0].partition(" [os_error")[0]
    return line if len(line) <= 200 else ": ".join(line.split(": ")[-2:])[-200:]


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
