"""25 Gaussians in the plane: modes, sample quality and density in minutes.

The noise schedule mixes (x_T is close to N(0, I)), λ_z = 1 as derived, so that exp f
is the density itself and not a power of it, and γ decays: modes of variance s² stay
narrow only where γ is small beside s², but early on a small γ lets the game diverge.
In the last fifth eight weighted negatives make the energy's step maximum likelihood
(docs/density.md), with a γ that hardly widens modes.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "gaussians25"
    config.diffusion.variance = "cosine"
    config.model.mlp.hidden = (200, 200, 200)
    config.game.gamma = 0.002
    config.game.gamma_final = 3e-4
    config.game.lambda_z = 1.0
    config.game.lambda_f = 3.0
    config.game.energy_l2 = 0.05
    config.game.num_negatives = 8
    config.game.negatives_from = 0.8
    config.game.negatives_gamma = 3e-5
    config.game.defensive = 0.125
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "exponential"
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.9995
    config.train.num_steps = 24_000
    config.train.picture_every = 6_000
    config.train.checkpoint_every = 6_000
    return config
