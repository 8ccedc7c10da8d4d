"""The config; importing it loads neither jax nor anything that a config describes."""

from ddaebm_jax.config.base import base
from ddaebm_jax.config.checks import ConfigError, problems, validate
from ddaebm_jax.config.io import (
    FREE_ON_RESUME,
    decays,
    differences,
    from_json,
    to_json,
    with_absolute_paths,
    without_removed,
)

__all__ = [
    "FREE_ON_RESUME",
    "ConfigError",
    "base",
    "decays",
    "differences",
    "from_json",
    "problems",
    "to_json",
    "validate",
    "with_absolute_paths",
    "without_removed",
]
