"""Builds the three networks from a config, as pure functions of their variables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddaebm_jax.config import choices
from ddaebm_jax.models import encoder, mlp, ncsnpp


class Players(NamedTuple):
    """One value for each network: variables, gradients, or averages.

    Attributes:
      energy: of f_θ.
      generator: of G_φ.
      posterior: of q_ψ; an empty dict where the game has no encoder.
    """

    energy: Any
    generator: Any
    posterior: Any


class Networks(NamedTuple):
    """Pure functions of the networks' variables.

    `variables` are Flax's: a dict with `params` and, with batch norm, the running
    averages `batch_stats`. `rngs` are per-example dropout keys, or None for none.

    Attributes:
      init: key → Players of variables.
      energy: (variables, x, t, rngs=None) → f, [batch].
      generator: (variables, x_next, t, z, rngs=None) → x̂_0, like x_next. Uses the
        running averages: a row of the result depends on that row only.
      posterior: (variables, x_t, x_next, t) → (μ, logvar), each [batch, nz].
      train_generator: as `generator` but by batch statistics, → (x̂_0, batch_stats).
      train_posterior: as `posterior` but by batch statistics,
        → ((μ, logvar), batch_stats).
      event_shape: shape of one example.
      nz: width of the latent.
      group: consecutive examples of a batch that see each other in training, and so
        must be in one part of a batch that is taken in parts; 1: they do not.
    """

    init: Callable[[Array], Players]
    energy: Callable[..., Array]
    generator: Callable[..., Array]
    posterior: Callable[..., tuple[Array, Array]]
    train_generator: Callable[..., tuple[Array, Any]]
    train_posterior: Callable[..., tuple[tuple[Array, Array], Any]]
    event_shape: tuple[int, ...]
    nz: int
    group: int = 1


def _mlp_networks(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None
) -> Networks:
    (dim,) = event_shape
    nz = model.nz
    trunk = {
        "x_widths": tuple(model.mlp.x_widths),
        "t_embed_dim": model.mlp.t_embed_dim,
        "t_widths": tuple(model.mlp.t_widths),
        "hidden": tuple(model.mlp.hidden),
        "act": model.mlp.activation,
    }
    normed = dict(
        trunk,
        norm=model.mlp.norm,
        fourier_octaves=model.mlp.fourier_octaves,
        axis_name=axis_name,
    )
    energy = mlp.Energy(dict(trunk, fourier_octaves=model.mlp.energy_fourier_octaves))
    generator = mlp.Generator(dim, normed)
    posterior = mlp.Posterior(nz, model.mlp.posterior_features, normed)

    def init(key: Array) -> Players:
        x, z = jnp.zeros((1, dim)), jnp.zeros((1, nz))
        t = jnp.zeros((1,), jnp.int32)
        keys = jax.random.split(key, 3)
        return Players(
            energy=energy.init(keys[0], x, t),
            generator=generator.init(keys[1], x, t, z),
            posterior=posterior.init(keys[2], x, x, t),
        )

    def train_generator(variables, x_next, t, z, rngs=None):
        x0, updates = generator.apply(
            variables, x_next, t, z, train=True, mutable=["batch_stats"]
        )
        return x0, updates.get("batch_stats", {})

    def train_posterior(variables, x_t, x_next, t):
        moments, updates = posterior.apply(
            variables, x_t, x_next, t, train=True, mutable=["batch_stats"]
        )
        return moments, updates.get("batch_stats", {})

    return Networks(
        init=init,
        energy=lambda variables, x, t, rngs=None: energy.apply(variables, x, t),
        generator=lambda variables, x_next, t, z, rngs=None: generator.apply(
            variables, x_next, t, z
        ),
        posterior=posterior.apply,
        train_generator=train_generator,
        train_posterior=train_posterior,
        event_shape=event_shape,
        nz=nz,
    )


def _image_networks(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None
) -> Networks:
    side, nz = event_shape[0], model.nz
    unet = model.unet
    trunk = {
        "nf": unet.nf,
        "ch_mult": tuple(unet.ch_mult),
        "num_res_blocks": unet.num_res_blocks,
        "attn_resolutions": tuple(unet.attn_resolutions),
        "rate": unet.dropout,
        "fir": unet.fir,
        "progressive_input": unet.progressive_input,
        "dtype": model.dtype,
        "remat": model.remat,
    }
    energy = ncsnpp.Energy(trunk)
    generator = ncsnpp.Generator(unet.z_emb_dim, unet.n_mlp, trunk)
    widths = (nz, model.encoder.ngf, model.encoder.t_emb_dim, model.dtype)
    if side < choices.RESIDUAL_FROM:
        posterior = encoder.ConvEncoder(*widths)
    else:
        posterior = encoder.ResidualEncoder(*widths, axis_name)

    def init(key: Array) -> Players:
        # Lazily: without the forward pass, and parameter by parameter. As one program
        # the drawing of a thousand parameters takes minutes to compile.
        x = jax.ShapeDtypeStruct((1, *event_shape), jnp.float32)
        z = jax.ShapeDtypeStruct((1, nz), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        keys = jax.random.split(key, 3)
        return Players(
            energy=energy.lazy_init(keys[0], x, t),
            generator=generator.lazy_init(keys[1], x, t, z),
            posterior=posterior.lazy_init(keys[2], x, x, t),
        )

    def apply_generator(variables, x_next, t, z, rngs=None):
        return generator.apply(variables, x_next, t, z, rngs)

    # Nothing here depends on the batch but the large posterior's minibatch stddev,
    # which is the same in training; so there are no running averages.
    return Networks(
        init=init,
        energy=lambda variables, x, t, rngs=None: energy.apply(variables, x, t, rngs),
        generator=apply_generator,
        posterior=posterior.apply,
        train_generator=lambda *args, rngs=None: (
            apply_generator(*args, rngs=rngs),
            {},
        ),
        train_posterior=lambda *args: (posterior.apply(*args), {}),
        event_shape=event_shape,
        nz=nz,
        group=1 if side < choices.RESIDUAL_FROM else choices.STDDEV_GROUP,
    )


def build(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None = None
) -> Networks:
    """Builds the networks.

    Args:
      model: the config's `model` section (see `config.base`).
      event_shape: shape of one example.
      axis_name: the mapped axis over which batches are split when the networks are
        trained; statistics of batches are taken over it. Elsewhere, None.

    Raises:
      ValueError: for an unknown `model.name`.
    """
    if model.name == "mlp":
        return _mlp_networks(model, event_shape, axis_name)
    if model.name == "ncsnpp":
        return _image_networks(model, event_shape, axis_name)
    allowed = ", ".join(choices.NETWORKS)
    raise ValueError(f"model.name is '{model.name}'; allowed: {allowed}")
