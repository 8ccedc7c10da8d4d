"""Denoising Diffusion Adversarial Energy-Based Models in JAX.

The Python interface is `load`, `fit`, `recipe`, `build` and `Model`; see docs/api.md.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Game", "InputError", "Model", "build", "fit", "load", "recipe"]


def __getattr__(name: str) -> Any:
    """Return a name of the interface, whose module is loaded at the first use."""
    if name in __all__:
        module = "custom_loop" if name in ("Game", "build") else "api"
        return getattr(importlib.import_module(f"ddaebm_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
