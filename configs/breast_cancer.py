"""Anomaly detection on scikit-learn's breast-cancer table: trained on benign rows.

Much noise at level 0 (`time_eps`) smooths the energy of 250 rows in 30 dimensions.
The forward divergence is left out: with it the generator stays so near its
reconstructions that nothing pushes the energy down away from the data, and the score
can even turn over.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "breast_cancer"
    config.data.batch_size = 128
    config.diffusion.time_eps = 0.25
    config.model.nz = 32
    config.model.mlp.x_widths = (64, 64)
    config.model.mlp.hidden = (128, 128)
    config.model.mlp.posterior_features = 32
    config.game.gamma = 0.2
    config.game.lambda_z = 1.0
    config.game.divergence = "reverse_kl"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.final_learning_rate = 5e-6
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.998
    config.train.num_steps = 2_000
    config.train.picture_every = 1_000
    config.train.checkpoint_every = 1_000
    return config
