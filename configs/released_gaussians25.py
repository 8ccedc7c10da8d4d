"""The authors' released recipe for 25 Gaussians, exactly; for comparison.

Its range of β leaves x_T far from N(0, I), so energies come out well and samples do
not; configs/gaussians25.py is our own recipe.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    config = config_lib.base()
    config.data.name = "gaussians25"
    config.data.batch_size = 200
    config.diffusion.num_steps = 4
    config.diffusion.variance = "vp"
    config.diffusion.beta_min = 0.01
    config.diffusion.beta_max = 0.1
    config.model.nz = 2
    config.model.mlp.norm = "batch"
    config.game.gamma = 0.02
    config.game.lambda_z = 0.1
    config.game.lambda_f = 1.0
    config.game.recon = "nll"
    config.game.recon_floor = 1e-2
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.beta1 = 0.0
    config.optimizer.beta2 = 0.9
    config.optimizer.ema_decay = 0.0
    config.train.num_steps = 100_000
    return config
