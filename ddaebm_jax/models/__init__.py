"""The energy, the generator and the posterior as Flax modules, built from a config."""

from ddaebm_jax.models.networks import Networks, Players, build

__all__ = ["Networks", "Players", "build"]
