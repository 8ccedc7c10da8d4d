"""Devices and processes: the mesh, what lies where on it, and how a step runs there.

One step function serves both ways of running it, `jit` and `pmap`: each device steps
through its share of the batch, and the step averages gradients and metrics itself, once
a player. Only with a state in parts (`fsdp`) does XLA split the whole batch's step.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int, Shaped

from ddaebm_jax.errors import InputError

DATA_AXIS = "data"
MODES = ("jit", "pmap")

# What errors say that come of other processes.
_OF_OTHERS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|gloo|connection|peer|heartbeat|barrier",
    re.IGNORECASE,
)
# Leaves of fewer numbers are not worth splitting: 64 KiB of float32.
_LEAST_SPLIT = 2**14


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


# Devices.


def make_mesh(
    num_devices: int,
    batch_size: int | None = None,
    parts: int = 1,
    group: int = 1,
) -> Mesh:
    """Makes a one-axis mesh over which batches are split.

    Args:
      num_devices: how many devices; 0: all, of all processes.
      batch_size: the global batch; None: not one size, see `split_rows`.
      parts: in which each device takes its share, one after the other.
      group: examples of a part that must stay together; see `models.Networks`.

    Raises:
      InputError: if there are fewer devices, or the batch is not divisible.
    """
    # By process: each process's part of a batch is one piece.
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
    """Returns the mesh of a trained run: as `make_mesh`, but of what there is.

    A run is sampled and measured on other machines than it was trained on.
    """
    return make_mesh(num_devices if num_devices < jax.device_count() else 0)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def fully_sharded(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a parameter of which every device holds a part.

    Its longest axis that the devices divide is split; small ones, and ones without
    such an axis, every device holds whole.
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    if not axes or int(np.prod(shape)) < _LEAST_SPLIT:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    parts: list[str | None] = [None] * len(shape)
    parts[longest] = DATA_AXIS
    return NamedSharding(mesh, PartitionSpec(*parts))


def put(tree: Any, shardings: Any) -> Any:
    """Puts a tree, which every process has whole, where its shardings say."""

    def one(leaf: Any, sharding: Sharding) -> Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(
            values.shape, sharding, lambda part: values[part]
        )

    return jax.tree.map(one, tree, shardings)


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
    return put(rows, _split(mesh))


# How steps run.

Dispatch = Callable[..., Any]


@runtime_checkable
class Layout(Protocol):
    """Where state and batches lie, and how K steps are compiled for it.

    Attributes:
      axis_name: over which the step averages gradients and metrics; None: the step
        sees the whole batch.
    """

    axis_name: str | None

    def place(self, state: Any) -> Any:
        """Puts a state that every process has whole on the devices."""

    def place_data(self, arrays: Any) -> Any:
        """Puts what every device is to hold whole there."""

    def place_batches(self, batches: np.ndarray) -> Array:
        """Puts this process's part of K batches on its devices."""

    def batch_index(self, batch_size: int) -> Array:
        """Returns 0 … batch−1, split.

        Data and noise are drawn from this index inside the step, so that each device
        draws its own examples and no batch is ever moved.
        """

    def jit(self, dispatch: Dispatch) -> Any:
        """Returns the jitted (state, arrays, index, trial, batches, length)."""

    def compile(self, jitted: Any, inputs: tuple[Any, ...], length: int) -> Dispatch:
        """Returns the compiled (state, arrays, index, trial, batches).

        Where it cannot be compiled ahead, the first call compiles.
        """

    def saved(self, state: Any) -> Any:
        """Returns a state as it is saved, evaluated and drawn from."""

    def restored_like(self, shapes: Any) -> Any:
        """Returns shapes with the shardings into which a checkpoint is restored."""

    def taken_up(self, restored: Any) -> Any:
        """Brings what was restored to where steps want it."""

    def metrics(self, metrics: Any) -> Any:
        """Returns metrics as scalars that this process can read."""


