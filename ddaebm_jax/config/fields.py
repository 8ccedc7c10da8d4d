"""What a single field may hold: its type, its range, its choices."""

import difflib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ddaebm_jax.config.choices import ALLOWED

INT32_MAX = 2**31 - 1  # Whole numbers become integers of this range on a device.
WIDEST = 2**16  # Of a layer: its square times a batch can still be counted.

# Fields that may also be None: numbers, and data.crop.
OPTIONAL = (
    "data.crop diffusion.time_eps diffusion.min_posterior_var game.gamma_final "
    "game.recon_floor game.negatives_gamma game.negatives_floor "
    "optimizer.energy_learning_rate optimizer.max_grad_norm"
).split()

# Paths of files and directories; the last one may also be a URL, for JAX.
PATHS = (
    "data.path data.tfds_dir train.init_from evaluation.inception_weights "
    "compilation_cache.directory"
).split()

# The least and the greatest value, and the fields.
_RANGES = {
    (0, INT32_MAX): "seed data.limit train.steps_per_dispatch train.picture_every "
    "train.evaluate_every recovery.max_rollbacks parallel.num_devices",
    (1, INT32_MAX): "data.batch_size game.lazy_reg optimizer.accumulate "
    "train.num_steps train.report_every train.checkpoint_every train.keep_checkpoints "
    "levels.pilot_steps",
    (1, 10**6): "data.num_patches evaluation.batch_size",
    (0, 10**6): "evaluation.num_samples_on_the_way",
    (2, 10**6): "evaluation.num_samples",
    (100, 10**7): "evaluation.num_particles",
    (2, 1000): "evaluation.num_runs",
    (0, 1000): "evaluation.langevin_moves",
    (10, 10**6): "evaluation.num_kept_features",
    (8, 1024): "data.image_size",
    (1, 64): "model.unet.patch_size",
    (1, 1000): "data.num_threads data.prefetch model.unet.num_res_blocks "
    "game.num_negatives",
    (0, 256): "data.num_workers model.unet.n_mlp",
    (1, 128): "diffusion.num_steps",
    (1e-3, 100): "levels.move_limit",
    (1, WIDEST): "model.nz model.unet.z_emb_dim model.encoder.ngf "
    "model.mlp.posterior_features",
    (4, WIDEST): "model.unet.nf model.encoder.t_emb_dim model.mlp.t_embed_dim",
    (0, 5000): "model.reference",
    (0, 0.5): "diffusion.time_eps",
    (1e-6, 0.9): "data.test_fraction",
    (0, 0.999999): "game.negatives_from game.defensive evaluation.defensive "
    "model.unet.dropout "
    "optimizer.beta1 optimizer.beta2 optimizer.ema_decay",
    (1e-6, 0.999999): "diffusion.max_beta",
    (1e-6, math.inf): "diffusion.beta_min diffusion.beta_max",
    (0, math.inf): "game.gamma game.lambda_z game.lambda_f game.energy_l2 "
    "model.confinement optimizer.final_learning_rate",
    (1e-3, math.inf): "model.residual",
    (1e-30, math.inf): "diffusion.min_posterior_var game.gamma_final game.recon_floor "
    "game.negatives_gamma game.negatives_floor game.defensive_std "
    "optimizer.learning_rate optimizer.energy_learning_rate optimizer.max_grad_norm",
}
RANGES = {name: limits for limits, names in _RANGES.items() for name in names.split()}

_KINDS = {bool: "True or False", int: "a whole number", str: "a string"}
# Tuples of whole numbers: what is needed, lengths, the least and the greatest element.
_TUPLES = {
    "data.crop": ("four (left, top, right, bottom)", (4,), 0, INT32_MAX),
    "data.held_out_classes": ("any number of", range(INT32_MAX), 0, INT32_MAX),
    "model.unet.attn_resolutions": ("any number of", range(INT32_MAX), 1, INT32_MAX),
    "levels.move_at": ("any number of", range(INT32_MAX), 1, INT32_MAX),
}
_WIDTHS = ("one or more", range(1, INT32_MAX), 1, WIDEST)

_EVEN = ("an even number", lambda width: width % 2 == 0)
# Further conditions on single fields.
_CONDITIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data.crop": ("left < right, top < bottom", lambda b: b[0] < b[2] and b[1] < b[3]),
    "data.image_size": ("a power of two", lambda side: side & (side - 1) == 0),
    "evaluation.num_samples_on_the_way": ("0 or at least 10", lambda n: not 0 < n < 10),
    "model.unet.nf": _EVEN,
    "model.encoder.t_emb_dim": _EVEN,
    "model.mlp.t_embed_dim": _EVEN,
}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return the fields of a config, or of nested dicts, by their dotted names."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unknown(field: str, default: dict[str, Any]) -> str:
    """Return the message for a field that `default` lacks, with the nearest name."""
    inside = [name for name in default if name.startswith(f"{field}.")]
    if inside:
        return f"{field} is a section of the config; set its fields: {inside[0]}, …"
    near = difflib.get_close_matches(field, default, n=1)
    hint = f"did you mean {near[0]}?" if near else "see ddaebm_jax/config/base.py"
    return f"{field} is not a field of the config; {hint}"


def _type_problem(field: str, value: Any, default: Any) -> str | None:
    kind, limit = type(default), sys.float_info.max
    if field == "data.drop_columns":
        needed, fits = "a tuple of names", isinstance(value, tuple | list)
        fits = fits and all(isinstance(name, str) for name in value)
    elif field == "diffusion.times":
        needed, fits = "a tuple of numbers from 0 to 1", isinstance(value, tuple | list)
        fits = fits and all(type(v) in (int, float) and 0 <= v <= 1 for v in value)
    elif field in _TUPLES or kind is tuple:
        words, lengths, least, greatest = _TUPLES.get(field, _WIDTHS)
        needed = f"a tuple of {words} whole numbers from {least} to {greatest}"
        fits = isinstance(value, tuple | list) and len(value) in lengths
        fits = fits and all(type(v) is int and least <= v <= greatest for v in value)
    elif kind in _KINDS:
        needed, fits = _KINDS[kind], type(value) is kind
    else:
        needed, fits = "a finite number", isinstance(value, int | float)
        fits = fits and not isinstance(value, bool) and -limit <= value <= limit
    or_none = " or None" if field in OPTIONAL else ""
    return None if fits else f"{field} is {value!r}; {needed}{or_none} is needed"


def problem(field: str, value: Any, default: Any) -> str | None:
    """Return what is wrong with a value, given the base's; None: nothing."""
    if value is None and field in OPTIONAL:
        return None
    if wrong := _type_problem(field, value, default):
        return wrong
    allowed = ALLOWED.get(field, (value,))
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        return f"{field} is {value!r}; allowed: {', '.join(map(str, allowed))}{hint}"
    least, greatest = RANGES.get(field, (value, value))
    if not least <= value <= greatest:
        upper = f" and at most {greatest}" if greatest < math.inf else ""
        return f"{field} is {value}; it must be at least {least}{upper}"
    needed, holds = _CONDITIONS.get(field, ("", lambda value: True))
    return None if holds(value) else f"{field} is {value!r}; {needed} is needed"
