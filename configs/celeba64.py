"""CelebA at 64 × 64: the released recipe.

Global batch 128 (32 on each of 4 GPUs); 600 epochs of the 162,770 training images,
cut to the box (15, 40, 163, 188) and resized.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "tfds"
    config.data.tfds = "celeb_a"
    config.data.crop = (15, 40, 163, 188)
    config.data.image_size = 64
    config.data.batch_size = 128
    config.data.flip = True
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 100
    config.model.unet.nf = 64
    config.model.unet.ch_mult = (1, 1, 2, 2, 4)
    config.game.gamma = 0.002
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    config.optimizer.learning_rate = 5e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.999
    # A multiple of the steps per dispatch: the rest would be compiled of its own.
    config.train.num_steps = round(600 * 162_770 // 128, -1)
    config.train.report_every = 100
    config.train.evaluate_every = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.num_samples_on_the_way = 10_000
    config.evaluation.inception = True
    return config
