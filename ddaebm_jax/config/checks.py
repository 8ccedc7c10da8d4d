"""Config checks: every field by itself (`fields`), then what goes together.

A cross-field check yields the fields that it reads, and what they need.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from ddaebm_jax.config import choices, fields
from ddaebm_jax.config.base import base
from ddaebm_jax.errors import InputError

Needs = Iterator[tuple[str, str]]

# Condition: the fields that are read under it only. Not listed is what an ablation or a
# schedule makes moot, so that it stays one switch on any recipe, and the settings of
# Inception features, which --mode=evaluate sets for any run.
READ_WHEN = {
    "data.name table folder": "data.path",
    "data.name table": "data.label_column data.drop_columns data.header",
    "data.name tfds": "data.tfds data.tfds_dir data.split data.test_split data.limit",
    "data.name folder tfds": "data.crop data.skip_corrupt",
    "data.name photos": "data.num_patches",
    "data.name digits mnist5k": "data.held_out_classes",
    f"data.name {' '.join(choices.IMAGES)}": "data.flip data.on_device data.channels "
    "data.image_size data.num_threads data.num_workers data.prefetch "
    "model.reference_kind",
    f"data.name {' '.join(choices.TABLES + choices.IMAGES)}": "data.test_fraction "
    "model.reference data.whiten",
    f"data.name {' '.join(choices.TABLES)}": "model.residual",
    "diffusion.time uniform log_snr karras equal_cost": "diffusion.time_eps",
    "diffusion.time equal_cost": "diffusion.times levels.pilot_steps",
    "model.name mlp": "model.mlp model.confinement",
    "model.name ncsnpp": "model.unet model.encoder model.dtype model.remat "
    "evaluation.batch_size evaluation.inception evaluation.preprocessing "
    "evaluation.reference evaluation.num_kept_features",
    "game.recon nll weighted_nll": "game.recon_floor",
    "evaluation.inception True": "evaluation.inception_weights",
    "compilation_cache.enabled True": "compilation_cache.directory",
}


class ConfigError(InputError):
    """A config that cannot be run; the message names every field at fault."""


def _check_reading(config: Any) -> Needs:
    """Yield fields that differ from the base though nothing reads them."""
    given, default = (dict(fields.leaves(c)) for c in (config, base()))
    changed = {f for f in given if given[f] not in (default[f], None)}
    for condition, names in READ_WHEN.items():
        switch, *values = condition.split()
        for field in sorted(changed) if str(given[switch]) not in values else ():
            if {field, field.rpartition(".")[0]} & {*names.split()}:
                needed = f"the first is read only with {' or '.join(values)}"
                yield f"{field} {switch}", f"{needed}: leave it at {default[field]!r}"
    has_test_split = config.data.name == "tfds" and config.data.test_split
    if "data.test_fraction" in changed and has_test_split:
        needed = "nothing would read the first: leave it, or empty the second"
        yield "data.test_fraction data.test_split data.name", needed
    if "game.lazy_reg" in changed and config.game.gamma == 0:
        yield "game.lazy_reg game.gamma", "nothing would read the first: leave it at 1"


def _check_diffusion(config: Any) -> Needs:
    process = config.diffusion
    betas = "diffusion.beta_min diffusion.beta_max diffusion.variance"
    if process.variance != "cosine" and process.beta_min >= process.beta_max:
        yield betas, "the first must be below the second"
    if process.variance == "geometric" and process.beta_max >= 1:
        yield betas, "a geometric variance needs beta_max below 1"
    if process.variance == "vp" and process.beta_min + process.beta_max > 70:
        yield betas, "with a sum above 70 nothing of the data is left in x_T"
    if process.time == "lsun" and process.num_steps < 2:
        yield "diffusion.num_steps diffusion.time", "these times need at least 2 steps"
    if process.time_eps is None:
        if config.data.name not in choices.TABLES:
            needed = "None takes the noise from a table's rows: give a number, as 1e-3"
            yield "diffusion.time_eps data.name", needed
        if process.time == "lsun":
            needed = "nothing would read the first: leave it at 0.001"
            yield "diffusion.time_eps diffusion.time", needed
    if process.times and (
        len(process.times) != process.num_steps + 1
        or not all(a < b for a, b in itertools.pairwise(process.times))
    ):
        reads = "diffusion.times diffusion.num_steps"
        needed = "times rise from level 0 to level T: T + 1 numbers, or () for a pilot"
        yield reads, needed
    moves, total = config.levels.move_at, config.train.num_steps
    if not all(a < b for a, b in itertools.pairwise((0, *moves, total))):
        yield "levels.move_at train.num_steps", "moves come in order, before the end"
    if moves and process.time == "lsun":
        needed = "costs are measured between levels with noise: leave the first at ()"
        yield "levels.move_at diffusion.time", needed
    if process.time in ("log_snr", "karras", "equal_cost") and not process.times:
        name = "beta_min" if process.variance == "geometric" else "time_eps"
        if process[name] is not None and not 1e-6 <= process[name] <= 0.1:
            needed = "levels spaced by noise start near data: the first must be from "
            reads = f"diffusion.{name} diffusion.time diffusion.variance"
            yield reads, f"{needed}1e-6 to 0.1"
    if process.min_posterior_var is None and not _has_noise_at_data(process):
        reads = "diffusion.min_posterior_var diffusion.variance diffusion.time"
        needed = "level 0 has no noise, so a number is needed, for example 1e-4"
        yield f"{reads} diffusion.time_eps", needed


def _has_noise_at_data(process: Any) -> bool:
    chosen = process.time != "lsun"
    chosen &= process.time_eps is None or process.time_eps >= 1e-6
    return chosen or process.variance == "geometric"


def _check_game(config: Any) -> Needs:
    game, mse = config.game, config.game.recon == "mse"
    if game.gamma_final is not None and game.gamma == 0:
        needed = "γ decays from a positive number: set gamma, or gamma_final to None"
        yield "game.gamma game.gamma_final", needed
    reads_floor = game.divergence == "jeffreys" and game.lambda_f > 0 and not mse
    if reads_floor and game.recon_floor is None and config.diffusion.num_steps == 1:
        reads = "game.recon_floor diffusion.num_steps game.recon game.divergence"
        needed = "None is s_1², which one step lacks: give a number, for example 1e-2"
        yield f"{reads} game.lambda_f", needed


def _check_reference(config: Any) -> Needs:
    if config.model.reference == 0:
        if config.model.residual != base().model.residual:
            needed = "nothing would read the first: leave it at 4.0"
            yield "model.residual model.reference", needed
        if config.model.reference_kind == "windows":
            needed = "leave the first at 'mixture' where the second is 0"
            yield "model.reference_kind model.reference", needed
        return
    if config.model.reference_kind == "windows":
        if config.data.whiten:
            needed = "windows are chosen for pixels as they are: leave the second False"
            yield "model.reference_kind data.whiten", needed
    elif config.model.reference > 1024:
        needed = "a mixture has 1024 Gaussians at most; windows may be 5000"
        yield "model.reference model.reference_kind", needed
    for field, default in (
        ("model.confinement", 0.0),
        ("game.energy_l2", 0.0),
        ("game.defensive_std", 2.0),
    ):
        section, name = field.split(".")
        if config[section][name] != default:
            needed = f"a reference takes its place: leave the first at {default}"
            yield f"{field} model.reference", needed
    if not _has_noise_at_data(config.diffusion):
        reads = "model.reference diffusion.time diffusion.time_eps diffusion.variance"
        yield reads, "a reference needs noise at level 0, for example time_eps 1e-3"


def _check_negatives(config: Any) -> Needs:
    game = config.game
    if game.num_negatives == 1:
        if game.defensive > 0:
            needed = "with one negative the first must be 0.0: that is the paper's game"
            yield "game.defensive game.num_negatives", needed
    elif game.defensive * game.num_negatives % 1:
        needed = "their product, a number of draws, must be whole"
        yield "game.defensive game.num_negatives", needed
    if game.negatives_floor is None and config.diffusion.num_steps == 1:
        needed = "None is s_1², which one step lacks: give a number, for example 3e-3"
        yield "game.negatives_floor diffusion.num_steps", needed


def _check_training(config: Any) -> Needs:
    optimizer, final = config.optimizer, config.optimizer.final_learning_rate
    if optimizer.schedule == "exponential" and final == 0:
        needed = "an exponential decay needs a positive final rate, for example 1e-5"
        yield "optimizer.final_learning_rate optimizer.schedule", needed
    for name in ("learning_rate", "energy_learning_rate"):
        rate = optimizer[name]
        if optimizer.schedule != "constant" and rate is not None and final > rate:
            reads = f"optimizer.final_learning_rate optimizer.{name} optimizer.schedule"
            yield reads, "the rate decays, so the first must not be above the second"
    parts, batch = optimizer.accumulate, config.data.batch_size
    if batch % parts:
        yield "optimizer.accumulate data.batch_size", "the first must divide the second"
    if parts > 1 and config.model.mlp.norm == "batch":
        needed = "batch norm needs the whole batch: use accumulate=1, or norm='none'"
        yield "optimizer.accumulate model.mlp.norm", needed
    group, least = choices.STDDEV_GROUP, choices.RESIDUAL_FROM
    if parts > 1 and config.data.image_size >= least and batch % (parts * group):
        reads = "optimizer.accumulate data.batch_size data.image_size"
        yield reads, f"from {least} pixels on each part must be a multiple of {group}"
    if config.parallel.fsdp and config.parallel.mode != "jit":
        yield "parallel.fsdp parallel.mode", "fsdp needs mode 'jit'"


def _check_data(config: Any) -> Needs:
    data = config.data
    if data.name in ("table", "folder") and not data.path:
        yield "data.path data.name", "a path is needed"
    if data.name == "tfds" and not data.tfds:
        yield "data.tfds data.name", "a name in TensorFlow Datasets is needed"
    if (data.name in choices.IMAGES) != (config.model.name == "ncsnpp"):
        needed = "images need model.name='ncsnpp', points and tables 'mlp'"
        yield "data.name model.name", needed


def _check_unet(config: Any) -> Needs:
    unet, patch = config.model.unet, config.model.unet.patch_size
    side, rest = divmod(config.data.image_size, patch)
    sides = [side >> level for level, _ in enumerate(unet.ch_mult)]
    if rest or side % 2 ** (len(sides) - 1):
        needed = f"{len(sides)} levels halve the side {len(sides) - 1} times"
        needed += f", of whole patches of {patch} pixels" * (patch > 1)
        yield "data.image_size model.unet.patch_size model.unet.ch_mult", needed
    if not {*unet.attn_resolutions} <= {*sides}:
        needed = f"attention is possible at sides of levels, {sides}, or (): nowhere"
        names = "attn_resolutions", "patch_size", "ch_mult"
        names = " ".join(f"model.unet.{name}" for name in names)
        yield f"{names} data.image_size", needed
    if unet.progressive_input == "residual" and not unet.fir:
        needed = "use fir=True, or progressive_input='none'"
        yield "model.unet.progressive_input model.unet.fir", needed
    # Widths that a group norm reads: of layers, and where a skip connection joins them.
    widths = [unet.nf, *(unet.nf * multiple for multiple in unet.ch_mult)]
    joined = [sum(pair) for pair in itertools.pairwise(widths)]
    for width in sorted({*widths, *joined, *(2 * width for width in widths[1:])}):
        if width > fields.WIDEST or width % min(width // 4, choices.MAX_GROUPS):
            use = f"use multiples of 4 up to 128, then of 32 up to {fields.WIDEST}"
            yield "model.unet.nf model.unet.ch_mult", f"a layer is {width} wide; {use}"
            return


def problems(config: Any, saved: bool = False) -> list[str]:
    """Return all problems of a config, or of nested dicts, a line each; [] if none.

    Cross-field checks look at a config in which the base's values stand for unusable
    ones; what they yield counts where all fields that they read are usable. `saved` is
    for what a run was trained with: fields that went unread do not matter then, and
    fields that its version did not have yet have the base's values, which is what it
    did.
    """
    given, default = (dict(fields.leaves(c)) for c in (config, base()))
    unknown = {f: fields.unknown(f, default) for f in given.keys() - default.keys()}
    if saved:
        there = {field.rpartition(".")[0] for field in given}
        own = {f: v for f, v in default.items() if f.rpartition(".")[0] in there}
        given = own | given
    sections = tuple(f"{field}." for field in unknown)
    missing = [f for f in default.keys() - given.keys() if not f.startswith(sections)]
    found = unknown | {f: f"{f} is missing; start from config.base()" for f in missing}
    for field in default.keys() & given.keys():
        if wrong := fields.problem(field, given[field], default[field]):
            found[field] = wrong
    usable = {f: value for f, value in given.items() if f not in found}
    checked, together = base(), []
    checked.update_from_flattened_dict(usable)
    checks = [_check_diffusion, _check_game, _check_reference]
    checks += [_check_negatives, _check_training]
    checks += [_check_data, _check_unet]
    for check in checks if saved else [*checks, _check_reading]:
        for names, needed in check(checked):
            if usable.keys() >= {*names.split()}:
                told = " and ".join(f"{f} is {usable[f]!r}" for f in names.split())
                together.append(f"{told}; {needed}")
    return sorted(found.values()) + together


def validate(config: Any, saved: bool = False) -> None:
    """Raise a ConfigError that names every problem of a config; see `problems`."""
    if found := problems(config, saved):
        raise ConfigError("; ".join(found))
