"""Images a second of the sampler: T calls of the generator for each batch.

  python benchmarks/sample.py --config=configs/cifar10.py --batch=500 --dtype=bfloat16

Random weights: the time does not depend on them. Work is counted in the program as
written (`timing.counted_work`), on all devices; the share is of the devices' own rate
of matrix products in the same type, measured on one of them in the same run.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from timing import (
    counted_work,
    device_name,
    matmul_rate,
    median_seconds,
    print_rows,
)

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sampling, sharding

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "The recipe.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images a call.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls timed.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    described = experiment.build(config, open_images=False)
    mesh = sharding.make_mesh(config.parallel.num_devices)
    batch = sharding.whole_rows(mesh, _BATCH.value)
    variables = jax.device_put(
        experiment.init_state(described).variables.generator,
        sharding.replicated(mesh),
    )
    rows = sharding.split_rows(mesh, jnp.arange(batch, dtype=jnp.int32))

    def draw(variables, rows):
        return sampling.sample(
            described.schedule,
            described.networks,
            variables,
            jax.random.key(0),
            batch,
            config.game.latent,
            rows,
        )

    start = time.perf_counter()
    traced = jax.jit(draw).trace(variables, rows)
    compiled = traced.lower().compile()
    compile_seconds = time.perf_counter() - start
    dtype = jnp.dtype(config.model.dtype)
    peak = matmul_rate(dtype=dtype) * mesh.size
    seconds = median_seconds(lambda: compiled(variables, rows), _REPEATS.value)
    work = counted_work(traced.jaxpr)
    lines = (
        ("device", f"{device_name()}, jax {jax.__version__}"),
        ("call", f"{batch} images, {dtype}, {config.diffusion.num_steps} steps"),
        ("compile time", f"{compile_seconds:.1f} s"),
        ("images/s", f"{batch / seconds:.2f}"),
        ("work", f"{work / batch / 1e9:.2f} GFLOP an image"),
        ("rate reached", f"{work / seconds / 1e12:.4f} TFLOP/s"),
        ("matmul rate", f"{peak / 1e12:.4f} TFLOP/s"),
        ("share", f"{work / seconds / peak:.1%}"),
    )
    print_rows(lines)


if __name__ == "__main__":
    app.run(main)
