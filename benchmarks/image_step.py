"""Time, memory and work of one step of an image recipe, on random images.

  python benchmarks/image_step.py --config=configs/cifar10.py --batch=4
  python benchmarks/image_step.py --config=configs/cifar10.py --batch=256 \
      --dtype=bfloat16 --steps=10 --devices=4

Any field can be set as in training (--config.model.remat=blocks). The batch is that of
all devices together. Work is counted in the program as written (`timing.counted_work`:
convolutions and matrix products); XLA's count of the compiled program, which knows
nothing of the libraries that it calls, stands beside it. The share is of the devices'
own rate of matrix products in the same type, measured on one of them in the same run.
Several devices on a CPU are virtual and share its cores: their times say nothing.
"""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from steps import prepare, virtual_devices
from timing import (
    counted_flops,
    counted_work,
    device_name,
    kernels,
    matmul_rate,
    median_seconds,
    print_rows,
)

from ddaebm_jax import config as config_lib
from ddaebm_jax.diagnostics import energy_gaps_by_t

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "The recipe.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_STEPS = flags.DEFINE_integer(
    "steps", 1, "K, steps a dispatch; on a CPU more than 1 is slow.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "Over which the batch is split; 0: all.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Dispatches timed.", lower_bound=1)


def _gibibytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def _rows(config) -> list[tuple[str, str]]:
    """Measures; returns what to print."""
    steps, batch = _STEPS.value, config.data.batch_size
    prepared = prepare(config, steps)
    experiment, devices = prepared.experiment, prepared.mesh.size
    state, *inputs = prepared.inputs

    start = time.perf_counter()
    compiled = prepared.traced.lower().compile()
    compile_seconds = time.perf_counter() - start

    one = jnp.zeros((1, *experiment.source.event_shape))
    forward = jax.jit(experiment.networks.energy).trace(
        state.variables.energy, one, jnp.zeros((1,), jnp.int32)
    )
    dtype = jnp.dtype(config.model.dtype)
    before = matmul_rate(dtype=dtype)
    # The only reference left to the state, which every dispatch uses up.
    held = [state]
    mesh, work = prepared.mesh, counted_work(prepared.traced.jaxpr) / steps
    init_seconds, trace_seconds = prepared.seconds
    del state, prepared
    metrics = {}

    def run():
        # Whatever else a dispatch returns, the state is first, metrics second.
        held[0], metrics["last"], *_ = compiled(held[0], *inputs)
        return metrics["last"]

    seconds = median_seconds(run, _REPEATS.value) / steps
    peak = max(before, matmul_rate(dtype=dtype)) * devices
    losses = energy_gaps_by_t(jax.device_get(metrics["last"]))
    if not all(np.isfinite(list(losses.values()))):
        raise RuntimeError(f"the step's losses are not finite: {losses}")

    memory = compiled.memory_analysis()
    # Of one device, and of a loop over steps the body once.
    by_xla = counted_flops(compiled) * devices
    rows = [
        ("device", f"{device_name()}, jax {jax.__version__}"),
        ("step", f"batch {batch} on {devices}, {dtype}, {steps} a dispatch"),
        ("initial state", f"{init_seconds:.1f} s, its programs' compilation included"),
        ("tracing", f"{trace_seconds:.1f} s"),
        ("compilation", f"{compile_seconds:.1f} s"),
        ("kernels", f"{len(kernels(compiled.as_text())):,}"),
        ("time of a step", f"{seconds:.3f} s"),
        ("steps/s", f"{1 / seconds:.3f}"),
        ("images/s", f"{batch / seconds:.2f}"),
        (
            "work of a forward",
            f"{counted_work(forward.jaxpr) / 1e9:.2f} GFLOP an image "
            f"(XLA: {counted_flops(forward.lower().compile()) / 1e9:.2f})",
        ),
        (
            "work of a step",
            f"{work / batch / 1e9:.1f} GFLOP an image "
            f"(XLA: {by_xla / batch / 1e9:.1f})",
        ),
        ("rate reached", f"{work / seconds / 1e12:.4f} TFLOP/s"),
        ("matmul rate", f"{peak / 1e12:.4f} TFLOP/s"),
        ("share", f"{work / seconds / peak:.1%}"),
        ("state and batch", f"{_gibibytes(memory.argument_size_in_bytes)} a device"),
        ("temporary buffers", f"{_gibibytes(memory.temp_size_in_bytes)} a device"),
    ]
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            used = _gibibytes(stats["peak_bytes_in_use"])
            rows.append((f"peak memory of device {device.id}", used))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.append(("peak host memory", f"{_gibibytes(resident)} (whole process)"))
    return rows


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    virtual_devices(max(1, _DEVICES.value))
    config = _CONFIG.value
    config.data.batch_size = _BATCH.value
    config.parallel.num_devices = _DEVICES.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    print_rows(_rows(config))


if __name__ == "__main__":
    app.run(main)
