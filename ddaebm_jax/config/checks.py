"""What may stand in a config's fields: types, ranges, choices.

Pure functions of a config's fields, as `leaves` lists them, and of the base's, which
tell the types. What goes together is in `combinations`. Every problem is found, and
none that only follows from another.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

from ddaebm_jax import diffusion, objective
from ddaebm_jax import sharding as parallel
from ddaebm_jax.config import combinations
from ddaebm_jax.data import images, synthetic
from ddaebm_jax.evaluation import image_quality, inception
from ddaebm_jax.models import NETWORKS, layers, mlp, ncsnpp

TABLES = ("breast_cancer", "table")
DATASETS = (*synthetic.SYNTHETIC, *TABLES, *images.IMAGES)
RATE_SCHEDULES = ("constant", "cosine", "exponential")

# What counts, indexes and sizes become on a device.
INT32_MAX = 2**31 - 1


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Returns a config's fields, by their dotted names."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
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
        fits = fits and abs(value) < math.inf
    elif isinstance(default, tuple):
        wanted = f"a tuple of whole numbers, each from 1 to {combinations.WIDEST}"
        fits = _whole_numbers(value, 1, combinations.WIDEST) and len(value) > 0
    else:
        wanted, fits = "a string", isinstance(value, str)
    return None if fits else f"{field} is {value!r}; {wanted} is needed"


# Fields with a value in the base that may be None too.
_OPTIONAL = ("game.recon_floor", "recovery.max_energy", "recovery.max_gap")

# Tuples with rules of their own: (least value, lengths allowed or None, in words).
_TUPLES: dict[str, tuple[int, int | None, str]] = {
    "data.crop": (0, 4, "four whole numbers (left, top, right, bottom), or None"),
    "model.unet.attn_resolutions": (
        1,
        None,
        f"whole numbers from 1 to {INT32_MAX}, or ()",
    ),
    "data.held_out_classes": (0, None, f"whole numbers from 0 to {INT32_MAX}, or ()"),
}


def _whole_numbers(value: Any, least: int, greatest: int = INT32_MAX) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(v, int) and not isinstance(v, bool) and least <= v <= greatest
        for v in value
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
RANGES: dict[str, tuple[float, float, bool]] = {
    "data.test_fraction": (0, 0.9, False),
    "data.batch_size": (1, INT32_MAX, True),
    "data.limit": (0, INT32_MAX, True),
    "data.image_size": (8, 1024, True),
    "data.channels": (1, 3, True),
    "data.num_patches": (1, 10**6, True),
    "data.num_threads": (1, 1024, True),
    "data.prefetch": (1, 1024, True),
    "data.num_workers": (0, 256, True),
    "data.timeout": (0, INT32_MAX, True),
    "diffusion.num_steps": (1, 128, True),
    "diffusion.beta_min": (0, math.inf, False),
    "diffusion.beta_max": (0, math.inf, False),
    "diffusion.time_eps": (0, 0.5, True),
    "diffusion.max_beta": (0, 0.999999, False),
    "diffusion.min_posterior_var": (0, math.inf, False),
    "model.nz": (1, combinations.WIDEST, True),
    "model.unet.nf": (4, combinations.WIDEST, True),
    "model.unet.num_res_blocks": (1, 1000, True),
    "model.unet.dropout": (0, 0.999, True),
    "model.unet.z_emb_dim": (1, combinations.WIDEST, True),
    "model.unet.n_mlp": (0, 1000, True),
    "model.encoder.ngf": (1, combinations.WIDEST, True),
    "model.encoder.t_emb_dim": (4, combinations.WIDEST, True),
    "model.mlp.t_embed_dim": (4, combinations.WIDEST, True),
    "model.mlp.posterior_features": (1, combinations.WIDEST, True),
    "model.mlp.fourier_octaves": (0, 16, True),
    "model.mlp.energy_fourier_octaves": (0, 16, True),
    "game.gamma": (0, math.inf, True),
    "game.gamma_final": (0, math.inf, False),
    "game.lazy_reg": (1, INT32_MAX, True),
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
    "optimizer.accumulate": (1, INT32_MAX, True),
    "train.num_steps": (1, INT32_MAX, True),
    "train.steps_per_dispatch": (0, INT32_MAX, True),
    "train.report_every": (1, INT32_MAX, True),
    "train.picture_every": (0, INT32_MAX, True),
    "train.evaluate_every": (0, INT32_MAX, True),
    "train.checkpoint_every": (1, INT32_MAX, True),
    "train.keep_checkpoints": (1, INT32_MAX, True),
    "recovery.max_rollbacks": (0, INT32_MAX, True),
    "recovery.save_patience": (0, INT32_MAX, True),
    "recovery.max_energy": (0, math.inf, False),
    "recovery.max_gap": (0, math.inf, False),
    "parallel.num_devices": (0, INT32_MAX, True),
    "evaluation.num_samples": (2, 10**6, True),
    "evaluation.num_samples_on_the_way": (0, 10**6, True),
    "evaluation.num_kept_features": (10, 10**6, True),
    "evaluation.batch_size": (1, 10**6, True),
    "evaluation.num_projections": (1, 10**6, True),
    "seed": (0, INT32_MAX, True),
}

CHOICES: dict[str, tuple[str, ...]] = {
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
    least, greatest, closed = RANGES[field]
    above = value >= least if closed else value > least
    if above and value <= greatest:
        return None
    bounds = f"{'at least' if closed else 'above'} {least}"
    if greatest != math.inf:
        bounds += f" and at most {greatest}"
    return f"{field} is {value}; it must be {bounds}"


def unknown(field: str, default: dict[str, Any]) -> str:
    """Says that there is no such field, and which one may be meant."""
    inside = [name for name in default if name.startswith(f"{field}.")]
    if inside:
        return f"{field} is a section of the config; set its fields, as {inside[0]}"
    close = difflib.get_close_matches(field, default, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see ddaebm_jax/config.py"
    return f"{field} is not a field of the config{hint}"


def _problem(field: str, value: Any, default: Any) -> str | None:
    """Says what is wrong with a field by itself."""
    problem = _type_problem(field, value, default)
    if problem or value is None:
        return problem
    if field in RANGES:
        return _range_problem(field, value)
    return _choice(field, value, CHOICES[field]) if field in CHOICES else None


def problems(
    given: dict[str, Any], default: dict[str, Any], saved: bool = False
) -> list[str]:
    """Returns everything that is wrong with the fields of a config, a line each.

    Args:
      given: the fields, by their dotted names.
      default: the base's.
      saved: they are those that a run was trained with, whose results stand even if
        some of them went unread.
    """
    found = {field: unknown(field, default) for field in given.keys() - default.keys()}
    for field in default.keys() - given.keys():
        if not any(field.startswith(f"{section}.") for section in found):
            found[field] = f"{field} is missing; start the config from config.base()"
    for field in default.keys() & given.keys():
        problem = _problem(field, given[field], default[field])
        if problem:
            found[field] = problem
    usable = default.keys() & given.keys() - found.keys()
    config = combinations.Usable(given, usable)
    checks = list(combinations.CHECKS)
    if not saved:
        checks += [
            combinations.unread(field, given[field], default[field])
            for field in sorted(usable)
        ]
    together = []
    for check in checks:
        with contextlib.suppress(combinations.UnusableError):
            together.extend(check(config))
    return sorted(found.values()) + together
