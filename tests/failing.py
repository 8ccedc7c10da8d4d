"""Saves that fail, in processes that `cli.call` starts.

Nothing here may start a device when it is imported.
"""

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Iterator

import jax
import numpy as np

from ddaebm_jax import sharding
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoints as checkpoints_lib


def state_of(step: int, width: int = 3000) -> TrainState:
    """A small state of NumPy arrays that is a function of its step."""
    rng = np.random.default_rng(step)
    return TrainState(
        step=np.int32(step),
        variables={"w": rng.normal(size=(width, 4)).astype(np.float32)},
        ema={"w": rng.normal(size=5).astype(jax.numpy.bfloat16)},
        opt_energy=(rng.random(9) < 0.5, np.zeros(1000, np.float32), ()),
        opt_generator=None,
    )


@contextlib.contextmanager
def full_disk(num_bytes: int = 10) -> Iterator[None]:
    """Let no file of this process grow beyond a size; what fits is still written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_and_die(workdir: str, delay: float) -> None:
    """Saves step 1; is killed while it saves step 2."""
    checkpoints = checkpoints_lib.Checkpoints(workdir)
    checkpoints.save(jax.tree.map(jax.numpy.asarray, state_of(1)), {})
    checkpoints.wait()
    state = jax.tree.map(jax.numpy.asarray, state_of(2, 300_000))
    checkpoints.save(state, {})
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def split_rows(mesh: jax.sharding.Mesh, state: TrainState) -> TrainState:
    """Return shardings of a state whose matrices are split by rows."""

    def shard(value: np.ndarray) -> jax.sharding.NamedSharding:
        names = (sharding.DATA_AXIS,) if np.ndim(value) == 2 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    return jax.tree.map(shard, state)


def _placed(step: int) -> TrainState:
    """Return a state on the devices of all processes."""
    state = state_of(step)
    return sharding.put(state, split_rows(sharding.make_mesh(0), state))


def save_and_restore(number: int, port: int, workdir: str, fails: bool) -> None:
    """Saves step 2, and step 3 with one process that cannot write; restores step 2."""
    address = f"localhost:{port}"
    jax.distributed.initialize(address, 2, number, heartbeat_timeout_seconds=10)
    checkpoints = checkpoints_lib.Checkpoints(workdir)
    found = checkpoints.restore_newest(_placed(0))
    if found is None:
        checkpoints.save_whole(_placed(2), {"number": 1})
        checkpoints.save(_placed(3), {})
        checkpoints.wait()
        try:
            with full_disk() if fails else contextlib.nullcontext():
                checkpoints.save_whole(_placed(4), {})
        except checkpoints_lib.SaveError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            os._exit(2)
    else:
        own, expected = (
            [shard.data for shard in state.variables["w"].addressable_shards]
            for state in (found.state, _placed(found.step))
        )
        same = all(bool((a == b).all()) for a, b in zip(own, expected, strict=True))
        print(json.dumps({"step": found.step, "same": same}), flush=True)
    checkpoints.close()
    jax.distributed.shutdown()
