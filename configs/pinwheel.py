"""The pinwheel in the plane (the paper's 2-D set), with our own settings.

The arms thin out at their ends. There the generator must follow the energy quickly, or
the energy rises without end where data are rare: hence its lower learning rate.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "pinwheel"
    config.diffusion.variance = "cosine"
    config.game.gamma = 0.005
    config.game.lambda_z = 1.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.energy_learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.9995
    config.train.num_steps = 16_000
    config.train.picture_every = 4_000
    config.train.checkpoint_every = 4_000
    return config
