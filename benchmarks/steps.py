"""What the benchmarks share: the training step of a recipe, on random images."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ddaebm_jax import experiment as experiments
from ddaebm_jax.training import dispatching


class Prepared(NamedTuple):
    """A dispatch of K training steps, traced, and what it is to be called with.

    Attributes:
      experiment: what the config describes.
      mesh: the devices that share the batch.
      traced: of the jitted dispatch; `.jaxpr`, `.lower().compile()`.
      inputs: the compiled dispatch's arguments; the first, the state, is used up.
    """

    experiment: experiments.Experiment
    mesh: Mesh
    traced: Any
    inputs: tuple[Any, ...]


def virtual_devices(count: int) -> None:
    """Makes a CPU count as several devices; before anything touches a device.

    They share its cores. Elsewhere it changes nothing.
    """
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={count}".strip()


def prepare(config: ml_collections.ConfigDict, steps: int = 1) -> Prepared:
    """Builds a recipe's training step as training does, and traces it.

    Image recipes get random images, as from an input stream; others their own data.
    """
    experiment = experiments.build(config, open_images=False)
    batch = config.data.batch_size
    mesh, layout = dispatching.lay_out(experiment)
    images = None
    if experiment.source.holds_images:
        shape = (steps, batch, *experiment.source.event_shape)
        random = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        images = layout.place_batches(random)
    inputs = (
        layout.place(experiments.init_state(experiment)),
        None if images is not None else layout.place_data(experiment.source.arrays),
        layout.batch_index(batch),
        layout.place_data(np.int32(0)),
        images,
    )
    jitted = layout.jit(experiments.make_dispatch(experiment, layout.axis_name))
    return Prepared(experiment, mesh, jitted.trace(*inputs, steps), inputs)


def abstract(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Returns one image step's jaxpr, and its state's shapes; nothing is computed."""
    experiment = experiments.build(config, open_images=False)
    batch = config.data.batch_size
    state = jax.eval_shape(lambda: experiments.init_state(experiment))
    shapes = (
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((1, batch, *experiment.source.event_shape), jnp.uint8),
    )
    dispatch = experiments.make_dispatch(experiment)

    def one(state, index, trial, images):
        return dispatch(state, None, index, trial, images, 1)

    return jax.make_jaxpr(one)(state, *shapes), state
