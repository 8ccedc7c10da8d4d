"""The base config, in which every field is explained once.

A recipe (`configs/*.py`) is `base()` with a few fields changed. Configs are data: no
field is computed from another. `fields` and `checks` tell which values are allowed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Networks read `choices`, and do without ml_collections.
    from ml_collections import ConfigDict


def base() -> "ConfigDict":
    """Return the config from which every recipe starts."""
    from ml_collections import ConfigDict, FieldReference

    def optional(kind: type, value: float | None = None) -> FieldReference:
        return FieldReference(value, field_type=kind)

    config = ConfigDict()
    config.seed = 0  # Of weights, noise, data order and splits.

    config.data = data = ConfigDict()
    # Points: see data/synthetic.py. Tables: `breast_cancer`, `table` (with `path`).
    # Images: `digits`, `mnist5k`, `photos`, `folder` (`path`), `tfds` (`tfds`).
    data.name = "gaussians25"
    data.path = ""  # CSV or NPZ file of `table`; directory of images.
    # Column (CSV) or array (NPZ) of a table that is 1 for outliers, 0 for inliers. Only
    # inliers are trained on. Empty: none in a CSV, `labels` or `y` in an NPZ.
    data.label_column = ""
    # Columns, or arrays of an NPZ, of a table that are no part of it, as ids.
    data.drop_columns = ()
    # Whether the first line of a CSV is a header: `present`, `absent` or `auto`; see
    # data/table_files.py.
    data.header = "auto"
    # Noise of the data's own colour. Tables: standardised rows are rotated to principal
    # axes, and those scaled too. Images: see colour.py.
    data.whiten = False
    data.test_fraction = 0.3  # Fraction of a table's rows, or of images, held out.
    data.batch_size = 200  # Global, over all devices.
    data.tfds = ""  # Name in TensorFlow Datasets, for example cifar10.
    data.tfds_dir = ""  # Where TFDS keeps its sets; empty: ~/tensorflow_datasets.
    data.split = "train"  # Split of a `tfds` set.
    data.test_split = "test"  # Empty: test_fraction of `split` is held out.
    data.limit = 0  # Number of images of `split` used, from its start; 0: all.
    data.image_size = 32  # Side of the images that the networks see, pixels.
    data.channels = 3  # 1 (grey) or 3 (RGB).
    # Box (left, top, right, bottom) cut from every image, pixels; None: the whole. Then
    # the short side is resized to image_size, and the centre is cut.
    data.crop = optional(tuple)
    data.flip = False  # Flip images left to right at random.
    data.on_device = False  # Keep the training images in device memory.
    # Skip unusable images (damaged, too small, of other channels): of a folder at the
    # start; others are replaced by the next when they are read (at most 1%).
    data.skip_corrupt = False
    data.held_out_classes = ()  # Digits left out, to serve as outliers.
    data.num_patches = 20_000  # Cut from the two photographs of `photos`.
    data.num_threads = 8  # Reading threads.
    data.prefetch = 8  # Batches read ahead.
    data.num_workers = 0  # Reading processes beside this one; 0: threads only.

    config.diffusion = process = ConfigDict()
    process.num_steps = 4  # T, the number of denoising steps.
    process.variance = "vp"  # `geometric`, `cosine`; see diffusion.marginal_variance.
    process.beta_min = 0.1  # Range of β, of `vp` and `geometric`.
    process.beta_max = 20.0
    # Times of the levels: `uniform` or `lsun`, see diffusion.diffusion_times; `log_snr`
    # or `karras`, spaced by their noise, and `equal_cost`, between which steps cost the
    # same in a pilot run, see levels.py.
    process.time = "uniform"
    process.times = ()  # τ_0 … τ_T of `equal_cost`; empty: a pilot run finds them.
    # Time of level 0, except for `lsun`: the noise that data carry. None, of tables: it
    # is chosen by the training rows (data/reference_fit.py).
    process.time_eps = optional(float, 1e-3)
    process.keep_scale = False  # x_0 is data + S_0 ε; else A_0 data + S_0 ε.
    process.max_beta = 0.999  # β_k is clipped to at most this.
    process.min_posterior_var = optional(float)  # Clips s_t² (images: 1e-4); None: not.

    config.levels = levels = ConfigDict()
    levels.pilot_steps = 2_000  # Training steps of the pilot run of `equal_cost`.
    # Steps after which levels move towards equal cost (none: they stay), and how far
    # each may move at a time, in log σ.
    levels.move_at = ()
    levels.move_limit = 0.5

    config.model = model = ConfigDict()
    model.name = "mlp"  # `mlp` (points, tables) or `ncsnpp` (images).
    model.nz = 2  # Width of the latent z.
    # κ ≥ 0: f(x, t) = network − ½κ‖x‖², of `mlp`: a density that decays everywhere.
    model.confinement = 0.0
    # Of tables and images: most Gaussians of the reference density, fitted to the
    # training data; 0: none. Of tables, the network adds at most ± `residual` nats.
    model.reference = 0
    # Of images: `mixture`, or `windows`, a Gaussian around each training image.
    model.reference_kind = "mixture"
    model.residual = 4.0
    # Of `ncsnpp`; `bfloat16` leaves parameters, norms, softmax, the energy's sum alone.
    model.dtype = "float32"
    model.remat = "none"  # Of `ncsnpp`; `blocks`: recomputed backwards, to save memory.
    model.unet = ConfigDict()
    model.unet.patch_size = 1  # Pixels on a side that are one position of the U-Net.
    model.unet.nf = 128  # Base width, even.
    # Width of each level in units of nf; every level but the last halves the image.
    model.unet.ch_mult = (1, 2, 2, 2)
    model.unet.num_res_blocks = 2  # Per level on the way down; one more on the way up.
    model.unet.attn_resolutions = (16,)  # Sides with attention, in positions; or ().
    model.unet.dropout = 0.1  # Rate in residual blocks.
    model.unet.fir = True  # Resample by the filter (1, 3, 3, 1), else repeat and mean.
    model.unet.progressive_input = "residual"  # Pyramid of the input; `none`.
    model.unet.z_emb_dim = 256  # Width of the generator's embedding of z.
    model.unet.n_mlp = 4  # Layers of that embedding after the first.
    model.encoder = ConfigDict()
    model.encoder.ngf = 64  # Base width of the image posterior.
    model.encoder.t_emb_dim = 256  # Width of its time embedding, even.
    model.mlp = ConfigDict()
    model.mlp.x_widths = (16, 32)  # The point's encoder; the last without activation.
    model.mlp.t_embed_dim = 16  # Width of the sinusoidal time embedding, even.
    model.mlp.t_widths = (16, 32)  # The time's encoder; the last without activation.
    model.mlp.hidden = (300, 300)  # Hidden layers after point and time are joined.
    model.mlp.posterior_features = 16  # Width before the posterior's two heads.
    model.mlp.activation = "prelu"  # `prelu`, `relu`, `silu`, `gelu` or `softplus`.
    model.mlp.norm = "none"  # Of generator and posterior: `batch` or `none`.

    config.game = game = ConfigDict()
    game.gamma = 0.02  # γ, weight of the gradient penalty; 0: no penalty.
    # γ decays geometrically over the run to this; None: constant. The penalty widens
    # modes narrower than about √γ, but keeps the game stable early on.
    game.gamma_final = optional(float)
    game.lazy_reg = 1  # Apply the penalty every n-th step (not multiplied by n).
    game.lambda_z = 0.1  # λ_z, weight of the entropy bound; 1 in the derivation.
    game.lambda_f = 1.0  # λ_f, weight of the forward divergence.
    # α, weight of E f(x_t, t)² at real points, which steadies the heights of separate
    # modes (objective.energy_magnitude); 0: none, as in the paper.
    game.energy_l2 = 0.0
    # Give generated points at level 0 the noise that real ones carry.
    game.noise_at_data = False
    # K, negatives of each x_{t+1}, weighted so that the energy's step is maximum
    # likelihood (see proposal.py); 1: the paper's game.
    game.num_negatives = 1
    game.negatives_from = 0.0  # Fraction of the run after which K are played.
    game.negatives_gamma = optional(float)  # γ from there on; None: as before.
    game.negatives_floor = optional(float, 3e-3)  # Least variance of draws; None: s_1².
    # δ, share of the K from a wide Gaussian that covers what the generator misses; δ·K
    # must be whole. The Gaussian is p(x_t | x_{t+1}) under a prior N(0, ς² I).
    game.defensive = 0.0
    game.defensive_std = 2.0  # ς, in units of the data; a reference takes its place.
    game.recon = "nll"  # Reconstruction: `nll`, `weighted_nll` or `mse`.
    game.recon_latent = "posterior"  # Its z; `prior` saves a pass of the generator.
    game.recon_floor = optional(float, 1e-2)  # Least variance of the nll; None: s_1².
    game.latent = True  # Ablation: False sets z ≡ 0 and drops the posterior.
    game.posterior = True  # Ablation: False drops its terms; recon_latent is `prior`.
    game.divergence = "jeffreys"  # Ablation: `reverse_kl` drops the forward divergence.

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4  # Adam's, of generator and posterior.
    optimizer.energy_learning_rate = optional(float)  # Of the energy; None: the same.
    optimizer.schedule = "constant"  # `cosine`, `exponential`: over the run,
    optimizer.final_learning_rate = 1e-5  # down to this.
    optimizer.beta1 = 0.0
    optimizer.beta2 = 0.9
    optimizer.max_grad_norm = optional(float)  # Clip each player's gradient; None: not.
    optimizer.ema_decay = 0.0  # Of the networks' moving averages; 0: no averages.
    # Parts of a batch, processed one after the other: the same step with less memory.
    optimizer.accumulate = 1

    config.train = train = ConfigDict()
    train.num_steps = 100_000  # Steps of the whole run.
    train.steps_per_dispatch = 0  # K; 0: chosen by model and backend.
    train.report_every = 500  # Steps between lines of metrics.
    train.picture_every = 5_000  # Steps between pictures; 0: only at the end.
    # Steps between evaluations; 0: only at the end. With evaluation.inception the model
    # of the lowest FID, that of the last evaluation included, is kept in best/.
    train.evaluate_every = 0
    train.checkpoint_every = 5_000  # Steps between checkpoints; the last step has one.
    train.keep_checkpoints = 3  # Number of newest checkpoints kept.
    train.tensorboard = True  # Also write TensorBoard event files.

    # Run directory whose averaged weights a new run starts from; empty: random ones.
    train.init_from = ""

    config.recovery = recovery = ConfigDict()
    # How often a run may go back to its last checkpoint, with fresh noise, after a loss
    # or gradient that is not finite; 0: it ends at the first.
    recovery.max_rollbacks = 3

    config.parallel = parallel = ConfigDict()
    parallel.num_devices = 0  # Devices that share the batch; 0: all, of all processes.
    parallel.mode = "jit"  # One program for a mesh of devices; `pmap`: one per device.
    parallel.fsdp = False  # Of `jit`: every device keeps a part of the state only.

    config.evaluation = evaluation = ConfigDict()
    evaluation.num_samples = 10_000  # Samples drawn for the figures.
    evaluation.num_samples_on_the_way = 0  # With train.evaluate_every; 0: as many.
    evaluation.batch_size = 250  # Images per network call in evaluation and sampling.
    evaluation.inception = False  # Measure images by FID, Inception score, KID, ….
    evaluation.inception_weights = ""  # .pth, .npz or .safetensors; empty: downloaded.
    # Inception's input: `tf` (TensorFlow 1's resize, as the original FID and
    # torch-fidelity) or `pytorch_fid` (half-pixel resize); their FIDs differ.
    evaluation.preprocessing = "tf"
    evaluation.reference = "train"  # Images compared with samples: `train` or `test`.
    evaluation.num_kept_features = 10_000  # Most images compared by KID, recall, ….
    # Sequential Monte Carlo, for log Z and samples of the energy: particles of a run,
    # independent runs, the proposal's defensive share (game.defensive is that of
    # training), and Metropolis-adjusted Langevin moves at each level.
    evaluation.num_particles = 20_000
    evaluation.num_runs = 10
    evaluation.defensive = 0.2
    evaluation.langevin_moves = 0

    config.compilation_cache = cache = ConfigDict()
    cache.enabled = True  # Keep compiled programs between runs.
    cache.directory = ""  # Empty: ddaebm_jax in the user's cache directory.
    return config
