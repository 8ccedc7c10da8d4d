"""Time, memory and work of one step of an image recipe, on random images.

  python benchmarks/image_step.py --config=configs/cifar10.py --batch=4
  python benchmarks/image_step.py --config=configs/cifar10.py --batch=256 \
      --dtype=bfloat16 --steps=10

Any field can be set as in training (--config.model.remat=blocks). Work is what XLA
counts in the compiled program (`jax.stages.Compiled.cost_analysis`); the share is of
the device's own rate of matrix products in the same type, measured in the same run.
"""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from timing import counted_flops, device_name, matmul_rate, median_seconds

from ddaebm_jax import config as config_lib
from ddaebm_jax import minimax, train

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "The recipe.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_STEPS = flags.DEFINE_integer(
    "steps", 1, "K, steps a dispatch; on a CPU more than 1 is slow.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Dispatches timed.", lower_bound=1)


def _gibibytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def _rows(config) -> list[tuple[str, str]]:
    """Measures; returns what to print."""
    experiment = train.build(config, open_images=False)
    dispatch = jax.jit(
        train.make_dispatch(experiment), static_argnums=4, donate_argnums=0
    )
    state = train.init_state(experiment)
    batch, steps = config.data.batch_size, _STEPS.value
    index = jnp.arange(batch, dtype=jnp.int32)
    shape = (steps, batch, *experiment.source.event_shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = jnp.asarray(pixels)

    start = time.perf_counter()
    compiled = dispatch.lower(state, None, index, images, steps).compile()
    compile_seconds = time.perf_counter() - start
    single = compiled
    if steps > 1:  # XLA counts the body of a loop once.
        single = dispatch.lower(state, None, index, images[:1], 1).compile()

    def forward(variables, x, t):
        return experiment.networks.energy(variables, x, t)

    one = jnp.zeros((1, *experiment.source.event_shape))
    forward_flops = counted_flops(
        jax.jit(forward)
        .lower(state.variables.energy, one, jnp.zeros((1,), jnp.int32))
        .compile()
    )
    dtype = jnp.dtype(config.model.dtype)
    before = matmul_rate(dtype=dtype)
    held = [state]
    metrics = {}

    def run():
        held[0], metrics["last"] = compiled(held[0], None, index, images)
        return metrics["last"]

    seconds = median_seconds(run, _REPEATS.value) / steps
    peak = max(before, matmul_rate(dtype=dtype))
    losses = minimax.with_gaps(jax.device_get(metrics["last"]))
    if not all(np.isfinite(list(losses.values()))):
        raise RuntimeError(f"the step's losses are not finite: {losses}")

    memory = compiled.memory_analysis()
    flops = counted_flops(single)
    rows = [
        ("device", f"{device_name()}, jax {jax.__version__}"),
        ("step", f"batch {batch}, {dtype}, {steps} a dispatch"),
        ("compile time", f"{compile_seconds:.1f} s"),
        ("time of a step", f"{seconds:.3f} s"),
        ("steps/s", f"{1 / seconds:.3f}"),
        ("images/s", f"{batch / seconds:.2f}"),
        ("work of a forward", f"{forward_flops / 1e9:.2f} GFLOP an image"),
        ("work of a step", f"{flops / batch / 1e9:.1f} GFLOP an image"),
        ("rate reached", f"{flops / seconds / 1e12:.4f} TFLOP/s"),
        ("matmul rate", f"{peak / 1e12:.4f} TFLOP/s"),
        ("share", f"{flops / seconds / peak:.1%}"),
        ("state and batch", _gibibytes(memory.argument_size_in_bytes)),
        ("temporary buffers", _gibibytes(memory.temp_size_in_bytes)),
    ]
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        rows.append(("peak device memory", _gibibytes(stats["peak_bytes_in_use"])))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.append(("peak host memory", f"{_gibibytes(resident)} (whole process)"))
    return rows


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    config.data.batch_size = _BATCH.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    rows = _rows(config)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    app.run(main)
