"""What the benchmarks share: timing, and the device's own matmul rate."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def median_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Returns the median time of a call, its result awaited, after one warm-up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(size: int = 2048, dtype: Any = jnp.float32) -> float:
    """Returns the device's own rate of square matrix products, FLOP/s."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(a, a))


def counted_flops(compiled: Any) -> float:
    """Returns the floating-point operations of a compiled program, as XLA counts."""
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def device_name() -> str:
    """Returns how many devices of which kind there are."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
