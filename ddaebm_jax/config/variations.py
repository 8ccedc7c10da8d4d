"""The variations of an ablation study: the fields that each one changes."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from absl import logging

from ddaebm_jax.config import fields, flags
from ddaebm_jax.config.base import base
from ddaebm_jax.config.checks import ConfigError, problems
from ddaebm_jax.config.choices import ALLOWED
from ddaebm_jax.errors import InputError

FULL = "full"  # The recipe as it is.

Fields = dict[str, Any]


def variations(studies: Sequence[str], config: Any) -> dict[str, Fields]:
    """Return the variations of a valid recipe: name → the fields that differ.

    The recipe itself, `full`, is the first. A variation that is the recipe, or equals
    an earlier one, is left out, and so is one of a named study that does not fit the
    recipe, with a log line.

    Args:
      studies: `paper`, `schedule`, `noise` or `density` (see docs/ablations.md), or
        `section.field=value,value,…`.
      config: the recipe.

    Raises:
      InputError: for an unknown study or field, values that do not fit, or a study
        without variations of this recipe.
    """
    current = dict(fields.leaves(config))
    found: dict[str, Fields] = {FULL: {}}
    for study in studies:
        named = study in _STUDIES
        asked = _STUDIES[study](current) if named else _of_field(study)
        kept = 0
        for name, wanted in asked.items():
            changed = {f: v for f, v in wanted.items() if v != current[f]}
            wrong = "; ".join(problems(varied(config, changed, config.seed)))
            if wrong and not named:
                raise ConfigError(f"--vary={study}: {wrong}")
            if wrong:
                logging.warning("left out: %s, as %s", name, wrong)
            elif changed:
                kept += 1
                if changed not in found.values():
                    found[name] = changed
        if not kept:
            raise InputError(f"--vary={study}: no variation differs from the recipe")
    return found


def varied(config: Any, changed: Fields, seed: int) -> Any:
    """Return a copy of a config with other values of some fields, and a seed."""
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(changed)
    config.seed = seed
    return config


def _paper(current: Fields) -> dict[str, Fields]:
    """Return the ablations of the paper, and its numbers of steps."""
    found: dict[str, Fields] = {
        "no latent": {"game.latent": False},
        "no posterior": {"game.posterior": False},
        "reverse KL": {"game.divergence": "reverse_kl"},
    }
    for steps in (1, 2, 4, 8):
        found[f"T = {steps}"] = {"diffusion.num_steps": steps}
    # None is s_1², which one step lacks.
    default = dict(fields.leaves(base()))
    for floor in ("game.recon_floor", "game.negatives_floor"):
        if current[floor] is None:
            found["T = 1"][floor] = default[floor]
    return found


def _schedule(current: Fields) -> dict[str, Fields]:
    """Return the variances and times of the diffusion, each with what it needs."""
    found = {
        f"{name} = {value}": {f"diffusion.{name}": value}
        for name in ("variance", "time")
        for value in ALLOWED[f"diffusion.{name}"]
    }
    if current["diffusion.variance"] != "vp":
        found["variance = vp"] |= _beta(0.1, 20.0)
    if current["diffusion.variance"] != "geometric":
        found["variance = geometric"] |= _beta(1e-4, 0.999)
    found["time = lsun"]["diffusion.time_eps"] = 1e-3  # It has no noise at level 0.
    # Six times in the first half, at ends of dispatches in runs that are long enough.
    every = current["train.num_steps"] // 12
    every -= every % 100 if every > 100 else 0
    if every:
        found["levels move"] = {"levels.move_at": tuple(every * k for k in range(1, 7))}
    if current["diffusion.min_posterior_var"] is None:
        found["time = lsun"]["diffusion.min_posterior_var"] = 1e-4
    return found


def _beta(low: float, high: float) -> Fields:
    return {"diffusion.beta_min": low, "diffusion.beta_max": high}


def _density(current: Fields) -> dict[str, Fields]:
    """Return the recipe without each part of the density game (docs/density.md)."""
    del current  # Parts that it lacks change nothing.
    return {
        "K = 1": {"game.num_negatives": 1, "game.defensive": 0.0},
        "δ = 0": {"game.defensive": 0.0},
        "κ = 0": {"model.confinement": 0.0},
    }


def _noise(current: Fields) -> dict[str, Fields]:
    """Return the recipe with the other noise, white or of the data's colour."""
    whiten = not current["data.whiten"]
    return {"coloured noise" if whiten else "white noise": {"data.whiten": whiten}}


_STUDIES = {f.__name__[1:]: f for f in (_paper, _schedule, _noise, _density)}


def _of_field(study: str) -> dict[str, Fields]:
    """Return the variations of `section.field=value,value,…`."""
    field, is_field, values = study.partition("=")
    if not is_field:
        raise InputError(
            f"--vary={study} is not known; allowed: {', '.join(_STUDIES)}, or "
            "section.field=value,value"
        )
    default = dict(fields.leaves(base()))
    if field not in default:
        raise InputError(f"--vary={study}: {fields.unknown(field, default)}")
    if field == "seed":
        raise InputError(f"--vary={study}: --seeds gives the seeds")
    if field in fields.PATHS:
        raise InputError(f"--vary={study}: a path is not varied; make several studies")
    found = {}
    for text in re.split(r",(?![^(\[]*[)\]])", values):  # Not inside a tuple.
        try:
            value = flags.parse_value(field, text)
        except ValueError as error:
            wrong = fields.problem(field, text, default[field])
            raise InputError(f"--vary={study}: {wrong}") from error
        found[f"{field} = {text}"] = {field: value}
    return found
