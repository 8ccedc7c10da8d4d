"""Anomaly detection on scikit-learn's breast-cancer table: trained on benign rows.

The recipe of table.py, with little noise at level 0: the energy is a density of the
rows themselves, whose likelihood is compared with others'.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "breast_cancer"
    config.data.whiten = True
    config.data.batch_size = 128
    config.diffusion.time_eps = 0.03
    config.model.nz = 16
    config.model.reference = 32
    config.model.mlp.x_widths = (128, 128)
    config.model.mlp.hidden = (256, 256)
    config.model.mlp.posterior_features = 32
    config.model.mlp.activation = "silu"
    config.game.gamma = 0.1
    config.game.lambda_z = 1.0
    config.game.divergence = "reverse_kl"
    config.game.noise_at_data = True
    config.game.num_negatives = 4
    config.game.defensive = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_learning_rate = 2e-5
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.998
    config.train.num_steps = 1_500
    config.train.picture_every = 500
    config.train.checkpoint_every = 500
    return config
