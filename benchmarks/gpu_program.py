"""Compiles an image recipe's step for an NVIDIA GPU that need not be there.

  pip install 'jax[cuda13]'
  JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 CUDA_VISIBLE_DEVICES=-1 \
      python benchmarks/gpu_program.py --config=configs/cifar10.py --batch=256 \
      --dtype=bfloat16

Prints how long compilation took and what the program consists of: kernels by kind, and
the bytes of their operands and results, an upper bound of what they move (a kernel may
read a part of an operand). Nothing is tuned on a device, which takes more time where
there is one. The options of the compiler are those in XLA_FLAGS.
"""

import collections
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags
from steps import abstract_step
from timing import kernels, print_rows

from ddaebm_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "The recipe.")
_BATCH = flags.DEFINE_integer("batch", 256, "Images a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_TOP = flags.DEFINE_integer("top", 20, "Kinds of kernels printed.", lower_bound=1)

# What XLA asks of a device: an H200's.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 13 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    del argv
    config = _CONFIG.value
    config.data.batch_size = _BATCH.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf) -> jax.ShapeDtypeStruct:
        leaf = jnp.asarray(leaf) if not hasattr(leaf, "shape") else leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    step, inputs = abstract_step(config)
    start = time.perf_counter()
    traced = jax.jit(partial(step, 1), donate_argnums=0).trace(
        *jax.tree.map(placed, inputs)
    )
    seconds = [time.perf_counter() - start]
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    seconds.append(time.perf_counter() - start - seconds[0])
    found = kernels(compiled.as_text())
    counts, sizes = collections.Counter(), collections.Counter()
    for kind, num_bytes in found:
        counts[kind] += 1
        sizes[kind] += num_bytes
    memory = compiled.memory_analysis().temp_size_in_bytes
    print_rows(
        [
            ("for", f"NVIDIA H200, jax {jax.__version__}"),
            ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "")),
            ("step", f"batch {config.data.batch_size}, {config.model.dtype}"),
            ("tracing; compilation", f"{seconds[0]:.1f} s; {seconds[1]:.1f} s"),
            ("temporary buffers", f"{memory / 2**30:.2f} GiB"),
            ("kernels", f"{len(found)}, {sum(sizes.values()) / 1e9:.1f} GB"),
            *(
                (f"  {kind}", f"{counts[kind]}, {size / 1e9:.2f} GB")
                for kind, size in sizes.most_common(_TOP.value)
            ),
        ]
    )


if __name__ == "__main__":
    app.run(main)
