"""Images a second of the sampler: T calls of the generator for each batch.

  python benchmarks/sample.py --config=configs/cifar10.py --batch=500 --dtype=bfloat16

Random weights: the time does not depend on them. Work is what XLA counts in the
compiled program; the share is of the device's own rate of matrix products in the same
type, measured in the same run.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from timing import counted_flops, device_name, matmul_rate, median_seconds

from ddaebm_jax import config as config_lib
from ddaebm_jax import parallel, sampling, train

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
    experiment = train.build(config, open_images=False)
    mesh = parallel.make_mesh(config.parallel.num_devices)
    batch = parallel.whole_rows(mesh, _BATCH.value)
    variables = jax.device_put(
        train.init_state(experiment).variables.generator, parallel.replicated(mesh)
    )
    rows = parallel.split_rows(mesh, jnp.arange(batch, dtype=jnp.int32))

    def draw(variables, rows):
        return sampling.sample(
            experiment.schedule,
            experiment.networks,
            variables,
            jax.random.key(0),
            batch,
            config.game.latent,
            rows,
        )

    start = time.perf_counter()
    compiled = jax.jit(draw).lower(variables, rows).compile()
    compile_seconds = time.perf_counter() - start
    dtype = jnp.dtype(config.model.dtype)
    peak = matmul_rate(dtype=dtype) * mesh.size
    seconds = median_seconds(lambda: compiled(variables, rows), _REPEATS.value)
    flops = counted_flops(compiled) * mesh.size
    lines = (
        ("device", f"{device_name()}, jax {jax.__version__}"),
        ("call", f"{batch} images, {dtype}, {config.diffusion.num_steps} steps"),
        ("compile time", f"{compile_seconds:.1f} s"),
        ("images/s", f"{batch / seconds:.2f}"),
        ("work", f"{flops / batch / 1e9:.2f} GFLOP an image"),
        ("rate reached", f"{flops / seconds / 1e12:.4f} TFLOP/s"),
        ("matmul rate", f"{peak / 1e12:.4f} TFLOP/s"),
        ("share", f"{flops / seconds / peak:.1%}"),
    )
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    app.run(main)
