"""Checkpoints of a run, by Orbax: asynchronous, the newest few and the best by FID.

A checkpoint holds the state and `info`: JSON values, a checksum of every array and one
of itself, for the damage that Orbax does not notice (docs/checkpoints.md). Several
processes make the same calls; an error ends the process that meets it.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ddaebm_jax import files, progress
from ddaebm_jax.errors import InputError, TrainingError, one_line
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import checksums

NEWEST, BEST, DAMAGED = "checkpoints", "best", "damaged"  # Folders of a run directory.
# Arrays may declare so many times the bytes of their files, since zeros are compressed.
_ALLOWANCE, _MOST_COMPRESSION = 256 * 2**20, 200


class CheckpointError(InputError):
    """A checkpoint that is missing, cannot be read, or does not fit the config."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that does not hold what was saved."""


class SaveError(TrainingError):
    """A checkpoint that could not be written; those before it are intact."""


class Restored(NamedTuple):
    """A verified checkpoint: its step, its state, and the JSON values saved with it."""

    step: int
    state: Any
    info: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory; `pending` is the save under way, if any."""

    def __init__(self, workdir: str | Path, keep: int = 3, read_only: bool = False):
        """Opens a run's checkpoints; deletes unfinished ones, unless `read_only`."""
        self.pending: tuple[int, bool, futures.Future] | None = None
        workdir = user_path(workdir).resolve()
        self._workdir = _LiteralPath(_checked(workdir))
        if not read_only:
            workdir.mkdir(parents=True, exist_ok=True)
        self._keep, self._read_only = keep, read_only
        self._managers: dict[bool, ocp.CheckpointManager] = {}
        self._thread = futures.ThreadPoolExecutor(1)
        if not read_only:
            self._manager()

    def path(self, step: int | str, best: bool = False) -> epath.Path:
        """Returns the folder of a checkpoint."""
        return self._workdir / (BEST if best else NEWEST) / str(step)

    def steps(self, best: bool = False) -> list[int]:
        """Returns the steps of all checkpoints, damaged ones too, ascending."""
        folder = self.path("", best)
        names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def _manager(self, best: bool = False) -> ocp.CheckpointManager:
        """Returns Orbax's manager, opened on first use."""
        options: dict[str, Any] = {"max_to_keep": self._keep}
        if best:
            options = {"max_to_keep": 1, "keep_checkpoints_without_metrics": False}
            options |= {"best_fn": lambda found: found["fid"], "best_mode": "min"}
        if jax.process_count() > 1:
            options["async_options"] = ocp.AsyncOptions(barrier_sync_fn=_barrier)
        # Lightweight: what else it would read of old checkpoints may be damaged.
        options |= {"cleanup_tmp_directories": True, "lightweight_initialize": True}
        if best not in self._managers:
            self._managers[best] = ocp.CheckpointManager(
                self.path("", best), options=ocp.CheckpointManagerOptions(**options)
            )
        return self._managers[best]

    def _close_manager(self, best: bool = False) -> None:
        if manager := self._managers.pop(best, None):
            # A failed save raises once more, and would keep the rest from closing.
            for end in (manager.wait_until_finished, manager.close):
                with contextlib.suppress(Exception):
                    end()

    def save_best(self, state: Any, info: dict[str, Any], fid: float) -> None:
        """Starts saving if the FID is the lowest so far; raises as `save`."""
        self.wait()
        kept = []
        for step in self.steps(best=True):
            try:
                kept.append(self.info(step, best=True)["fid"])
            except DamagedCheckpointError:
                self._set_aside([step], best=True)
        if fid < min(kept, default=math.inf):
            self.save(state, {**info, "fid": fid}, {"fid": fid})

    def save(self, state: Any, info: dict[str, Any], metrics: Any = None) -> None:
        """Starts saving under `state.step`, unless it is there; buffers may be reused.

        Waits for the save before. Raises SaveError if it, or this one, has failed.
        """
        self.wait()
        step, best = int(state.step), metrics is not None
        try:
            manager = self._manager(best)
            if step in manager.all_steps():
                return
            if jax.default_backend() == "cpu":
                # There a save reads device memory itself, which the next step reuses.
                state = jax.tree.map(jnp.copy, state)
            info = {**info, "arrays": checksums.described(state)}
            info = _sealed({**info, "checksums": checksums.of_tree(state)})
            state, info = ocp.args.StandardSave(state), ocp.args.JsonSave(info)
            items = ocp.args.Composite(state=state, info=info)
            manager.save(step, args=items, force=True, metrics=metrics)
        except Exception as error:  # The system's, TensorStore's, Orbax's own.
            raise self._failed(step, best, error) from error
        self.pending = step, best, self._thread.submit(self._settle, step, best)

    def _settle(self, step: int, best: bool) -> None:
        """Waits for a save and finds it on disk: its files describe what was saved."""
        self._managers[best].wait_until_finished()
        if jax.process_index() == 0:  # Others may see the files later.
            self.info(step, best)

    def save_whole(self, state: Any, info: dict[str, Any]) -> None:
        """Saves, waits, and reads it back; a damaged one is written once more."""
        step = int(state.step)
        for attempt in range(2):
            self.save(state, info)
            self.wait()
            if jax.process_index():
                return
            try:
                return self.verify(step)
            except DamagedCheckpointError as error:
                self._set_aside([step])
                if attempt or jax.process_count() > 1:
                    raise self._failed(step, False, error) from error

    def poll(self) -> None:
        """Checks on a save that has ended; never blocks, raises as `wait`."""
        if self.pending is not None and self.pending[2].done():
            self.wait()

    def wait(self) -> None:
        """Waits until a save is whole on disk; raises a SaveError if it is not."""
        if self.pending is not None:
            step, best, settled = self.pending
            futures.wait([settled])  # A signal may end this; then it stays pending.
            self.pending = None
            if error := settled.exception():
                raise self._failed(step, best, error) from error

    def _failed(self, step: int, best: bool, error: BaseException) -> SaveError:
        """Returns the error to raise, and closes the manager that has failed."""
        # Orbax's manager counts the step as saved, and raises again at the next one.
        self._close_manager(best)
        kept = ", ".join(str(one) for one in self.steps(best) if one != step)
        return SaveError(
            f"{self.path(step, best)} could not be written ({one_line(error)}); the "
            f"checkpoints before it are intact ({kept or 'there are none yet'}): make "
            "room, or check the permissions of the directory, and repeat the same "
            "command, which continues from the newest"
        )

    def close(self) -> None:
        """Waits for the save and releases the directory; a failure is only logged."""
        try:
            self.wait()
        except SaveError as error:
            logging.warning("%s", error)
        for best in list(self._managers):
            self._close_manager(best)
        self._thread.shutdown()

    def restore(self, like: Any, step: int | None = None, best: bool = False):
        """Returns the `Restored` of a step; by default of the newest, or of the best.

        `like` is a state, or its shapes with the shardings of the result. Raises a
        CheckpointError; a DamagedCheckpointError if it is not what was saved.
        """
        self.wait()
        steps = self.steps(best) if step is None else [step]
        if not steps:
            best_one = "best checkpoint (see evaluation.inception)"
            which = best_one if best else "checkpoint"
            raise CheckpointError(f"{self._workdir} holds no {which}; train first")
        return _load(self.path(steps[-1], best), like)

    def restore_newest(self, like: Any) -> Restored | None:
        """Restores the newest intact one, or None; damaged ones are moved away."""
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = _load(self.path(step), like)
            except DamagedCheckpointError as error:
                if jax.process_count() > 1:  # Another may have found it intact.
                    raise
                progress.log(f"skipping a checkpoint: {error}", logging.WARNING)
                damaged[step] = str(error)
                continue
            if damaged and not self._read_only:
                self._set_aside(list(damaged))
            return found
        if damaged:
            raise CheckpointError(
                f"no checkpoint of {self._workdir} is intact: "
                f"{'; '.join(damaged.values())}. Nothing was changed: bring a copy of "
                "one back, or name a new --workdir"
            )
        return None

    def _set_aside(self, steps: list[int], best: bool = False) -> None:
        target = self._workdir / DAMAGED
        for step in steps if jax.process_index() == 0 else ():
            target.mkdir(exist_ok=True)
            path = self.path(step, best)
            moved = target / f"{path.parent.name}-{step}-{time.time_ns()}"
            shutil.move(path, moved)
            progress.log(f"moved a damaged checkpoint to {moved}", logging.WARNING)
        self._close_manager(best)  # The next one, for which all wait, looks again.

    def verify(self, step: int, best: bool = False) -> None:
        """Reads a checkpoint into host memory and verifies it; raises as `restore`."""
        _load(self.path(step, best))

    def info(self, step: int, best: bool = False) -> dict[str, Any]:
        """Returns a checkpoint's JSON values; raises as `restore`."""
        return _load(self.path(step, best), read_arrays=False).info


