"""The config: every field, the allowed names, and what goes together."""

from ddaebm_jax.config.base import (
    FREE_ON_RESUME,
    ConfigError,
    base,
    decays,
    differences,
    from_json,
    problems,
    to_json,
    validate,
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
]
