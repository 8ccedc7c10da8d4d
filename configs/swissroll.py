"""The swiss roll in the plane (the paper's 2-D set), with our own settings."""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "swissroll"
    config.diffusion.variance = "cosine"
    config.game.gamma = 0.002
    config.game.lambda_z = 1.0
    config.game.lambda_f = 0.5
    config.game.energy_l2 = 0.05
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 8_000
    config.train.picture_every = 2_000
    config.train.checkpoint_every = 2_000
    return config
