"""32 × 32 patches of scikit-learn's two photographs: the CIFAR-10 recipe, smaller.

Real images of CIFAR-10's shape without a download; the whole code path of
configs/cifar10.py (filters, attention at 16, input pyramid, nz 100, averages, flips)
at a width that two CPU cores train.
"""

import ml_collections

from ddaebm_jax import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe."""
    config = config_lib.base()
    config.data.name = "photos"
    config.data.test_fraction = 0.2
    config.data.batch_size = 8
    config.data.flip = True
    config.data.on_device = True
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 100
    config.model.unet.nf = 16
    config.model.unet.num_res_blocks = 1
    config.model.unet.dropout = 0.0
    config.model.unet.z_emb_dim = 64
    config.model.encoder.ngf = 16
    config.model.encoder.t_emb_dim = 64
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.beta1 = 0.5
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 10_000
    config.train.report_every = 50
    config.train.picture_every = 500
    config.train.checkpoint_every = 500
    config.evaluation.num_samples = 500
    return config
