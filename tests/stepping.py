"""Steps of small recipes, in any layout; in several processes, too.

Called by `processes.Forked` as well; nothing here may start a device when it is
imported.
"""

import contextlib
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from cli import ROOT, environment
from test_config import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sharding
from ddaebm_jax.diagnostics import energy_gaps_by_t
from ddaebm_jax.training import processes
from ddaebm_jax.training.dispatch import Dispatcher

PLANE = {
    "model.mlp.hidden": (16, 8),
    "model.mlp.x_widths": (4, 4),
    "data.batch_size": 16,
    "optimizer.ema_decay": 0.9,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.learning_rate": 1e-3,
}
IMAGES = {
    "data.batch_size": 16,
    "data.on_device": True,
    "model.nz": 4,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.num_res_blocks": 1,
    "model.unet.attn_resolutions": (),
    "model.unet.z_emb_dim": 8,
    "model.unet.n_mlp": 0,
    "model.encoder.ngf": 4,
    "model.encoder.t_emb_dim": 8,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-3,
}


def plane(**fields: Any) -> ml_collections.ConfigDict:
    config = config_lib.base()
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(PLANE | changes)
    return config


def digits(**fields: Any) -> ml_collections.ConfigDict:
    config = load_recipe(ROOT / "configs" / "digits.py")
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(IMAGES | changes)
    return config


def indices(step: int) -> np.ndarray:
    """Which digits a step takes."""
    return np.random.default_rng(step).integers(0, 1_000, (1, 16), dtype=np.int32)


def trained(
    config: ml_collections.ConfigDict, steps: int, streamed: bool = False
) -> tuple:
    """Returns the state after some steps, as it is saved, and the last metrics.

    Images are those of `indices`, or of the run's own stream.
    """
    config_lib.validate(config)
    described = experiment.build(config)
    dispatcher = Dispatcher(described)
    state = dispatcher.init()
    if streamed and described.source.holds_images:
        with contextlib.closing(experiment.open_batches(described)) as stream:
            batches = [np.array(stream.next(1)) for _ in range(steps)]
    else:
        batches = [
            indices(step) if described.source.holds_images else None
            for step in range(steps)
        ]
    for batch in batches:
        state, metrics, fault = dispatcher(state, 1, batch)
        assert int(fault.step) == 0
    return state, energy_gaps_by_t(jax.device_get(metrics))


CONFIGS = {"plane": plane, "digits": digits}


def in_two_processes(
    number: int, port: int, out: str, kind: str, fields: dict[str, Any], steps: int
) -> None:
    """Takes some steps, with two devices each; writes the state's leaves to `out`."""
    os.environ["XLA_FLAGS"] = environment(2)["XLA_FLAGS"]
    jax.config.update("jax_platforms", "cpu")
    processes.join(processes.Processes(f"localhost:{port}", 2, number))
    if fields.get("parallel__fsdp"):
        sharding.MIN_SHARDED_SIZE = 16
    described = experiment.build(CONFIGS[kind](**fields))
    dispatcher = Dispatcher(described)
    state = dispatcher.init()
    stream = experiment.open_batches(described)
    for _ in range(steps):
        batch = None if stream is None else stream.next(1)
        state, _, fault = dispatcher(state, 1, batch)
        assert int(fault.step) == 0
    if stream is not None:
        stream.close()
    whole = sharding.replicated(dispatcher.mesh)
    leaves = jax.tree.leaves(jax.jit(lambda tree: tree, out_shardings=whole)(state))
    np.savez(out, **{str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})
    jax.distributed.shutdown()  # Waits for the other, which ends if this one is gone.
