"""What of a config goes together, and which of its fields something reads.

A check reads the fields that it is about; where one of them has a problem of its own,
the check is left out.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ddaebm_jax import diffusion
from ddaebm_jax.data import images, synthetic
from ddaebm_jax.models import ncsnpp
from ddaebm_jax.models.encoder import RESIDUAL_FROM, STDDEV_GROUP

# Of a layer. The square of it times a batch can still be counted.
WIDEST = 2**16


class UnusableError(Exception):
    """A field was read that has a problem of its own."""


class Usable:
    """A config, or a section of it, of which only the usable fields can be read.

    Args:
      given: all fields, by their dotted names.
      usable: those that have no problem of their own.
      prefix: of the section, with its dot.
    """

    def __init__(
        self, given: dict[str, Any], usable: set[str], prefix: str = ""
    ) -> None:
        self._given, self._usable, self._prefix = given, usable, prefix

    def __getattr__(self, name: str) -> Any:
        """Returns a field's value, or a section.

        Raises:
          UnusableError: if the field has a problem.
        """
        field = self._prefix + name
        if field in self._usable:
            return self._given[field]
        if any(other.startswith(f"{field}.") for other in self._usable):
            return Usable(self._given, self._usable, f"{field}.")
        raise UnusableError(field)


Check = Callable[[Any], Iterator[str]]


def _schedule_problems(config: Any) -> Iterator[str]:
    process = config.diffusion
    if process.variance != "cosine" and not process.beta_min < process.beta_max:
        yield (
            f"diffusion.beta_min is {process.beta_min} and diffusion.beta_max is "
            f"{process.beta_max}; the first must be below the second"
        )
        return
    try:
        diffusion.schedule_values(
            process.num_steps,
            process.variance,
            process.beta_min,
            process.beta_max,
            process.time,
            process.time_eps,
            process.max_beta,
            process.min_posterior_var,
        )
    except ValueError as error:
        yield f"diffusion: {error}"


def _floor_problems(config: Any) -> Iterator[str]:
    game = config.game
    forward = game.divergence == "jeffreys" and game.lambda_f > 0
    reads_floor = forward and game.recon != "mse"
    if reads_floor and game.recon_floor is None and config.diffusion.num_steps < 2:
        yield (
            "game.recon_floor is None, which stands for s_1², but there is one step "
            "only (diffusion.num_steps=1); give a number, for example 1e-2"
        )


def _penalty_problems(config: Any) -> Iterator[str]:
    if config.game.gamma_final is not None and config.game.gamma == 0:
        yield (
            f"game.gamma is 0 and game.gamma_final is {config.game.gamma_final}; γ "
            "decays from a positive number: set game.gamma, or gamma_final to None"
        )


def _rate_problems(config: Any) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.schedule == "constant":
        return
    final = optimizer.final_learning_rate
    if optimizer.schedule == "exponential" and final == 0:
        yield (
            "optimizer.final_learning_rate is 0; an exponential decay needs a "
            "positive one, for example 1e-5"
        )
    for name in ("learning_rate", "energy_learning_rate"):
        rate = getattr(optimizer, name)
        if rate is not None and final > rate:
            yield (
                f"optimizer.final_learning_rate is {final}, above optimizer.{name} "
                f"{rate}; '{optimizer.schedule}' decays"
            )


def _pmap_problems(config: Any) -> Iterator[str]:
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


def _source_problems(config: Any) -> Iterator[str]:
    data = config.data
    for field, names in (("path", ("table", "folder")), ("tfds", ("tfds",))):
        if data.name in names and not getattr(data, field):
            yield f"data.{field} is empty; data.name '{data.name}' needs it"


def _crop_problems(config: Any) -> Iterator[str]:
    if config.data.crop is None:
        return
    left, top, right, bottom = config.data.crop
    if not (left < right and top < bottom):
        yield (
            f"data.crop is {tuple(config.data.crop)}; (left, top, right, bottom) with "
            "left < right and top < bottom is needed"
        )


def _network_problems(config: Any) -> Iterator[str]:
    of_images = config.data.name in images.IMAGES
    if of_images and config.model.name != "ncsnpp":
        yield (
            f"model.name is '{config.model.name}', but data.name "
            f"'{config.data.name}' holds images; use model.name='ncsnpp'"
        )
    if not of_images and config.model.name == "ncsnpp":
        yield (
            f"model.name is 'ncsnpp', but data.name '{config.data.name}' holds no "
            "images; use model.name='mlp'"
        )


def _is_for_images(config: Any) -> bool:
    return config.data.name in images.IMAGES and config.model.name == "ncsnpp"


def _side_problems(config: Any) -> Iterator[str]:
    if not _is_for_images(config):
        return
    side = config.data.image_size
    if side & (side - 1):
        yield (
            f"data.image_size is {side}; the posterior needs a power of two, for "
            f"example {2 ** (side.bit_length() - 1)}"
        )
    levels = len(config.model.unet.ch_mult)
    if side % 2 ** (levels - 1):
        yield (
            f"data.image_size is {side}, not divisible by {2 ** (levels - 1)}, as the "
            f"{levels} levels of model.unet.ch_mult need"
        )
    sides = [side >> level for level in range(levels)]
    for resolution in config.model.unet.attn_resolutions:
        if resolution not in sides:
            yield (
                f"model.unet.attn_resolutions lists {resolution}, but the levels have "
                f"sides {', '.join(map(str, sides))}; choose of these, or ()"
            )


def _pyramid_problems(config: Any) -> Iterator[str]:
    unet = config.model.unet
    residual = _is_for_images(config) and unet.progressive_input == "residual"
    if residual and not unet.fir:
        yield (
            "model.unet.progressive_input is 'residual', which needs model.unet.fir="
            "True; or set it to 'none'"
        )


def _width_problems(config: Any) -> Iterator[str]:
    if not _is_for_images(config):
        return
    unet = config.model.unet
    widths = ncsnpp.normed_widths(unet.nf, unet.ch_mult, unet.num_res_blocks)
    if max(widths) > WIDEST:
        yield (
            f"model.unet.nf {unet.nf} and ch_mult {tuple(unet.ch_mult)} make layers of "
            f"width {max(widths)}; at most {WIDEST} is possible"
        )
        return
    bad = [width for width in sorted(widths) if width % ncsnpp.num_groups(width)]
    if bad:
        yield (
            f"model.unet.nf {unet.nf} and ch_mult {tuple(unet.ch_mult)} make layers of "
            f"width {bad[0]}, which {ncsnpp.num_groups(bad[0])} groups do not divide; "
            "use a multiple of 4 up to 128, or of 32"
        )


def _is_odd(field: str) -> Check:
    read = operator.attrgetter(field)

    def check(config: Any) -> Iterator[str]:
        if read(config) % 2:
            yield f"{field} is {read(config)}; even is needed"

    return check


def _channel_problems(config: Any) -> Iterator[str]:
    if config.data.channels == 2:
        yield "data.channels is 2; allowed: 1 (grey), 3 (RGB)"


def _sample_problems(config: Any) -> Iterator[str]:
    fewer = config.evaluation.num_samples_on_the_way
    if 0 < fewer < 10:
        yield (
            f"evaluation.num_samples_on_the_way is {fewer}; 0 (as many as "
            "num_samples), or at least 10, is needed"
        )


CHECKS: tuple[Check, ...] = (
    _schedule_problems,
    _floor_problems,
    _penalty_problems,
    _rate_problems,
    _pmap_problems,
    _accumulation_problems,
    _source_problems,
    _channel_problems,
    _crop_problems,
    _network_problems,
    _side_problems,
    _pyramid_problems,
    _width_problems,
    _is_odd("model.unet.nf"),
    _is_odd("model.encoder.t_emb_dim"),
    _is_odd("model.mlp.t_embed_dim"),
    _sample_problems,
)


# Fields that are read under a condition only.


class _Condition(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


def _when(field: str, *values: Any) -> _Condition:
    read = operator.attrgetter(field)
    words = f"{field} {' or '.join(map(str, values))}"
    return _Condition(words, lambda config: read(config) in values)


def _has_share(config: Any) -> bool:
    if config.data.name == "tfds":
        return not config.data.test_split
    return config.data.name not in synthetic.SYNTHETIC


_OF_PLANE_OR_TABLE = _when("model.name", "mlp")
_OF_IMAGES = _when("model.name", "ncsnpp")
_OF_IMAGE_SETS = _when("data.name", *images.IMAGES)
_OF_TFDS = _when("data.name", "tfds")
_OF_FILES = _when("data.name", "folder", "tfds")

# Field, or section with a dot at its end. Left out: weights, widths, rates and ranges
# that a switch makes moot (game.latent, game.posterior, game.divergence,
# optimizer.schedule, diffusion.variance), for those are to be one switch on any recipe;
# what train.evaluate_every=0 and data.on_device make
# moot, likewise; and the settings of Inception's features, by which --mode=evaluate
# can measure a run that was trained without.
READ_WHEN: dict[str, _Condition] = {
    "data.path": _when("data.name", "table", "folder"),
    "data.label_column": _when("data.name", "table"),
    "data.tfds": _OF_TFDS,
    "data.tfds_dir": _OF_TFDS,
    "data.split": _OF_TFDS,
    "data.test_split": _OF_TFDS,
    "data.limit": _OF_TFDS,
    "data.crop": _OF_FILES,
    "data.skip_corrupt": _OF_FILES,
    "data.num_patches": _when("data.name", "photos"),
    "data.held_out_classes": _when("data.name", "digits"),
    "data.flip": _OF_IMAGE_SETS,
    "data.on_device": _OF_IMAGE_SETS,
    "data.image_size": _OF_IMAGE_SETS,
    "data.channels": _OF_IMAGE_SETS,
    "data.num_threads": _OF_IMAGE_SETS,
    "data.prefetch": _OF_IMAGE_SETS,
    "data.num_workers": _OF_IMAGE_SETS,
    "data.timeout": _OF_IMAGE_SETS,
    "data.test_fraction": _Condition(
        "tables, and for images without a data.test_split", _has_share
    ),
    "diffusion.time_eps": _when("diffusion.time", "uniform"),
    "model.mlp.": _OF_PLANE_OR_TABLE,
    "model.unet.": _OF_IMAGES,
    "model.encoder.": _OF_IMAGES,
    "model.dtype": _OF_IMAGES,
    "model.remat": _OF_IMAGES,
    "game.lazy_reg": _Condition("game.gamma above 0", lambda c: c.game.gamma > 0),
    "game.recon_floor": _when("game.recon", "nll", "weighted_nll"),
    "evaluation.batch_size": _OF_IMAGES,
    "evaluation.inception": _OF_IMAGES,
    "evaluation.inception_weights": _when("evaluation.inception", True),
    "evaluation.preprocessing": _OF_IMAGES,
    "evaluation.reference": _OF_IMAGES,
    "evaluation.reference_path": _OF_IMAGES,
    "evaluation.num_kept_features": _OF_IMAGES,
    "evaluation.num_projections": _OF_PLANE_OR_TABLE,
    "compilation_cache.directory": _when("compilation_cache.enabled", True),
}


def unread(field: str, value: Any, default: Any) -> Check:
    """Returns the check that something reads a field, if it was set."""
    section = field.rpartition(".")[0] + "."
    condition = READ_WHEN.get(field) or READ_WHEN.get(section)

    def check(config: Any) -> Iterator[str]:
        # None asks for nothing.
        if condition and value not in (default, None) and not condition.holds(config):
            yield (
                f"{field} is {value!r}, which nothing would read; it is for "
                f"{condition.words}: leave it at {default!r}"
            )

    return check
