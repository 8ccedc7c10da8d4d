"""Devices: the mesh, and what lies where on it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from ddaebm_jax.errors import InputError

DATA_AXIS = "data"


def make_mesh(num_devices: int, batch_size: int | None = None) -> Mesh:
    """Makes a one-axis mesh over which batches are split.

    Args:
      num_devices: how many devices; 0: all.
      batch_size: the global batch; None: not one size, see `split_rows`.

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
    if batch_size is not None and batch_size % len(used):
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


def whole_rows(mesh: Mesh, rows: int) -> int:
    """Returns `rows`, or the next number above that the devices share evenly."""
    return -(-rows // mesh.size) * mesh.size


def split_rows(mesh: Mesh, rows: Shaped[np.ndarray, "n *shape"]) -> Array:
    """Splits rows over the mesh; copies of the first fill up to `whole_rows`.

    Each process brings its own devices' rows, so all must hold the same ones.
    """
    missing = whole_rows(mesh, len(rows)) - len(rows)
    if missing:
        rows = np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.make_array_from_callback(rows.shape, sharding, lambda part: rows[part])
