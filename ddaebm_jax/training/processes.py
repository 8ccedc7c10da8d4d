"""Several processes that train one model: how they join, and what they check.

They agree on their config once, at the start. A process that fails ends with its own
error; the others end with it, because a collective fails or JAX's heartbeat stops.
"""

import re
from typing import NamedTuple

import jax
import jax.extend.backend
import ml_collections
import numpy as np

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError, listed, one_line

# How errors of collectives describe a peer that is gone.
_LOST_PEER = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|gloo|connection|peer|heartbeat|barrier",
    re.IGNORECASE,
)
# Length to which configs are padded for their comparison.
_CONFIG_BYTES = 2**16


class Processes(NamedTuple):
    """How this process finds the others; without addresses, through the cluster.

    TPU pods, Slurm, Open MPI and Kubernetes know them.
    """

    coordinator: str = ""  # Address and port of process 0.
    num_processes: int | None = None
    process_id: int | None = None  # Number of this one, from 0.
    heartbeat_timeout: int = 100  # Seconds of silence after which JAX ends the others.


def join(processes: Processes) -> None:
    """Join this process to the others, before anything touches a device.

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
    addresses = processes[:3] if all(given) else ()
    try:
        jax.distributed.initialize(
            *addresses, heartbeat_timeout_seconds=processes.heartbeat_timeout
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: the processes cannot be joined ({one_line(error)}); on a "
            "TPU pod or under Slurm start one process per host or task, elsewhere give "
            "--coordinator=host:port, --num_processes and --process_id"
        ) from error


def check_devices() -> None:
    """Let JAX start its devices.

    Raises:
      InputError: if it has none of those that JAX_PLATFORMS asks for, or they fail.
    """
    try:
        jax.devices()
    except Exception as error:  # JAX asserts that there is a GPU.
        asked = jax.config.jax_platforms
        reason = one_line(error).partition(" (set JAX")[0].rstrip(": ")
        raise InputError(
            f"JAX_PLATFORMS={asked or ''}: JAX cannot start it ({reason}), and finds "
            f"{_devices_found()}; install JAX for your devices (NVIDIA: pip install "
            "'jax[cuda12]'; TPU: 'jax[tpu]'), end what holds them, or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def _devices_found() -> str:
    """Return the devices that JAX starts where it may choose, as text."""
    asked = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        return listed(dict.fromkeys(d.device_kind for d in jax.devices()))
    except Exception:
        return "none"
    finally:
        jax.config.update("jax_platforms", asked)
        jax.extend.backend.clear_backends()


def is_first_process() -> bool:
    """Return whether this process writes pictures, metrics and reports."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Wait until every process has reached the same point of the program."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def check_same_config(config: ml_collections.ConfigDict) -> None:
    """Check that all processes were given one config.

    Raises:
      InputError: in every process, naming the fields in which one of them differs.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    padded = config_lib.to_json(config).encode().ljust(_CONFIG_BYTES)
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    first, *others = (config_lib.from_json(row.tobytes().decode()) for row in rows)
    for process, other in enumerate(others, 1):
        differences = config_lib.differences(first, other)
        if differences:
            fields = ", ".join(
                f"{name} ({one!r} in process 0, {two!r} in process {process})"
                for name, (one, two) in differences.items()
            )
            raise InputError(
                f"the processes were given different configs: {fields}; start all of "
                "them with the same command"
            )


def is_lost_process(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is that of an unreachable process."""
    if isinstance(error, InputError):
        return is_lost_process(error.__cause__)
    # Gloo's own errors are ValueErrors where a collective is started.
    failed = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return failed and jax.process_count() > 1 and bool(_LOST_PEER.search(str(error)))
