"""LSUN church (outdoor) at 128 × 128: the released recipe.

Global batch 48 (12 on each of 4 GPUs); 500 epochs of the first 120,000 images, their
short side resized to 128 and the centre cut. No FIR filter, no input pyramid, no
dropout, and times of its own.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "tfds"
    config.data.tfds = "lsun/church_outdoor"
    config.data.test_split = "validation"
    config.data.limit = 120_000
    config.data.image_size = 128
    config.data.batch_size = 48
    config.data.flip = True
    config.diffusion.time = "lsun"
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 100
    config.model.unet.nf = 64
    config.model.unet.ch_mult = (1, 2, 2, 4, 4)
    config.model.unet.dropout = 0.0
    config.model.unet.fir = False
    config.model.unet.progressive_input = "none"
    config.game.gamma = 0.005
    config.game.recon = "weighted_nll"
    config.game.recon_floor = None
    config.optimizer.learning_rate = 5e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 500 * 120_000 // 48
    config.train.report_every = 100
    config.train.evaluate_every = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.num_samples_on_the_way = 10_000
    config.evaluation.inception = True
    return config
