"""Your own images: a folder of image files of any size, in any subfolders.

python launch/main.py --config=configs/folder.py --config.data.path=my_images

The CIFAR-10 networks on 64 × 64 images. On small folders train fewer steps; on small
machines narrow the networks (--config.model.unet.nf=32).
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.test_fraction = 0.1
    config.data.batch_size = 64
    config.data.flip = True
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 100
    config.model.unet.nf = 64
    config.model.unet.ch_mult = (1, 1, 2, 2, 4)
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 200_000
    config.train.report_every = 100
    config.train.picture_every = 2_000
    config.train.checkpoint_every = 2_000
    return config
