"""A set in the plane, by --config.data.name=pinwheel, swissroll, moons, and others.

data/synthetic.py defines them. The energy is confined, so that it decays where data
end, and in the last third of the run eight weighted negatives, two of them from the
defensive part, make its step maximum likelihood (docs/density.md). 25 Gaussians have a
recipe of their own, gaussians25.py.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "pinwheel"
    config.diffusion.variance = "cosine"
    config.model.mlp.hidden = (200, 200, 200)
    config.model.confinement = 1.0
    config.game.gamma = 0.002
    config.game.gamma_final = 3e-4
    config.game.lambda_z = 1.0
    config.game.lambda_f = 3.0
    config.game.energy_l2 = 0.05
    config.game.noise_at_data = True
    config.game.num_negatives = 8
    config.game.negatives_from = 0.65
    config.game.negatives_gamma = 3e-5
    config.game.defensive = 0.25
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "exponential"
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.9995
    config.train.num_steps = 12_000
    config.train.picture_every = 4_000
    config.train.checkpoint_every = 4_000
    return config
