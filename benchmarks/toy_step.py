"""Steps per second of a 2-D recipe, and its share of the machine's matmul rate.

  python benchmarks/toy_step.py --config=configs/released_gaussians25.py

The share is the step's floating-point work, as XLA counts it in the compiled single
step, over the time of a step inside a K-step dispatch, divided by the rate of a
2048 × 2048 float32 matrix product measured in the same run.
"""

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from timing import counted_flops, device_name, matmul_rate, median_seconds

from ddaebm_jax import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/released_gaussians25.py", "The recipe."
)
_STEPS = flags.DEFINE_integer("steps", 200, "K, steps per dispatch.")


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    experiment = train.build(_CONFIG.value)
    dispatch = train.make_dispatch(experiment)
    index = jnp.arange(_CONFIG.value.data.batch_size, dtype=jnp.int32)
    jitted = jax.jit(dispatch, static_argnums=3)
    state, arrays = train.init_state(experiment), experiment.source.arrays
    single = jitted.lower(state, arrays, index, 1).compile()
    many = jitted.lower(state, arrays, index, _STEPS.value).compile()

    before = matmul_rate()
    seconds = median_seconds(lambda: many(state, arrays, index)) / _STEPS.value
    single_seconds = median_seconds(lambda: single(state, arrays, index), 101)
    peak = max(before, matmul_rate())
    flops = counted_flops(single)
    print(f"device                     {device_name()}, jax {jax.__version__}")
    print(f"steps/s, {_STEPS.value} a dispatch    {1 / seconds:.1f}")
    print(f"steps/s, 1 a dispatch      {1 / single_seconds:.1f}")
    print(f"counted work of a step     {flops / 1e9:.3f} GFLOP")
    print(f"rate reached               {flops / seconds / 1e9:.1f} GFLOP/s")
    print(f"matmul rate of the device  {peak / 1e9:.1f} GFLOP/s")
    print(f"share                      {flops / seconds / peak:.1%}")


if __name__ == "__main__":
    app.run(main)
