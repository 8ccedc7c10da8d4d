"""What the benchmarks share: the training step of a recipe, on random images."""

import os
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ddaebm_jax import experiment
from ddaebm_jax.training.dispatch import Dispatcher


class Prepared(NamedTuple):
    """K training steps, traced, and the arguments of the compiled program.

    Attributes:
      experiment: what the config describes.
      mesh: the devices that share the batch.
      traced: of the jitted steps; `.jaxpr`, `.lower().compile()`.
      inputs: the compiled program's arguments; the first, the state, is donated.
      seconds: what the initial state and tracing took.
    """

    experiment: experiment.Experiment
    mesh: Mesh
    traced: Any
    inputs: tuple[Any, ...]
    seconds: tuple[float, float]


def virtual_devices(count: int) -> None:
    """Makes a CPU count as several devices; before anything touches a device.

    They share its cores. Elsewhere it changes nothing.
    """
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={count}".strip()


def build(config: ml_collections.ConfigDict) -> experiment.Experiment:
    """Builds a recipe; images are opened only if something is fitted to them."""
    fitted = bool(config.model.reference or config.data.whiten)
    return experiment.build(config, open_images=fitted)


def prepare(config: ml_collections.ConfigDict, steps: int = 1) -> Prepared:
    """Builds a recipe's training step as training does, and traces it.

    Image recipes get random images, as from an input stream; others, and those with
    something that is fitted to images, their own data.
    """
    described = build(config)
    dispatcher = Dispatcher(described)
    source, images = described.source, None
    if source.holds_images:
        rng, shape = np.random.default_rng(0), (steps, config.data.batch_size)
        if source.arrays is None:  # Not on the device.
            images = rng.integers(0, 256, (*shape, *source.event_shape), np.uint8)
        else:
            images = rng.integers(0, len(source.arrays), shape, np.int32)
    start = time.perf_counter()
    state = jax.block_until_ready(dispatcher.init())
    inputs = (state, *dispatcher.inputs(images))
    initialised = time.perf_counter()
    traced = dispatcher.steps.program(steps).trace(*inputs)
    seconds = initialised - start, time.perf_counter() - initialised
    return Prepared(described, dispatcher.mesh, traced, inputs, seconds)


def abstract_step(config: ml_collections.ConfigDict) -> tuple[Any, tuple[Any, ...]]:
    """Returns (length, *inputs) → K steps on images, and the inputs' shapes for K = 1.

    Nothing is computed, and no device is touched.
    """
    described = experiment.build(config, open_images=False)
    batch = config.data.batch_size
    state = experiment.state_shapes(described)
    images = jax.ShapeDtypeStruct((1, batch, *described.source.event_shape), jnp.uint8)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    constants = None, described.schedule, seed, number
    return experiment.make_steps(described), (state, images, index, constants)


def abstract(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Returns one image step's jaxpr, and its state's shapes; nothing is computed."""
    step, inputs = abstract_step(config)
    return jax.make_jaxpr(partial(step, 1))(*inputs), inputs[0]
