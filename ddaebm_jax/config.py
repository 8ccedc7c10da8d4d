"""The base config, every field explained once, and its validation.

A recipe (`configs/*.py`) is `base()` with a few fields changed. Configs are data:
nothing here is computed from anything else.
"""

import difflib
import json
import math
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from ddaebm_jax import diffusion, objective, parallel
from ddaebm_jax.data import images, synthetic
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import image_quality, inception
from ddaebm_jax.models import NETWORKS, layers, mlp, ncsnpp
from ddaebm_jax.models.encoder import RESIDUAL_FROM, STDDEV_GROUP

TABLES = ("breast_cancer", "table")
DATASETS = (*synthetic.SYNTHETIC, *TABLES, *images.IMAGES)
RATE_SCHEDULES = ("constant", "cosine", "exponential")


def base() -> ml_collections.ConfigDict:
    """Returns the config from which every recipe starts."""
    config = ml_collections.ConfigDict()
    # Seeds everything: weights, noise, data order, splits.
    config.seed = 0

    config.data = data = ml_collections.ConfigDict()
    # A distribution of data/synthetic.py; `breast_cancer`, or `table` (with `path`);
    # of images: `digits`, `photos`, `folder` (with `path`), or `tfds` (with `tfds`).
    data.name = "gaussians25"
    # CSV or NPZ file of `table`; folder of PNG and JPEG files of `folder`.
    data.path = ""
    # Column (CSV) or array (NPZ) of a table that marks outliers with 1, inliers
    # with 0; training then uses inliers only. Empty: none in a CSV, and in an NPZ
    # the array `labels` if there is one.
    data.label_column = ""
    # Share of a table's rows, or of images, held out for testing.
    data.test_fraction = 0.3
    # Global batch, over all devices.
    data.batch_size = 200
    # TensorFlow Datasets' name, as `cifar10`, and where its sets lie; empty: its
    # default, ~/tensorflow_datasets.
    data.tfds = ""
    data.tfds_dir = ""
    # Splits of a `tfds` set; with an empty test_split, test_fraction of `split` is
    # held out.
    data.split = "train"
    data.test_split = "test"
    # Take the first so many images of `split` only; 0: all.
    data.limit = 0
    # Side and channels (1 or 3) of the images that the networks see.
    data.image_size = 32
    data.channels = 3
    # Box (left, top, right, bottom) cut from every image, pixels; None: the whole.
    # Then the short side is resized to image_size, and the centre is cut.
    data.crop = config_dict.placeholder(tuple)
    # Flip images left to right at random.
    data.flip = False
    # Keep the training images in device memory, so that batches are gathered there.
    data.on_device = False
    # Do without images of no use (damaged, too small, of other channels): a folder's
    # are left out at opening; one met later is replaced by the next (at most 1%).
    data.skip_corrupt = False
    # Classes of `digits` that are neither trained on nor tested with, so that they can
    # be outliers (--mode=ood --out=held_out_classes).
    data.held_out_classes = ()
    # Patches cut from the two photographs of `photos`.
    data.num_patches = 20_000
    # Reading: threads, batches ahead, and processes beside this one (0: threads only).
    data.num_threads = 8
    data.prefetch = 8
    data.num_workers = 0
    # Seconds to wait for a batch before giving up; 0: for ever.
    data.timeout = 600

    config.diffusion = process = ml_collections.ConfigDict()
    # T, the number of denoising steps.
    process.num_steps = 4
    # `vp`, `geometric` or `cosine`; see diffusion.marginal_variance.
    process.variance = "vp"
    # Range of β of `vp` and `geometric`.
    process.beta_min = 0.1
    process.beta_max = 20.0
    # `uniform` or `lsun`; see diffusion.diffusion_times.
    process.time = "uniform"
    # Time of level 0 for uniform times: the trace of noise that data carries.
    process.time_eps = 1e-3
    # β_k is clipped to at most this.
    process.max_beta = 0.999
    # log s_t² is clipped below at the log of this (1e-4 on images); None: not.
    process.min_posterior_var = config_dict.placeholder(float)

    config.model = model = ml_collections.ConfigDict()
    # Which networks: `mlp` (points and tables) or `ncsnpp` (images).
    model.name = "mlp"
    # Width of the latent z.
    model.nz = 2
    # Of `ncsnpp`'s computation: `float32`, or `bfloat16` with parameters, norms,
    # softmax and the energy's sum in float32.
    model.dtype = "float32"
    # Of `ncsnpp`: `blocks` computes residual blocks and attention again in the
    # backward pass, which saves memory and costs time; `none`.
    model.remat = "none"
    model.unet = ml_collections.ConfigDict()
    # Base width, even.
    model.unet.nf = 128
    # Width of each level in units of nf; each level but the last halves the image.
    model.unet.ch_mult = (1, 2, 2, 2)
    # Residual blocks a level on the way down; one more on the way up.
    model.unet.num_res_blocks = 2
    # Sides of the images after which attention follows; may be empty.
    model.unet.attn_resolutions = (16,)
    # Share of units dropped in residual blocks, in training.
    model.unet.dropout = 0.1
    # Resample with the filter (1, 3, 3, 1), else by repeats and means.
    model.unet.fir = True
    # `residual` (needs `fir`): a pyramid of the input is summed in; `none`.
    model.unet.progressive_input = "residual"
    # Width of the generator's embedding of z, and layers after its first.
    model.unet.z_emb_dim = 256
    model.unet.n_mlp = 4
    model.encoder = ml_collections.ConfigDict()
    # Base width of the image posterior.
    model.encoder.ngf = 64
    # Width of its time embedding, even.
    model.encoder.t_emb_dim = 256
    model.mlp = ml_collections.ConfigDict()
    # Widths of the point's encoder, the last without activation.
    model.mlp.x_widths = (16, 32)
    # Width of the sinusoidal time embedding, even.
    model.mlp.t_embed_dim = 16
    # Widths of the time's encoder, the last without activation.
    model.mlp.t_widths = (16, 32)
    # Widths of the hidden layers after point and time are joined.
    model.mlp.hidden = (300, 300)
    # Width from which the posterior's two heads read.
    model.mlp.posterior_features = 16
    # `prelu`, `relu`, `silu`, `gelu` or `softplus`.
    model.mlp.activation = "prelu"
    # Of generator and posterior: `batch` or `none`. The energy has none.
    model.mlp.norm = "none"
    # Octaves of Fourier features appended to the point, in generator and posterior,
    # and in the energy; 0: none.
    model.mlp.fourier_octaves = 0
    model.mlp.energy_fourier_octaves = 0

    config.game = game = ml_collections.ConfigDict()
    # γ, weight of the gradient penalty; 0 leaves it out.
    game.gamma = 0.02
    # Decay γ geometrically over the run to this; None: constant. The penalty widens
    # modes narrower than about √γ, but early on it keeps the game stable.
    game.gamma_final = config_dict.placeholder(float)
    # Apply the penalty at every n-th step (not multiplied by n).
    game.lazy_reg = 1
    # λ_z, weight of the bound on the generator's entropy (1 in the derivation, 0.1 in
    # the released recipes).
    game.lambda_z = 0.1
    # λ_f, weight of the forward divergence.
    game.lambda_f = 1.0
    # α, weight of E f(x_t, t)² at real points; 0 leaves it out (the paper). Steadies
    # the heights of separate modes; see objective.energy_magnitude.
    game.energy_l2 = 0.0
    # Reconstruction: `nll`, `weighted_nll` or `mse`.
    game.recon = "nll"
    # The reconstruction's z: `posterior` (as derived) or `prior` (no second pass).
    game.recon_latent = "posterior"
    # Least variance of the reconstruction's nll; None: s_1² (images).
    game.recon_floor = 1e-2
    # Ablation: False sets z ≡ 0 and drops the posterior.
    game.latent = True
    # Ablation: False drops the posterior's terms; reconstruction from the prior z.
    game.posterior = True
    # Ablation: `jeffreys`, or `reverse_kl` to drop the forward divergence.
    game.divergence = "jeffreys"

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # Adam's rate for generator and posterior.
    optimizer.learning_rate = 1e-4
    # Adam's rate for the energy; None: the same.
    optimizer.energy_learning_rate = config_dict.placeholder(float)
    # `constant`, or `cosine` or `exponential` over the run's steps down to
    # `final_learning_rate`.
    optimizer.schedule = "constant"
    optimizer.final_learning_rate = 1e-5
    optimizer.beta1 = 0.0
    optimizer.beta2 = 0.9
    # Clip each player's gradient to this global norm; None: no clipping.
    optimizer.max_grad_norm = config_dict.placeholder(float)
    # Decay of the moving average of all three networks; 0: no averaging.
    optimizer.ema_decay = 0.0
    # m: the batch is taken in m parts, one after the other, and their gradients are
    # averaged: less memory, the same step.
    optimizer.accumulate = 1

    config.train = train = ml_collections.ConfigDict()
    # Steps of the whole run.
    train.num_steps = 100_000
    # K, steps per dispatch; 0: what suits the model.
    train.steps_per_dispatch = 0
    # Steps between lines of metrics.
    train.report_every = 500
    # Steps between pictures; 0: only at the end.
    train.picture_every = 5_000
    # Steps between evaluations on the way; 0: only at the end. With
    # evaluation.inception the model of the lowest FID, the last one's included, is
    # kept in best/.
    train.evaluate_every = 0
    # Steps between checkpoints; the last step is always saved.
    train.checkpoint_every = 5_000
    # Newest checkpoints kept.
    train.keep_checkpoints = 3
    # Also write TensorBoard event files (needs TensorFlow).
    train.tensorboard = True

    config.recovery = recovery = ml_collections.ConfigDict()
    # How often a run may go back to its last checkpoint, with fresh noise, after a loss
    # or gradient that is not finite; 0: it stops at the first.
    recovery.max_rollbacks = 3
    # Seconds for which a checkpoint that cannot be written is tried again.
    recovery.save_patience = 600
    # Warn where a mean energy grows beyond this, in absolute value, or the mean
    # energies of real and generated points move further apart than that; None: never.
    recovery.max_energy = 1e6
    recovery.max_gap = 1e4

    config.parallel = devices = ml_collections.ConfigDict()
    # Devices over which the batch is split; 0: all, of all processes.
    devices.num_devices = 0
    # `jit`: one program for all devices of a mesh; `pmap`: one program a device.
    devices.mode = "jit"
    # Of `jit`: every device keeps a part of the state only (fully sharded data
    # parallelism); saves memory, costs traffic.
    devices.fsdp = False

    config.evaluation = evaluation = ml_collections.ConfigDict()
    # Samples drawn for the figures.
    evaluation.num_samples = 10_000
    # The same for the figures on the way (train.evaluate_every); 0: as many.
    evaluation.num_samples_on_the_way = 0
    # Images that one call of a network takes in evaluation, sampling and scoring.
    evaluation.batch_size = 250
    # Measure images by Inception's features: FID, Inception score, KID, precision,
    # recall, density, coverage.
    evaluation.inception = False
    # The network's weights: a .pth, .npz or .safetensors file; empty: the published
    # ones, downloaded once.
    evaluation.inception_weights = ""
    # What goes in: `tf` (TensorFlow 1's resize, as the original FID and
    # torch-fidelity) or `pytorch_fid` (half-pixel resize); their FIDs differ.
    evaluation.preprocessing = "tf"
    # Images that samples are held against: `train` or `test`.
    evaluation.reference = "train"
    # File of the reference's statistics, made where it is not there; empty: in the
    # user's cache directory.
    evaluation.reference_path = ""
    # Most images whose features are compared one by one (all but FID and the score).
    evaluation.num_kept_features = 10_000
    # Random directions of the sliced Wasserstein distance.
    evaluation.num_projections = 500

    config.compilation_cache = cache = ml_collections.ConfigDict()
    # Keep compiled programs between runs.
    cache.enabled = True
    # Where; empty: ddaebm_jax in the user's cache directory.
    cache.directory = ""
    return config


