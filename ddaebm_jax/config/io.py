"""Configs in files, and what a resumed run may change."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from ddaebm_jax.config.base import base
from ddaebm_jax.config.checks import ConfigError, validate
from ddaebm_jax.config.fields import PATHS, leaves
from ddaebm_jax.paths import user_path

# Fields that may differ when a run is resumed: they change how long, where and how
# loudly it trains, not what is trained on what, nor what its FIDs mean. train.num_steps
# is free only where nothing decays over the run (`decays`).
FREE_ON_RESUME = frozenset(
    # Where the data lie may change; what they are is told by their fingerprint.
    "data.path data.header data.tfds_dir data.on_device data.num_threads "
    "data.num_workers data.prefetch data.skip_corrupt "
    "model.remat optimizer.accumulate "
    "train.num_steps train.steps_per_dispatch train.report_every train.picture_every "
    "train.evaluate_every train.checkpoint_every train.keep_checkpoints "
    "train.tensorboard recovery.max_rollbacks parallel.num_devices parallel.mode "
    "parallel.fsdp evaluation.batch_size "
    "evaluation.num_kept_features evaluation.num_particles evaluation.num_runs "
    "evaluation.defensive evaluation.langevin_moves "
    "compilation_cache.enabled compilation_cache.directory".split()
)

# Removed fields, and the value at which they changed nothing; None: any value.
_REMOVED: dict[str, Any] = {
    "data.timeout": None,
    "recovery.save_patience": None,
    "recovery.max_energy": None,
    "recovery.max_gap": None,
    "evaluation.num_projections": None,
    "evaluation.reference_path": None,
    "model.mlp.fourier_octaves": 0,
    "model.mlp.energy_fourier_octaves": 0,
}


def decays(config: Any) -> bool:
    """Return whether a rate, γ or K changes with the length of the run."""
    game = config.game
    changes = game.gamma_final is not None or game.negatives_from > 0
    return config.optimizer.schedule != "constant" or changes


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configs differ: name → (old, new)."""
    first, second = dict(leaves(old)), dict(leaves(new))
    pairs = {f: (first.get(f), second.get(f)) for f in sorted(first | second)}
    return {f: pair for f, pair in pairs.items() if pair[0] != pair[1]}


def with_absolute_paths(config: Any) -> Any:
    """Return a copy of a valid config whose paths name the same from any directory.

    Raises InputError for a path that cannot be, as `paths.user_path` does.
    """
    config = copy.deepcopy(config)
    for field in PATHS:
        section, _, name = field.partition(".")
        text = config[section][name]
        if text and not ("://" in text and section == "compilation_cache"):
            config[section][name] = str(user_path(text, field).absolute())
    return config


def to_json(config: Any) -> str:
    """Return the config as readable JSON; see `from_json`."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> Any:
    """Return the config that `to_json` wrote; a ConfigError if it is not valid."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the config is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("the config is not a JSON object")
    values = without_removed(values)
    validate(values, saved=True)
    config = base()
    config.update_from_flattened_dict(dict(leaves(values)))
    return config


def without_removed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a saved config's nested values without fields removed since."""
    kept = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            kept[key] = without_removed(value, f"{name}.")
        elif name not in _REMOVED or _REMOVED[name] not in (None, value):
            kept[key] = value
    return kept
