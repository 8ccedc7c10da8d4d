"""Compilation with little effort, for programs that run once or twice.

XLA's optimiser takes most of a U-Net's compilation, ten times what the program then
takes to run.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def options() -> dict[str, Any]:
    """Return the options that this version of XLA has."""
    return {name: value for name, value in _OPTIONS.items() if _is_known(name, value)}


def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda x: x + 1.0, compiler_options={name: value})(1.0)
    except Exception:  # Which kind depends on the version.
        return False
    return True


def flags() -> str:
    """Return the same for a child's XLA_FLAGS."""
    return " ".join(f"--{name}={str(v).lower()}" for name, v in options().items())


@contextlib.contextmanager
def compilation() -> Iterator[None]:
    """Let all that is given to `jax.jit` meanwhile be compiled with little effort."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(jax.jit, compiler_options=options())
        patch.setattr(jax, "jit", quick)
        yield


def jit(function: Callable, **kwargs: Any) -> Callable:
    """Return `jax.jit(function)`, compiled with little effort."""
    return jax.jit(function, compiler_options=options(), **kwargs)
