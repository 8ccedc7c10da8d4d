"""CIFAR-10, the paper's main result: the released recipe.

Global batch 256 (64 on each of 4 GPUs); 1,300 epochs of 50,000 images. The training
set (154 MB) is kept on the device.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "tfds"
    config.data.tfds = "cifar10"
    config.data.batch_size = 256
    config.data.flip = True
    config.data.on_device = True
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 100
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.9999
    # A multiple of the steps per dispatch: the rest would be compiled of its own.
    config.train.num_steps = round(1_300 * 50_000 // 256, -1)
    config.train.report_every = 100
    config.train.picture_every = 2_000
    config.train.checkpoint_every = 2_000
    config.train.evaluate_every = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.num_samples_on_the_way = 10_000
    config.evaluation.inception = True
    return config
