"""The mesh, what lies where on it, and the layouts of K steps: jit, pmap, fsdp.

One step function serves all of them. In `jit` and `pmap` each device steps through its
share of the batch, and the step averages gradients and metrics itself, once per player.
With a sharded state (`fsdp`) XLA splits the step of the whole batch. The state is a
pytree of global arrays in every layout.
"""

import re
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
    return make_mesh(num_devices if num_devices < jax.device_count() else 0)


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
    """Returns shapes that carry shardings, as a restore wants them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def put(tree: Any, shardings: Any) -> Any:
    """Places a tree, which every process holds whole, by its shardings."""

    def one(leaf: Any, sharding: Sharding) -> Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(
            values.shape, sharding, lambda part: values[part]
        )

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
    """Steps compiled for a layout: a program and what lies around it.

    Attributes:
      program: (length, state, batches, index, *constants) → (state, …), jitted; takes
        `length` steps and donates the state.
      place: (batches, index) of this process → the program's. `batches` are its rows of
        `length` batches, [length, rows, …], or None; `index` are its `process_rows`.
      collect: the program's results → global arrays.
    """

    program: Any
    place: Callable[[Any, Any], tuple[Any, Any]]
    collect: Callable[[Any], Any]


def jit_steps(steps: Callable[..., Any], mesh: Mesh, fsdp: bool = False) -> DeviceSteps:
    """Returns steps as one program for the mesh.

    Args:
      steps: a function of a device's share that averages over DATA_AXIS; with `fsdp`,
        of the whole batch.
      mesh: the devices.
      fsdp: every device keeps a part of the state and gathers parameters on use (fully
        sharded data parallelism).
    """
    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    batch_rows = PartitionSpec(None, DATA_AXIS)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def program(length, state, *inputs):
        shardings = state_shardings(mesh, state, fsdp)
        run = partial(steps, length)
        if not fsdp:
            constants = [whole] * (len(inputs) - 2)
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(whole, batch_rows, rows, *constants),
                out_specs=whole,
                check_vma=False,
            )
        state, *rest = run(state, *inputs)
        return (
            jax.lax.with_sharding_constraint(state, shardings),
            *jax.lax.with_sharding_constraint(rest, replicated(mesh)),
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
    program = jax.pmap(
        steps,
        axis_name=DATA_AXIS,
        static_broadcasted_argnums=0,
        in_axes=(None, None, 1, 0, None, None),
        out_axes=None,  # The same on all devices: leaves have no axis for them.
        donate_argnums=1,
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


# What errors say that come of other processes.
_OF_OTHERS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|gloo|connection|peer|heartbeat|barrier",
    re.IGNORECASE,
)


# Processes.


class Processes(NamedTuple):
    """How this process finds the others.

    Attributes:
      coordinator: address and port of process 0; empty: as the cluster says (TPU pods,
        Slurm, Open MPI, Kubernetes).
      num_processes: how many there are.
      process_id: this one's number, from 0.
      heartbeat_timeout: seconds of silence after which JAX takes a process for dead,
        and ends the others with a message that names it.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 100


def join(processes: Processes) -> None:
    """Joins this process to the others; before anything touches a device.

    Raises:
      InputError: if some of the three are missing, or the others cannot be found.
    """
    given = [
        bool(processes.coordinator),
        processes.num_processes is not None,
        processes.process_id is not None,
    ]
    if any(given) and not all(given):
        raise InputError(
            "--coordinator, --num_processes and --process_id belong together; give "
            "all three, or none of them where a cluster (TPU pod, Slurm) knows them"
        )
    if all(given) and not 0 <= processes.process_id < processes.num_processes:
        raise InputError(
            f"--process_id is {processes.process_id} of --num_processes="
            f"{processes.num_processes}; numbers from 0 up to one below are needed"
        )
    timeout = {"heartbeat_timeout_seconds": processes.heartbeat_timeout}
    try:
        if all(given):
            jax.distributed.initialize(*processes[:3], **timeout)
        else:
            jax.distributed.initialize(**timeout)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--distributed: the processes cannot be joined ({reason}); on a TPU pod "
            "or under Slurm start one process a host or a task, elsewhere give "
            "--coordinator=host:port, --num_processes and --process_id"
        ) from error


def is_first_process() -> bool:
    """Whether this process is the one that writes pictures, metrics and reports."""
    return jax.process_index() == 0


def comes_of_others(error: Exception) -> bool:
    """Whether an error says that other processes cannot be reached."""
    if isinstance(error, InputError) or jax.process_count() == 1:
        return False
    # Gloo's own errors come as ValueError where a collective is started.
    known = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return known and _OF_OTHERS.search(str(error)) is not None


def wait_for_all(where: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def all_agree(value: bool) -> bool:
    """Whether a value is true in all processes; all of them must call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(value)).all())


def differing_processes(text: str) -> tuple[int, str, str] | None:
    """Compares a text between all processes; all of them must call this.

    Returns:
      The first process whose text differs from process 0's, process 0's text and
      that one's; None where all are the same.
    """
    if jax.process_count() == 1:
        return None
    from jax.experimental import multihost_utils

    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    gathered = multihost_utils.process_allgather(padded)
    texts = [
        row[:size].tobytes().decode() for row, size in zip(gathered, sizes, strict=True)
    ]
    for process, other in enumerate(texts):
        if other != texts[0]:
            return process, texts[0], other
    return None
