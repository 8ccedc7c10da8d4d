"""Steps of tiny recipes in any layout, and in several processes by `cli.call`.

Nothing here may start a device when it is imported.
"""

import contextlib
from typing import Any

import jax
import ml_collections
import numpy as np
from cli import ROOT, TINY, TINY_UNET, dotted
from runs import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sharding
from ddaebm_jax.training import processes
from ddaebm_jax.training.dispatch import Dispatcher

_OPTIMIZER = {"optimizer.schedule": "constant", "optimizer.learning_rate": 1e-3}
_PLANE = {"optimizer.ema_decay": 0.9, "optimizer.max_grad_norm": 1.0}


def plane(**fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of the game in the plane, in batches of 16."""
    config = config_lib.base()
    tiny = TINY | _PLANE | _OPTIMIZER | {"data.batch_size": 16}
    config.update_from_flattened_dict(tiny | dotted(fields))
    return config


def digits(**fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of digits that lie on the device, in batches of 16."""
    config = load_recipe(ROOT / "configs" / "digits.py")
    tiny = TINY_UNET | _OPTIMIZER | {"data.batch_size": 16, "data.on_device": True}
    tiny["model.reference"] = 2
    config.update_from_flattened_dict(tiny | dotted(fields))
    return config


def weighted(**fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of the game with weighted negatives."""
    return plane(game__num_negatives=4, game__defensive=0.5, **fields)


CONFIGS = {"plane": plane, "weighted": weighted, "digits": digits}


def trained(config: ml_collections.ConfigDict, steps: int) -> tuple:
    """Returns the state after some steps of a run, and the last metrics."""
    config_lib.validate(config)
    described = experiment.build(config)
    dispatcher = Dispatcher(described)
    state = dispatcher.init()
    with contextlib.ExitStack() as stack:
        stream = experiment.open_batches(described)
        if stream is not None:
            stack.callback(stream.close)
        for _ in range(steps):
            batch = None if stream is None else stream.next(1)
            state, metrics, fault = dispatcher(state, 1, batch)
            assert int(fault.step) == 0
    return state, metrics


def in_two_processes(
    number: int, port: int, folder: str, runs: list[tuple[str, dict]], steps: int
) -> None:
    """Trains several configs as one of two processes; writes the states' leaves."""
    processes.join(processes.Processes(f"localhost:{port}", 2, number))
    sharding.MIN_SHARDED_SIZE = 16
    whole = sharding.replicated(sharding.make_mesh(0))
    for run, (kind, fields) in enumerate(runs):
        state, _ = trained(CONFIGS[kind](**fields), steps)
        state = jax.jit(lambda tree: tree, out_shardings=whole)(state)
        leaves = map(np.asarray, jax.tree.leaves(state))
        np.savez(f"{folder}/{run}-{number}.npz", *leaves)
    jax.distributed.shutdown()  # Waits for the other, which ends if this one is gone.