class JitLayout:
    """One program for the mesh.

    Attributes:
      axis_name: over which the step averages gradients and metrics; None: the step
        sees the whole batch.
    """

    def __init__(self, mesh: Mesh, fsdp: bool = False) -> None:
        """Lays out.

        Args:
          mesh: the devices.
          fsdp: every device keeps a part of the state only, and gathers parameters
            when it needs them (fully sharded data parallelism). XLA splits the step;
            it sums gradients of each use of a parameter over the devices, and those of
            each part of a batch. Without, each device takes its own share and the step
            itself averages, once a player.
        """
        self._mesh = mesh
        self._fsdp = fsdp
        self.axis_name = None if fsdp else DATA_AXIS

    def shardings(self, state: Any) -> Any:
        """Returns where each leaf of a state, or of its shapes, lies."""
        if not self._fsdp:
            return jax.tree.map(lambda _: replicated(self._mesh), state)
        return jax.tree.map(lambda leaf: fully_sharded(self._mesh, leaf.shape), state)

    def place(self, state: Any) -> Any:
        return put(state, self.shardings(state))

    def place_data(self, arrays: Any) -> Any:
        return jax.tree.map(lambda leaf: put(leaf, replicated(self._mesh)), arrays)

    def place_batches(self, batches: np.ndarray) -> Array:
        sharding = NamedSharding(self._mesh, PartitionSpec(None, DATA_AXIS))
        return jax.make_array_from_process_local_data(sharding, batches)

    def batch_index(self, batch_size: int) -> Int[Array, " batch"]:
        return put(np.arange(batch_size, dtype=np.int32), _split(self._mesh))

    def jit(self, dispatch: Dispatch) -> Any:
        whole = replicated(self._mesh)

        def placed(state, *inputs):
            shardings = self.shardings(state)
            state, *told = self._each(dispatch, inputs[-1])(state, *inputs[:-1])
            return (
                jax.lax.with_sharding_constraint(state, shardings),
                *jax.lax.with_sharding_constraint(told, whole),
            )

        return jax.jit(placed, static_argnums=5, donate_argnums=0)

    def _each(self, dispatch: Dispatch, length: int) -> Dispatch:
        """Returns the dispatch, run by each device for its share where that will do."""

        def steps(*inputs):
            return dispatch(*inputs, length)

        if self.axis_name is None:
            return steps
        whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
        batches = PartitionSpec(None, DATA_AXIS)
        return jax.shard_map(
            steps,
            mesh=self._mesh,
            in_specs=(whole, whole, rows, whole, batches),
            out_specs=whole,
            check_vma=False,
        )

    def compile(self, jitted: Any, inputs: tuple[Any, ...], length: int) -> Dispatch:
        return jitted.lower(*inputs, length).compile()

    def saved(self, state: Any) -> Any:
        return state

    def restored_like(self, shapes: Any) -> Any:
        return _with_shardings(shapes, self.shardings(shapes))

    def taken_up(self, restored: Any) -> Any:
        return restored

    def metrics(self, metrics: Any) -> Any:
        return metrics


class PmapLayout:
    """One program a device; every leaf has a leading axis of this process's devices.

    Attributes:
      axis_name: over which the step averages gradients and metrics.
    """

    axis_name: str | None = DATA_AXIS

    def __init__(self, mesh: Mesh) -> None:
        """Lays out over the devices of a mesh."""
        self._mesh = mesh
        self._devices = list(mesh.devices.flat)
        self._local = mesh.local_mesh.size

    def place(self, state: Any) -> Any:
        copy = jax.pmap(
            lambda _, tree: tree,
            in_axes=(0, None),
            axis_name=DATA_AXIS,
            devices=self._devices,
        )
        return copy(np.zeros(self._local), jax.tree.map(np.asarray, state))

    def place_data(self, arrays: Any) -> Any:
        # Data that are drawn have no arrays.
        return self.place(arrays) if jax.tree.leaves(arrays) else arrays

    def place_batches(self, batches: np.ndarray) -> np.ndarray:
        length, rows = batches.shape[:2]
        parts = batches.reshape(length, self._local, rows // self._local, -1)
        parts = parts.swapaxes(0, 1)
        return parts.reshape(*parts.shape[:3], *batches.shape[2:])

    def batch_index(self, batch_size: int) -> Int[np.ndarray, "devices batch"]:
        index = np.arange(batch_size, dtype=np.int32).reshape(len(self._devices), -1)
        first = jax.process_index() * self._local
        return index[first : first + self._local]

    def jit(self, dispatch: Dispatch) -> Any:
        return jax.pmap(
            dispatch,
            axis_name=DATA_AXIS,
            static_broadcasted_argnums=5,
            donate_argnums=0,
            devices=self._devices,
        )

    def compile(self, jitted: Any, inputs: tuple[Any, ...], length: int) -> Dispatch:
        if jax.process_count() == 1:
            return jitted.lower(*inputs, length).compile()
        # What is compiled ahead wants arrays of all processes, and there are only this
        # one's.
        return lambda *inputs: jitted(*inputs, length)

    def saved(self, state: Any) -> Any:
        one = jax.tree.map(lambda leaf: np.asarray(leaf[0]), state)
        return put(one, jax.tree.map(lambda _: replicated(self._mesh), one))

    def restored_like(self, shapes: Any) -> Any:
        whole = jax.tree.map(lambda _: replicated(self._mesh), shapes)
        return _with_shardings(shapes, whole)

    def taken_up(self, restored: Any) -> Any:
        return self.place(restored)

    def metrics(self, metrics: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], metrics)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def make_layout(mode: str, mesh: Mesh, fsdp: bool) -> Layout:
    """Makes the layout that a config names.

    Args:
      mode: of `MODES`.
      mesh: the devices.
      fsdp: see `JitLayout`; `jit` only.

    Raises:
      InputError: for another mode, or `pmap` with `fsdp`.
    """
    if mode not in MODES:
        raise InputError(f"parallel.mode is '{mode}'; allowed: {', '.join(MODES)}")
    if mode == "jit":
        return JitLayout(mesh, fsdp)
    if fsdp:
        raise InputError(
            "parallel.fsdp is True, which parallel.mode 'pmap' cannot do; use 'jit'"
        )
    return PmapLayout(mesh)