class ConfigError(InputError):
    """A config that cannot be run; the message names every field at fault."""


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _type_problem(field: str, value: Any, default: Any) -> str | None:
    """Says what is wrong with a value's type, judged by the base's value."""
    optional = default is None or field in _OPTIONAL
    if optional and value is None:
        return None
    if isinstance(default, bool):
        wanted, fits = "True or False", isinstance(value, bool)
    elif isinstance(default, int):
        wanted = "a whole number"
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif field in _TUPLES:
        return _tuple_problem(field, value)
    elif isinstance(default, float) or optional:
        wanted = "a finite number" + (" or None" if optional else "")
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and math.isfinite(value)
    elif isinstance(default, tuple):
        wanted = "a tuple of whole numbers, each at least 1"
        fits = _whole_numbers(value, 1) and len(value) > 0
    else:
        wanted, fits = "a string", isinstance(value, str)
    return None if fits else f"{field} is {value!r}; {wanted} is needed"


# Fields with a value in the base that may be None too.
_OPTIONAL = ("game.recon_floor", "recovery.max_energy", "recovery.max_gap")

# Tuples with rules of their own: (least value, lengths allowed or None, in words).
_TUPLES: dict[str, tuple[int, int | None, str]] = {
    "data.crop": (0, 4, "four whole numbers (left, top, right, bottom), or None"),
    "model.unet.attn_resolutions": (1, None, "whole numbers, each at least 1, or ()"),
    "data.held_out_classes": (0, None, "whole numbers, each at least 0, or ()"),
}