class _LiteralPath(type(epath.Path())):
    """A path in which `glob` takes only its argument for a pattern.

    In `runs/seed[0]` Orbax 0.12 finds no files otherwise, and writes no index of them.
    """

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        return iter([self / name for name in glob.glob(pattern, root_dir=self)])


def _checked(path: Path) -> Path:
    """Returns the path, unless Orbax or TensorStore would take it for another."""
    text = str(path).encode(errors="replace").decode()
    if text != str(path) or re.search(r"\\|:/", f"{text}/"):
        raise CheckpointError(
            f"{str(path)!r}: checkpoints cannot be saved below a name that holds a "
            "backslash, ends in a colon or is not UTF-8; rename it"
        )
    return path


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier; raises where a save has failed, since the others do not come."""
    if failure := sys.exc_info()[1]:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _load(path: epath.Path, like: Any = None, read_arrays: bool = True) -> Restored:
    """Reads and verifies a checkpoint; damaged: its files are readable, but not it."""
    try:
        return _read(path, like, read_arrays)
    except CheckpointError:
        raise
    except Exception as error:
        try:
            if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
                raise
            for one in Path(path).rglob("*"):
                one.read_bytes() if one.is_file() else os.scandir(one).close()
        except Exception as reason:
            raise CheckpointError(
                f"{path} cannot be read ({one_line(reason)}), which does not mean that "
                "it is damaged: check the disk, its permissions and memory"
            ) from error
        raise DamagedCheckpointError(f"{path} is damaged: {one_line(error)}") from error


def _read(path: epath.Path, like: Any, read_arrays: bool) -> Restored:
    info = json.loads(files.read_text(Path(path / "info" / "metadata"), 64 * 2**20))
    rest = {name: value for name, value in info.items() if name != "sha256"}
    if info.get("sha256") != _sealed(rest)["sha256"]:
        raise ValueError("its info does not match its checksum")
    state = None
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(path / "state").tree
        _compare(info["arrays"], checksums.described(tree))
        sizes = (math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        size, on_disk = sum(sizes), sum(x.stat().st_size for x in Path(path).rglob("*"))
        if size > _ALLOWANCE + _MOST_COMPRESSION * on_disk:
            raise ValueError(f"{on_disk} bytes cannot hold {size}")
        if like is None:  # NumPy's arrays, but without their memory.
            like = jax.tree.map(
                lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree
            )
        try:
            _compare(info["arrays"], checksums.described(like))
        except ValueError as error:
            raise CheckpointError(
                f"{path} does not hold the state that this run's config describes "
                f"({error}); use the config that made it, or another --workdir"
            ) from error
        if read_arrays:
            layout = ocp.checkpoint_utils.construct_restore_args(like)
            args = ocp.args.PyTreeRestore(like, layout)
            state = handler.restore(path / "state", args=args)
            _compare(info["checksums"], checksums.of_tree(state))
    return Restored(int(path.name), state, info)


def _compare(saved: dict[str, str], found: dict[str, str]) -> None:
    for name in sorted(saved.keys() | found.keys()):
        one, other = saved.get(name, "absent"), found.get(name, "absent")
        if one != other:
            raise ValueError(f"{name} is {other}, not {one}")


def _sealed(info: dict[str, Any]) -> dict[str, Any]:
    """Returns JSON values with a checksum of their own."""
    text = json.dumps(info, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {**json.loads(text), "sha256": digest}
