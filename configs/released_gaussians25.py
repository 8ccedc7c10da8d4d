"""The authors' released recipe for 25 Gaussians, exactly; for comparison.

Its range of β leaves x_T far from N(0, I), so energies come out well and samples do
not; configs/gaussians25.py is our own recipe.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "gaussians25"
    config.diffusion.beta_min = 0.01
    config.diffusion.beta_max = 0.1
    config.model.mlp.norm = "batch"
    return config
