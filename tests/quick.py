"""Compiles programs that run once or twice: soon, and not to be fast.

XLA's optimiser takes most of a U-Net's compilation, ten times what the program then
takes to run.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# The same for a child's XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _OPTIONS.items())


@functools.cache
def options() -> dict[str, Any]:
    """Returns the options, or none where another version's XLA does not know them."""
    try:
        jax.jit(lambda x: x + 1.0, compiler_options=_OPTIONS)(1.0)
    except Exception:  # Which kind depends on the version.
        return {}
    return _OPTIONS


def jit(function: Callable, **kwargs: Any) -> Callable:
    """Returns `jax.jit(function)`, compiled with little effort."""
    return jax.jit(function, compiler_options=options(), **kwargs)
