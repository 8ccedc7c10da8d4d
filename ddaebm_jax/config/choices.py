"""The allowed names, and the numbers that config checks and networks share."""

SYNTHETIC = (
    *("gaussians25", "gaussians8", "pinwheel", "swissroll", "moons", "circles"),
    *("rings", "checkerboard", "spirals"),
)
TABLES = ("breast_cancer", "table")
IMAGES = ("digits", "mnist5k", "photos", "folder", "tfds")
NETWORKS = ("mlp", "ncsnpp")
PREPROCESSINGS = ("tf", "pytorch_fid")
REFERENCES = ("train", "test")
HEADERS = ("auto", "present", "absent")

ALLOWED = {
    "data.name": (*SYNTHETIC, *TABLES, *IMAGES),
    "data.channels": (1, 3),
    "data.header": HEADERS,
    "diffusion.variance": ("vp", "geometric", "cosine"),
    "diffusion.time": ("uniform", "lsun", "log_snr", "karras", "equal_cost"),
    "model.name": NETWORKS,
    "model.reference_kind": ("mixture", "windows"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "blocks"),
    "model.unet.progressive_input": ("none", "residual"),
    "model.mlp.activation": ("prelu", "relu", "silu", "gelu", "softplus"),
    "model.mlp.norm": ("none", "batch"),
    "game.recon": ("nll", "weighted_nll", "mse"),
    "game.recon_latent": ("posterior", "prior"),
    "game.divergence": ("jeffreys", "reverse_kl"),
    "optimizer.schedule": ("constant", "cosine", "exponential"),
    "parallel.mode": ("jit", "pmap"),
    "evaluation.preprocessing": PREPROCESSINGS,
    "evaluation.reference": REFERENCES,
}

# Image side from which on the posterior is the residual encoder, and the number of
# consecutive examples of its minibatch standard deviation.
RESIDUAL_FROM = 128
STDDEV_GROUP = 4
# A group norm has min(channels // 4, MAX_GROUPS) groups.
MAX_GROUPS = 32
