"""Devices: the mesh, and what lies where on it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from ddaebm_jax.errors import InputError

DATA_AXIS = "data"


def make_mesh(num_devices: int, batch_size: int) -> Mesh:
    """Makes a one-axis mesh over which batches are split.

    Args:
      num_devices: how many devices; 0: all.
      batch_size: the global batch.

    Raises:
      InputError: if there are fewer devices, or the batch is not divisible.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise InputError(
            f"parallel.num_devices is {num_devices}, but there are {len(devices)} "
            f"({devices[0].platform}); lower it, or use 0 for all"
        )
    used = devices[: num_devices or len(devices)]
    if batch_size % len(used):
        below = batch_size // len(used) * len(used)
        nearest = [str(n) for n in (below, below + len(used)) if n > 0]
        raise InputError(
            f"data.batch_size is {batch_size}, not divisible by the {len(used)} "
            f"devices; use {' or '.join(nearest)}, or set parallel.num_devices"
        )
    return Mesh(np.asarray(used), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_index(mesh: Mesh, batch_size: int) -> Int[Array, " batch"]:
    """Returns 0 … batch−1 split over the mesh.

    Data and noise are drawn from this index inside the step, so that each device
    draws its own examples and no batch is ever moved.
    """
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.device_put(jnp.arange(batch_size, dtype=jnp.int32), sharding)


def split_batches(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of K batches [K, batch, …], split by example."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
