"""What processes do that save together, called by `processes.Forked`.

Nothing here may start a device when it is imported.
"""

import json
import os
import resource
import signal
import time
from typing import Any

import jax
import numpy as np

from ddaebm_jax import sharding
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoints as checkpointing


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


def full_disk() -> Any:
    """Lets this process write no more than ten bytes into a file; returns the cure."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_and_die(number: int, port: int, workdir: str, delay: float) -> None:
    """Saves step 1; is killed while it saves step 2."""
    checkpoints = checkpointing.Checkpoints(workdir)
    checkpoints.save(jax.tree.map(jax.numpy.asarray, state_of(1)), {})
    checkpoints.wait()
    state = jax.tree.map(jax.numpy.asarray, state_of(2, 300_000))
    checkpoints.save(state, {})
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def _placed(step: int) -> TrainState:
    """The state on the devices of all processes; its rows are split."""
    mesh = sharding.make_mesh(0)

    def shard(value: np.ndarray) -> jax.sharding.NamedSharding:
        names = (sharding.DATA_AXIS,) if np.ndim(value) == 2 else ()
        spec = jax.sharding.PartitionSpec(*names)
        return jax.sharding.NamedSharding(mesh, spec)

    state = state_of(step)
    return sharding.put(state, jax.tree.map(shard, state))


def save_and_restore(number: int, port: int, workdir: str, fails: bool) -> None:
    """Saves step 2, and step 3 with one process that cannot write; restores step 2."""
    address = f"localhost:{port}"
    jax.distributed.initialize(address, 2, number, heartbeat_timeout_seconds=10)
    checkpoints = checkpointing.Checkpoints(workdir)
    found = checkpoints.restore_newest(_placed(0))
    if found is None:
        saver = checkpointing.Saver(checkpoints, patience=600)
        saver.finish(_placed(2), {"number": 1})
        saver.save(_placed(3), {})
        checkpoints.wait()
        if fails:
            full_disk()
        try:
            saver.finish(_placed(4), {})
        except checkpointing.SaveError as error:
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
