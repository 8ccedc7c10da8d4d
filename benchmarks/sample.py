"""Images a second of the sampler: T calls of the generator for each batch.

Beside the device's own rate stand those of whole commands: several batches drawn and
fetched as uint8, written as PNG files, and scored, f(x, 0).

  python benchmarks/sample.py --config=configs/cifar10.py --batch=500 --dtype=bfloat16

Random weights: the time does not depend on them. Work is counted in the program as
written (`timing.counted_work`), on all devices; the share is of the devices' own rate
of matrix products in the same type, measured on one of them in the same run.
"""

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from steps import build
from timing import (
    counted_work,
    device_name,
    matmul_rate,
    median_seconds,
    print_rows,
)

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sampling, sharding
from ddaebm_jax.data.image_files import write_images
from ddaebm_jax.evaluation import inference
from ddaebm_jax.models import Players

_NUM_BATCHES = 4  # Of what is drawn, written and scored.

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
    described = build(config)
    mesh = sharding.make_mesh(config.parallel.num_devices)
    batch = sharding.whole_rows(mesh, _BATCH.value)
    everything = experiment.init_state(described).variables
    variables = jax.device_put(everything.generator, sharding.replicated(mesh))
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
        *_rates(described, everything, batch),
        ("work", f"{work / batch / 1e9:.2f} GFLOP an image"),
        ("rate reached", f"{work / seconds / 1e12:.4f} TFLOP/s"),
        ("matmul rate", f"{peak / 1e12:.4f} TFLOP/s"),
        ("share", f"{work / seconds / peak:.1%}"),
    )
    print_rows(lines)


def _rates(
    described: experiment.Experiment, variables: Players, batch: int
) -> list[tuple[str, str]]:
    """Returns the rows of images drawn, written and scored; of other data none."""
    if not described.source.holds_images:
        return []
    described.config.evaluation.batch_size = batch
    model, num = (described, variables), _NUM_BATCHES * batch
    images = np.concatenate(list(inference.draw_images(*model, num)))
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "drawn as uint8": lambda: list(inference.draw_images(*model, num)),
            "written as PNG": lambda: write_images(Path(folder), images),
            "scored": lambda: inference.energies(*model, images),
        }
        return [
            (name, f"{num / median_seconds(run, _REPEATS.value):.2f} images/s")
            for name, run in runs.items()
        ]


if __name__ == "__main__":
    app.run(main)
