"""The energy, the generator and the posterior as Flax modules, built from a config."""

from ddaebm_jax.models.networks import NETWORKS, Networks, Players, build

__all__ = ["NETWORKS", "Networks", "Players", "build"]