def _whole_numbers(value: Any, least: int) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= least for v in value
    )


def _tuple_problem(field: str, value: Any) -> str | None:
    least, length, wanted = _TUPLES[field]
    fits = _whole_numbers(value, least) and length in (None, len(value))
    return None if fits else f"{field} is {value!r}; needed: {wanted}"


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> str | None:
    if value in allowed:
        return None
    close = difflib.get_close_matches(value, allowed, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"{field} is '{value}'; allowed: {', '.join(allowed)}{hint}"


# Field: (least, greatest, whether the least itself is allowed).
_RANGES: dict[str, tuple[float, float, bool]] = {
    "data.test_fraction": (0, 0.9, False),
    "data.batch_size": (1, math.inf, True),
    "data.limit": (0, math.inf, True),
    "data.image_size": (8, 1024, True),
    "data.channels": (1, 3, True),
    "data.num_patches": (1, 10**6, True),
    "data.num_threads": (1, 1024, True),
    "data.prefetch": (1, 1024, True),
    "data.num_workers": (0, 256, True),
    "data.timeout": (0, math.inf, True),
    "diffusion.num_steps": (1, 128, True),
    "diffusion.beta_min": (0, math.inf, False),
    "diffusion.beta_max": (0, math.inf, False),
    "diffusion.time_eps": (0, 0.5, True),
    "diffusion.max_beta": (0, 0.999999, False),
    "diffusion.min_posterior_var": (0, math.inf, False),
    "model.nz": (1, math.inf, True),
    "model.unet.nf": (4, math.inf, True),
    "model.unet.num_res_blocks": (1, math.inf, True),
    "model.unet.dropout": (0, 0.999, True),
    "model.unet.z_emb_dim": (1, math.inf, True),
    "model.unet.n_mlp": (0, math.inf, True),
    "model.encoder.ngf": (1, math.inf, True),
    "model.encoder.t_emb_dim": (4, math.inf, True),
    "model.mlp.t_embed_dim": (4, math.inf, True),
    "model.mlp.posterior_features": (1, math.inf, True),
    "model.mlp.fourier_octaves": (0, 16, True),
    "model.mlp.energy_fourier_octaves": (0, 16, True),
    "game.gamma": (0, math.inf, True),
    "game.gamma_final": (0, math.inf, False),
    "game.lazy_reg": (1, math.inf, True),
    "game.lambda_z": (0, math.inf, True),
    "game.lambda_f": (0, math.inf, True),
    "game.energy_l2": (0, math.inf, True),
    "game.recon_floor": (0, math.inf, False),
    "optimizer.learning_rate": (0, math.inf, False),
    "optimizer.energy_learning_rate": (0, math.inf, False),
    "optimizer.final_learning_rate": (0, math.inf, True),
    "optimizer.beta1": (0, 0.999999, True),
    "optimizer.beta2": (0, 0.999999, True),
    "optimizer.max_grad_norm": (0, math.inf, False),
    "optimizer.ema_decay": (0, 0.999999, True),
    "optimizer.accumulate": (1, math.inf, True),
    "train.num_steps": (1, 2**31 - 1, True),
    "train.steps_per_dispatch": (0, math.inf, True),
    "train.report_every": (1, math.inf, True),
    "train.picture_every": (0, math.inf, True),
    "train.evaluate_every": (0, math.inf, True),
    "train.checkpoint_every": (1, math.inf, True),
    "train.keep_checkpoints": (1, math.inf, True),
    "recovery.max_rollbacks": (0, math.inf, True),
    "recovery.save_patience": (0, math.inf, True),
    "recovery.max_energy": (0, math.inf, False),
    "recovery.max_gap": (0, math.inf, False),
    "parallel.num_devices": (0, math.inf, True),
    "evaluation.num_samples": (2, 10**6, True),
    "evaluation.num_samples_on_the_way": (0, 10**6, True),
    "evaluation.num_kept_features": (10, 10**6, True),
    "evaluation.batch_size": (1, 10**6, True),
    "evaluation.num_projections": (1, 10**6, True),
    "seed": (0, 2**31 - 1, True),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "data.name": DATASETS,
    "diffusion.variance": diffusion.VARIANCES,
    "diffusion.time": diffusion.TIMES,
    "model.name": NETWORKS,
    "model.dtype": layers.DTYPES,
    "model.remat": layers.REMATS,
    "model.unet.progressive_input": ncsnpp.PROGRESSIVE_INPUTS,
    "model.mlp.activation": mlp.ACTIVATIONS,
    "model.mlp.norm": mlp.NORMS,
    "game.recon": objective.RECONSTRUCTIONS,
    "game.recon_latent": objective.RECON_LATENTS,
    "game.divergence": objective.DIVERGENCES,
    "optimizer.schedule": RATE_SCHEDULES,
    "parallel.mode": parallel.MODES,
    "evaluation.preprocessing": inception.PREPROCESSINGS,
    "evaluation.reference": image_quality.REFERENCES,
}


def _range_problem(field: str, value: int | float) -> str | None:
    least, greatest, closed = _RANGES[field]
    above = value >= least if closed else value > least
    if above and value <= greatest:
        return None
    bounds = f"{'at least' if closed else 'above'} {least}"
    if greatest != math.inf:
        bounds += f" and at most {greatest}"
    return f"{field} is {value}; it must be {bounds}"


def _combination_problems(config: Any) -> Iterator[str]:
    """Problems between fields that are each fine by themselves."""
    process, optimizer = config.diffusion, config.optimizer
    if process.variance != "cosine" and not process.beta_min < process.beta_max:
        yield (
            f"diffusion.beta_min is {process.beta_min} and diffusion.beta_max is "
            f"{process.beta_max}; the first must be below the second"
        )
    else:
        try:
            diffusion.schedule_values(**process)
        except ValueError as error:
            yield f"diffusion: {error}"
    forward = config.game.divergence == "jeffreys" and config.game.lambda_f > 0
    reads_floor = forward and config.game.recon != "mse"
    if reads_floor and config.game.recon_floor is None and process.num_steps < 2:
        yield (
            "game.recon_floor is None, which stands for s_1², but there is one step "
            "only (diffusion.num_steps=1); give a number, for example 1e-2"
        )
    if config.game.gamma_final is not None and config.game.gamma == 0:
        yield (
            f"game.gamma is 0 and game.gamma_final is {config.game.gamma_final}; γ "
            "decays from a positive number: set game.gamma, or gamma_final to None"
        )
    if config.model.mlp.t_embed_dim % 2:
        yield f"model.mlp.t_embed_dim is {config.model.mlp.t_embed_dim}; even is needed"
    if optimizer.schedule != "constant":
        rates = {
            "learning_rate": optimizer.learning_rate,
            "energy_learning_rate": optimizer.energy_learning_rate,
        }
        for name, rate in rates.items():
            if rate is not None and optimizer.final_learning_rate > rate:
                yield (
                    "optimizer.final_learning_rate is "
                    f"{optimizer.final_learning_rate}, above optimizer.{name} {rate}; "
                    f"'{optimizer.schedule}' decays"
                )
    if optimizer.schedule == "exponential" and optimizer.final_learning_rate == 0:
        yield (
            "optimizer.final_learning_rate is 0; an exponential decay needs a "
            "positive one, for example 1e-5"
        )
    yield from _unread_problems(config)
    yield from _parallel_problems(config)
    yield from _accumulation_problems(config)
    if 0 < config.evaluation.num_samples_on_the_way < 10:
        yield (
            "evaluation.num_samples_on_the_way is "
            f"{config.evaluation.num_samples_on_the_way}; 0 (as many as num_samples), "
            "or at least 10, is needed"
        )
    yield from _data_problems(config.data)
    if config.data.name in images.IMAGES:
        if config.model.name != "ncsnpp":
            yield (
                f"model.name is '{config.model.name}', but data.name "
                f"'{config.data.name}' holds images; use model.name='ncsnpp'"
            )
        else:
            yield from _image_problems(config)
    elif config.model.name == "ncsnpp":
        yield (
            f"model.name is 'ncsnpp', but data.name '{config.data.name}' holds no "
            "images; use model.name='mlp'"
        )


# Fields that only some data sets, or only some networks, read.
_DATA_OF_FIELD: dict[str, tuple[str, ...]] = {
    "path": ("table", "folder"),
    "label_column": ("table",),
    "tfds": ("tfds",),
    "tfds_dir": ("tfds",),
    "split": ("tfds",),
    "test_split": ("tfds",),
    "limit": ("tfds",),
    "crop": ("folder", "tfds"),
    "skip_corrupt": ("folder", "tfds"),
    "num_patches": ("photos",),
    "held_out_classes": ("digits",),
    "flip": images.IMAGES,
    "on_device": images.IMAGES,
}
_MODEL_OF_FIELD = {
    "model.mlp.": "mlp",
    "model.unet.": "ncsnpp",
    "model.encoder.": "ncsnpp",
    "model.dtype": "ncsnpp",
    "model.remat": "ncsnpp",
    "evaluation.inception": "ncsnpp",
    "evaluation.preprocessing": "ncsnpp",
    "evaluation.reference": "ncsnpp",
    "evaluation.num_kept_features": "ncsnpp",
}


def _unread_problems(config: Any) -> Iterator[str]:
    """Fields that were set but that nothing would read."""
    default = dict(_leaves(base()))
    for field, value in _leaves(config):
        if value == default[field]:
            continue
        data_field = field.removeprefix("data.")
        names = _DATA_OF_FIELD.get(data_field) if field != data_field else None
        if names is not None and config.data.name not in names:
            yield (
                f"{field} is '{value}', which data.name '{config.data.name}' would "
                f"ignore; it is for {', '.join(names)}"
            )
        for prefix, model in _MODEL_OF_FIELD.items():
            if field.startswith(prefix) and config.model.name != model:
                yield (
                    f"{field} is '{value}', which model.name '{config.model.name}' "
                    f"would ignore; it is for '{model}'"
                )


def _parallel_problems(config: Any) -> Iterator[str]:
    """What one program a device cannot do."""
    if config.parallel.mode == "pmap" and config.parallel.fsdp:
        yield "parallel.fsdp is True, which parallel.mode 'pmap' cannot do; use 'jit'"


def _accumulation_problems(config: Any) -> Iterator[str]:
    """What a batch in parts cannot do."""
    parts, batch = config.optimizer.accumulate, config.data.batch_size
    if parts == 1:
        return
    if batch % parts:
        yield (
            f"optimizer.accumulate is {parts}, which does not divide data.batch_size "
            f"{batch}; use a divisor of it"
        )
    if config.model.name == "mlp" and config.model.mlp.norm == "batch":
        yield (
            f"optimizer.accumulate is {parts}, but model.mlp.norm 'batch' norms by the "
            "whole batch; use 1, or model.mlp.norm='none'"
        )
    if config.model.name != "ncsnpp" or config.data.image_size < RESIDUAL_FROM:
        return
    if batch % STDDEV_GROUP or (batch // parts) % STDDEV_GROUP:
        yield (
            f"optimizer.accumulate is {parts} and data.batch_size {batch}, but the "
            f"posterior of images from {RESIDUAL_FROM} pixels on looks at groups of "
            f"{STDDEV_GROUP}; each part must be a multiple of that"
        )


def _data_problems(data: Any) -> Iterator[str]:
    """Problems of the data's fields with each other."""
    for field, names in (("path", ("table", "folder")), ("tfds", ("tfds",))):
        if data.name in names and not data[field]:
            yield f"data.{field} is empty; data.name '{data.name}' needs it"
    if data.channels == 2:
        yield "data.channels is 2; allowed: 1 (grey), 3 (RGB)"
    if data.crop is not None:
        left, top, right, bottom = data.crop
        if not (left < right and top < bottom):
            yield (
                f"data.crop is {tuple(data.crop)}; (left, top, right, bottom) with "
                "left < right and top < bottom is needed"
            )


def _image_problems(config: Any) -> Iterator[str]:
    """Problems of the image networks with the images' size and each other."""
    side, unet = config.data.image_size, config.model.unet
    factor = 2 ** (len(unet.ch_mult) - 1)
    if side % factor:
        yield (
            f"data.image_size is {side}, not divisible by {factor}, as the "
            f"{len(unet.ch_mult)} levels of model.unet.ch_mult need"
        )
    if side & (side - 1):
        yield (
            f"data.image_size is {side}; the posterior needs a power of two, for "
            f"example {2 ** (side.bit_length() - 1)}"
        )
    sides = [side >> level for level in range(len(unet.ch_mult))]
    for resolution in unet.attn_resolutions:
        if resolution not in sides:
            yield (
                f"model.unet.attn_resolutions lists {resolution}, but the levels have "
                f"sides {', '.join(map(str, sides))}; choose of these, or ()"
            )
    for field, width in (
        ("model.unet.nf", unet.nf),
        ("model.encoder.t_emb_dim", config.model.encoder.t_emb_dim),
    ):
        if width % 2:
            yield f"{field} is {width}; even is needed"
    if unet.progressive_input == "residual" and not unet.fir:
        yield (
            "model.unet.progressive_input is 'residual', which needs model.unet.fir="
            "True; or set it to 'none'"
        )
    widths = ncsnpp.normed_widths(unet.nf, unet.ch_mult, unet.num_res_blocks)
    bad = [width for width in sorted(widths) if width % ncsnpp.num_groups(width)]
    if bad:
        yield (
            f"model.unet.nf {unet.nf} and ch_mult {tuple(unet.ch_mult)} make layers of "
            f"width {bad[0]}, which {ncsnpp.num_groups(bad[0])} groups do not divide; "
            "use a multiple of 4 up to 128, or of 32"
        )


def problems(config: ml_collections.ConfigDict) -> list[str]:
    """Returns everything that is wrong with a config, a line each; [] if nothing."""
    default, given = dict(_leaves(base())), dict(_leaves(config))
    found = []
    for field in given.keys() - default.keys():
        close = difflib.get_close_matches(field, default, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; see ddaebm_jax/config.py"
        found.append(f"{field} is not a field of the config{hint}")
    for field in default.keys() - given.keys():
        found.append(f"{field} is missing; start the config from config.base()")
    unusable = set()
    for field in sorted(default.keys() & given.keys()):
        value = given[field]
        problem = _type_problem(field, value, default[field])
        if problem is None and value is not None:
            if field in _RANGES:
                problem = _range_problem(field, value)
            elif field in _CHOICES:
                problem = _choice(field, value, _CHOICES[field])
        if problem:
            found.append(problem)
            unusable.add(field)
    unusable |= default.keys() - given.keys()
    return sorted(found) + _other_combination_problems(given, default, unusable)


def _other_combination_problems(
    given: dict[str, Any], default: dict[str, Any], unusable: set[str]
) -> list[str]:
    """Problems between fields that have nothing to do with those that are unusable."""
    usable = base().to_dict()
    for field in default.keys() & given.keys() - unusable:
        *sections, name = field.split(".")
        place = usable
        for section in sections:
            place = place[section]
        place[name] = given[field]
    return [
        problem
        for problem in _combination_problems(ml_collections.ConfigDict(usable))
        if not any(field in problem for field in unusable)
    ]


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks fields, types, ranges and combinations, before any device is touched.

    Raises:
      ConfigError: naming every problem, what is allowed, and what to try.
    """
    found = problems(config)
    if found:
        raise ConfigError("; ".join(found))


# Sections and fields that may differ when a run is resumed: they change how long and
# how loudly it trains, not what is trained on what. train.num_steps is free only
# where no rate or weight decays over the run; see `decays`.
FREE_ON_RESUME = (
    "train.",
    "recovery.",
    "parallel.",
    "evaluation.",
    # Up to rounding.
    "optimizer.accumulate",
    "compilation_cache.",
    "model.remat",
    "data.on_device",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "data.timeout",
    "data.skip_corrupt",
    # Where the data lie may change; what they are is told by their fingerprint.
    "data.path",
    "data.tfds_dir",
)


# Fields that the first version's configs do not have.
_ADDED = (
    "data.held_out_classes",
    "data.timeout",
    "optimizer.accumulate",
    "recovery.max_rollbacks",
    "recovery.save_patience",
    "recovery.max_energy",
    "recovery.max_gap",
    "parallel.mode",
    "parallel.fsdp",
    "evaluation.num_samples_on_the_way",
    "evaluation.inception",
    "evaluation.inception_weights",
    "evaluation.preprocessing",
    "evaluation.reference",
    "evaluation.reference_path",
    "evaluation.num_kept_features",
)


def differences(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two configs differ: name → (old, new)."""
    first, second = dict(_leaves(old)), dict(_leaves(new))
    fields = sorted(first.keys() | second.keys())

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    pairs = {f: (plain(first.get(f)), plain(second.get(f))) for f in fields}
    return {f: pair for f, pair in pairs.items() if pair[0] != pair[1]}


def decays(config: ml_collections.ConfigDict) -> bool:
    """Returns whether something decays over the run, so that its length matters."""
    return (
        config.optimizer.schedule != "constant" or config.game.gamma_final is not None
    )


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the config as readable JSON; see `from_json`."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads and validates what `to_json` wrote.

    Raises:
      ConfigError: if the text is not JSON or the config is not one of this version.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("the config is not a JSON object")
    config = ml_collections.ConfigDict(_with_tuples(_completed(values)))
    validate(config)
    return config


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields that a config of an earlier version did not have.

    Only those: another one that is missing is an error, not a guess. Their defaults
    are what was done before there were such fields.
    """
    default = dict(_leaves(base()))
    # A section that came as a whole.
    result = {"recovery": {}, **values}
    for field in _ADDED:
        section, name = field.split(".")
        if isinstance(result.get(section), dict):
            result[section] = {name: default[field], **result[section]}
    return result


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
