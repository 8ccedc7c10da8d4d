"""Your own table: any CSV or NPZ of numbers, by --config.data.path=rows.csv.

With --config.data.label_column=NAME, rows marked 0 are inliers, rows marked 1
outliers, and training uses inliers only. Columns are standardised; the settings are
those found on the breast-cancer table.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe; data.path is still to be given."""
    config = config_lib.base()
    config.data.name = "table"
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
