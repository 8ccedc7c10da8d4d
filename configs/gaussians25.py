"""25 Gaussians in the plane: modes, sample quality and density in minutes."""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    config = config_lib.base()
    config.data.name = "gaussians25"
    return config
