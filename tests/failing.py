"""What processes do that work together, and of which one fails.

Called by `processes.Forked`; nothing here may start a device when it is imported.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ddaebm_jax import minimax
from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import OutOfStepError, TrainingError
from ddaebm_jax.training import checkpoint_files, recovery
from ddaebm_jax.training import checkpoints as checkpointing

STEPS = 6


def state_of(step: int) -> minimax.TrainState:
    """Returns what a run of a few arrays has come to, of NumPy's arrays."""
    rng = np.random.default_rng(0)
    # Whole numbers, so that any way of adding gives the same.
    first = rng.integers(-1000, 1000, (300, 4)).astype(np.float32)
    return minimax.TrainState(
        step=np.int32(step),
        variables={"w": first + np.float32(step)},
        ema={"w": first[0] - np.float32(step)},
        opt_energy=(),
        opt_generator=None,
    )


def _placed(step: int, fsdp: bool) -> minimax.TrainState:
    """Returns that state on the devices of all processes; the largest array split."""
    mesh = parallel.make_mesh(0)

    def place(value: np.ndarray) -> jax.Array:
        split = fsdp and np.ndim(value) == 2
        spec = jax.sharding.PartitionSpec(*((parallel.DATA_AXIS,) if split else ()))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.make_array_from_callback(
            np.shape(value), sharding, lambda index: value[index]
        )

    return jax.tree.map(place, state_of(step))


def _step(state: minimax.TrainState) -> minimax.TrainState:
    return state.replace(
        step=state.step + 1,
        variables=jax.tree.map(lambda x: x + 1, state.variables),
        ema=jax.tree.map(lambda x: x - 1, state.ema),
    )


def _join(number: int, port: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")
    parallel.join(parallel.Processes(f"localhost:{port}", 2, number))


def _told(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def _no_room() -> Callable[[], None]:
    """Lets this process write no files worth the name; returns what lets it again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _no_folders() -> Callable[[], None]:
    """Lets this process make no folders of checkpoints."""
    before = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoints" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        before(path, *args, **kwargs)

    os.mkdir = mkdir
    return lambda: setattr(os, "mkdir", before)


def _no_memory() -> Callable[[], None]:
    """Lets this process not even begin to save."""

    def begin(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory is left")

    ocp.StandardCheckpointHandler.async_save = begin
    return lambda: None


_FAULTS = {"room": _no_room, "folders": _no_folders, "memory": _no_memory}


def run(
    number: int,
    port: int,
    workdir: str,
    fault: str | None = None,
    passes: bool = False,
    patience: float = 600,
    fsdp: bool = False,
) -> None:
    """Goes on with a run, as training does; process by process with or without fault.

    The fault comes when step 2 is safe, and passes when it has been noticed.
    """
    _join(number, port)
    checkpoints = checkpointing.Checkpoints(workdir)
    found = checkpoints.restore_newest(_placed(0, fsdp))
    state = _placed(0, fsdp) if found is None else found.state
    saver = recovery.Saver(checkpoints, patience)
    step, heal, noticed = jax.jit(_step, donate_argnums=0), None, {}
    first = int(state.step)
    try:
        while int(state.step) < STEPS:
            if int(state.step) == 2:
                checkpoints.wait()
                parallel.wait_for_all("step 2 is safe")
                heal = _FAULTS[fault]() if fault else None
            state = step(state)
            if saver.failing and not noticed:
                noticed = {
                    "at": int(state.step),
                    "steps": checkpoints.steps(),
                    "verified": checkpoint_files.verify(workdir, "checkpoints", 2),
                }
                if passes and heal is not None:
                    heal()
            saver.look()
            if int(state.step) == STEPS:
                saver.finish(state, {}, wait=True)
            elif saver.due():
                saver.finish(state, {}, wait=False)
            else:
                saver.save(state, {})
    except (TrainingError, jax.errors.JaxRuntimeError) as error:
        _told(error=str(error), kind=type(error).__name__)
        if not isinstance(error, TrainingError) or isinstance(error, OutOfStepError):
            os._exit(2)  # As the command line does.
        checkpoints.close()
        os._exit(2)
    checkpoints.close()
    _told(first=first, noticed=noticed)
    jax.distributed.shutdown()  # Waits for the other, which ends if this one is gone.


def notice(number: int, port: int, workdir: str, fault: str | None) -> None:
    """Looks, and saves no more, until all know that a save has failed in one."""
    _join(number, port)
    checkpoints = checkpointing.Checkpoints(workdir)
    saver = recovery.Saver(checkpoints, 600)
    saver.finish(_placed(1, True), {}, wait=True)
    heal = _FAULTS[fault]() if fault else None
    saver.save(_placed(2, True), {})
    looks = 0
    while not saver.failing:
        time.sleep(0.05)
        saver.look(meeting=False)
        assert not saver.failing
        saver.look()
        looks += 1
    if heal is not None:
        heal()
    saver.finish(_placed(2, True), {}, wait=True)
    checkpoints.close()
    _told(looks=looks)
    jax.distributed.shutdown()


def save(number: int, port: int, workdir: str) -> None:
    """Saves two steps, in parts."""
    _join(number, port)
    checkpoints = checkpointing.Checkpoints(workdir)
    for step in (1, 2):
        checkpoints.save(_placed(step, True), {})
    checkpoints.close()
    jax.distributed.shutdown()


def restore(number: int, port: int, workdirs: dict[str, str]) -> None:
    """Restores the newest of each directory, as this process sees it; tells of each."""
    _join(number, port)
    said: list[str] = []
    logging.get_absl_logger().addFilter(lambda record: said.append(record.getMessage()))
    for name, workdir in workdirs.items():
        said.clear()
        fsdp, told = name != "whole", {}
        checkpoints = checkpointing.Checkpoints(workdir)
        with _few_files(name == "unreadable" and number == 1):
            try:
                found = checkpoints.restore_newest(_placed(0, fsdp))
            except checkpoint_files.CheckpointError as error:
                told = {"kind": type(error).__name__, "error": str(error)}
        if not told:
            own, expected = (
                [shard.data for shard in state.variables["w"].addressable_shards]
                for state in (found.state, _placed(found.step, fsdp))
            )
            same = jax.tree.map(lambda a, b: bool((a == b).all()), own, expected)
            told = {"step": found.step, "same": all(same)}
        checkpoints.close()
        _told(name=name, said=said, **told)
    jax.distributed.shutdown()


@contextlib.contextmanager
def _few_files(wanted: bool) -> Iterator[None]:
    """Lets this process open no more files, for a while."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
