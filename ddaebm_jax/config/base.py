"""The base config, every field explained once; how configs are compared and saved.

A recipe (`configs/*.py`) is `base()` with a few fields changed. Configs are data:
nothing here is computed from anything else. What may stand in a field is said in
`validation` and `combinations`.
"""

import json
from typing import Any

import ml_collections
from ml_collections import config_dict

from ddaebm_jax.config import checks as validation
from ddaebm_jax.errors import InputError


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
    # `jit`: one program for all devices of a mesh, each with its share of the batch;
    # `pmap`: one program a device.
    devices.mode = "jit"
    # Of `jit`: every device keeps a part of the state only (fully sharded data
    # parallelism), and XLA splits the step; saves memory, costs traffic.
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


def problems(config: ml_collections.ConfigDict, saved: bool = False) -> list[str]:
    """Returns everything that is wrong with a config, a line each; [] if nothing.

    Args:
      config: what is to be checked.
      saved: it is what a run was trained with, which is not to be held back for fields
        that went unread.
    """
    given, default = (dict(validation.leaves(c)) for c in (config, base()))
    return validation.problems(given, default, saved)


def validate(config: ml_collections.ConfigDict, saved: bool = False) -> None:
    """Checks fields, types, ranges and combinations, before any device is touched.

    Args:
      config: what is to be checked.
      saved: as in `problems`.

    Raises:
      ConfigError: naming every problem, what is allowed, and what to try.
    """
    found = problems(config, saved)
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
    first, second = dict(validation.leaves(old)), dict(validation.leaves(new))
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
    validate(config, saved=True)
    return config


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields that a config of an earlier version did not have.

    Only those: another one that is missing is an error, not a guess. Their defaults
    are what was done before there were such fields.
    """
    default = dict(validation.leaves(base()))
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
