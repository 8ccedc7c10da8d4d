"""The mesh, the placement of arrays on it, and layouts of K steps: jit, pmap, fsdp.

One step function serves all of them. In `jit` and `pmap` each device steps through its
share of the batch, and the step averages gradients and metrics itself, once per player.
With a sharded state (`fsdp`) XLA splits the step of the whole batch. The state is a
pytree of global arrays in every layout.
"""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int, Shaped

from ddaebm_jax.errors import InputError

DATA_AXIS = "data"
# Smaller leaves are not sharded: 64 KiB of float32.
MIN_SHARDED_SIZE = 2**14


def make_mesh(
    num_devices: int, batch_size: int | None = None, parts: int = 1, group: int = 1
) -> Mesh:
    """Returns a one-axis mesh over which batches are split.

    Args:
      num_devices: how many devices; 0: all, of all processes.
      batch_size: the global batch; None: of no fixed size, see `split_rows`.
      parts: gradient accumulation, parts of each device's share.
      group: examples that must stay together in a part; see `models.Networks`.

    Raises:
      InputError: if there are fewer devices, or the batch is not divisible.
    """
    # Ordered by process: each process's part of a batch is contiguous.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if num_devices > len(devices):
        raise InputError(
            f"parallel.num_devices is {num_devices}, but there are {len(devices)} "
            f"({devices[0].platform}); lower it, or use 0 for all"
        )
    if jax.process_count() > 1 and num_devices not in (0, len(devices)):
        raise InputError(
            f"parallel.num_devices is {num_devices}, but {jax.process_count()} "
            f"processes with {len(devices)} devices take part, and none can be left "
            "out; use 0 for all"
        )
    used = devices[: num_devices or len(devices)]
    shares = len(used) * (parts * group if parts > 1 else 1)
    if batch_size is not None and batch_size % shares:
        below = batch_size // shares * shares
        nearest = [str(n) for n in (below, below + shares) if n > 0]
        taken = ""
        if parts > 1:
            taken = f", each in optimizer.accumulate={parts} parts"
            taken += f" of whole groups of {group}" if group > 1 else ""
        raise InputError(
            f"data.batch_size is {batch_size}, not divisible by the {len(used)} "
            f"devices{taken}; use {' or '.join(nearest)}, or set parallel.num_devices"
        )
    return Mesh(np.asarray(used), (DATA_AXIS,))


def mesh_for_evaluation(num_devices: int) -> Mesh:
    """Returns the mesh of a trained run; at most the devices that there are.

    A run may be sampled and measured on other machines than it was trained on.
    """
    several = jax.process_count() > 1  # None of whose devices can be left out.
    return make_mesh(0 if several or num_devices >= jax.device_count() else num_devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fully_sharded(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a leaf of which every device holds a part.

    The longest axis that the number of devices divides is split. Small leaves, and
    leaves without such an axis, are replicated.
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    if not axes or np.prod(shape) < MIN_SHARDED_SIZE:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, DATA_AXIS))


def state_shardings(mesh: Mesh, state: Any, fsdp: bool = False) -> Any:
    """Returns the sharding of each leaf of a state, or of its shapes."""
    if not fsdp:
        return jax.tree.map(lambda _: replicated(mesh), state)
    return jax.tree.map(lambda leaf: fully_sharded(mesh, leaf.shape), state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns shapes that carry shardings, as Orbax restores them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def on_host() -> contextlib.AbstractContextManager:
    """Returns a context in which JAX computes on the host's CPU, if it may use it."""
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS names other platforms only.
        return contextlib.nullcontext()
    return jax.default_device(cpu)


def put(tree: Any, shardings: Any) -> Any:
    """Places a tree, which every process holds whole, by its shardings."""

    def one(leaf: Any, sharding: Sharding) -> Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(one, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Places a tree, which every process holds whole, on every device."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def whole_rows(mesh: Mesh, rows: int) -> int:
    """Returns `rows`, rounded up to a multiple of the number of devices."""
    return -(-rows // mesh.size) * mesh.size


def split_rows(mesh: Mesh, rows: Shaped[np.ndarray, "n *shape"]) -> Array:
    """Splits rows over the mesh; copies of the first fill up to `whole_rows`.

    Every process must hold all rows.
    """
    missing = whole_rows(mesh, len(rows)) - len(rows)
    if missing:
        rows = np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
    return put(rows, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


def process_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns the places in the global batch of this process's rows."""
    rows = np.arange(batch_size, dtype=np.int32).reshape(mesh.size, -1)
    own = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    return rows[own].ravel()


class DeviceSteps(NamedTuple):
    """Steps compiled for a layout, with the placement of inputs and results.

    Attributes:
      program: length → the jitted (state, batches, index, constants) → (state, …); it
        takes that many steps and donates the state.
      place: (batches, index) of this process → the program's. `batches` are its rows of
        `length` batches, [length, rows, …], or None; `index` are its `process_rows`.
      collect: the program's results → global arrays.
    """

    program: Callable[[int], Any]
    place: Callable[[Any, Any], tuple[Any, Any]]
    collect: Callable[[Any], Any]


def jit_steps(
    steps: Callable[..., Any], mesh: Mesh, shapes: Any, fsdp: bool = False
) -> DeviceSteps:
    """Returns steps as one program for the mesh.

    Args:
      steps: a function of a device's share that averages over DATA_AXIS; with `fsdp`,
        of the whole batch.
      mesh: the devices.
      shapes: of the state.
      fsdp: every device keeps a part of the state and gathers parameters on use (fully
        sharded data parallelism).
    """
    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    batch_rows = PartitionSpec(None, DATA_AXIS)

    @functools.cache
    def program(length):
        run = partial(steps, length)
        if not fsdp:
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(whole, batch_rows, rows, whole),
                out_specs=whole,
                check_vma=False,
            )
        # Metrics are replicated, and the state is where it was.
        shardings = state_shardings(mesh, shapes, fsdp)
        return jax.jit(
            run,
            donate_argnums=0,
            out_shardings=(shardings, replicated(mesh), replicated(mesh)),
        )

    def place(batches, index):
        split = jax.make_array_from_process_local_data
        if batches is not None:
            batches = split(NamedSharding(mesh, batch_rows), batches)
        return batches, split(NamedSharding(mesh, rows), index)

    return DeviceSteps(program, place, collect=lambda results: results)


def pmap_steps(steps: Callable[..., Any], mesh: Mesh) -> DeviceSteps:
    """Returns steps as one program per device.

    Args:
      steps: a function of a device's share that averages over DATA_AXIS.
      mesh: the devices.
    """
    devices = mesh.local_mesh.size

    @functools.cache
    def program(length):
        return jax.pmap(
            partial(steps, length),
            axis_name=DATA_AXIS,
            in_axes=(None, 1, 0, None),
            out_axes=None,  # The same on all devices: leaves have no axis for them.
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )

    def place(batches, index):
        if batches is not None:
            length, *shape = batches.shape
            batches = batches.reshape(length, devices, -1, *shape[1:])
        return batches, index.reshape(devices, -1)

    def as_global(leaf: Array) -> Array:
        copies = [shard.data for shard in leaf.addressable_shards]
        whole = replicated(mesh)
        return jax.make_array_from_single_device_arrays(leaf.shape, whole, copies)

    return DeviceSteps(program, place, partial(jax.tree.map, as_global))
