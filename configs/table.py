"""Your own table: any CSV or NPZ of numbers, by --config.data.path=rows.csv.

With --config.data.label_column=NAME, rows marked 0 are inliers, rows marked 1
outliers, and training uses inliers only. The noise of level 0 and the reference density
follow from the training rows (docs/outliers.md); the rest was chosen on the
development sets of benchmarks/tables.py.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe; data.path is still to be given."""
    config = config_lib.base()
    config.data.name = "table"
    config.data.batch_size = 128
    config.diffusion.time_eps = None
    config.diffusion.keep_scale = True
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
