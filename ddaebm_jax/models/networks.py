"""The three networks of a config as pure functions of their variables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddaebm_jax.config import choices
from ddaebm_jax.models import encoder, mlp, ncsnpp


class Players(NamedTuple):
    """One value per network: variables, gradients, or averages.

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
    averages `batch_stats`. `rngs` are per-example dropout keys; None: no dropout.

    Attributes:
      init: key → Players of variables.
      energy: (variables, x, t, rngs=None) → f, [batch].
      generator: (variables, x_next, t, z, rngs=None) → x̂_0, like x_next. Uses running
        averages, so examples are independent of each other.
      posterior: (variables, x_t, x_next, t) → (μ, log σ²), each [batch, nz].
      train_generator: `generator` with batch statistics, → (x̂_0, batch_stats).
      train_posterior: `posterior` with batch statistics,
        → ((μ, log σ²), batch_stats).
      event_shape: shape of one example.
      nz: width of the latent.
      group: number of consecutive examples that depend on each other in training and
        must stay together when a batch is split; 1: examples are independent.
      residual: as `energy`, the part of it that is learnt, beside a known reference
        (see `reference`); None: all of it is.
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
    residual: Callable[..., Array] | None = None


def build(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None = None
) -> Networks:
    """Return the networks that a config describes.

    Args:
      model: the config's `model` section (see `config.base`).
      event_shape: shape of one example.
      axis_name: mapped axis over which training batches are split, so that batch
        statistics are those of the whole batch; None: batches are not split.
    """
    make = _mlp_networks if model.name == "mlp" else _image_networks
    return make(model, event_shape, axis_name)


def _mlp_networks(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None
) -> Networks:
    (dim,) = event_shape
    nz, confinement = model.nz, model.confinement
    trunk = {
        "x_widths": tuple(model.mlp.x_widths),
        "t_embed_dim": model.mlp.t_embed_dim,
        "t_widths": tuple(model.mlp.t_widths),
        "hidden": tuple(model.mlp.hidden),
        "act": model.mlp.activation,
    }
    normed_trunk = dict(trunk, norm=model.mlp.norm, axis_name=axis_name)
    energy = mlp.Energy(trunk)
    generator = mlp.Generator(dim, normed_trunk)
    posterior = mlp.Posterior(nz, model.mlp.posterior_features, normed_trunk)

    def init(key: Array) -> Players:
        x, z = jnp.zeros((1, dim)), jnp.zeros((1, nz))
        t = jnp.zeros((1,), jnp.int32)
        keys = jax.random.split(key, 3)
        return Players(
            energy=energy.init(keys[0], x, t),
            generator=generator.init(keys[1], x, t, z),
            posterior=posterior.init(keys[2], x, x, t),
        )

    def confined_energy(variables, x, t, rngs=None):
        f = energy.apply(variables, x, t)
        return f - 0.5 * confinement * (x**2).sum(axis=1) if confinement else f

    def in_training(network):
        def apply(variables, *inputs, rngs=None):
            how = {"train": True, "mutable": ["batch_stats"]}
            found, updates = network.apply(variables, *inputs, **how)
            return found, updates.get("batch_stats", {})

        return apply

    return Networks(
        init=init,
        energy=confined_energy,
        generator=lambda variables, x_next, t, z, rngs=None: generator.apply(
            variables, x_next, t, z
        ),
        posterior=posterior.apply,
        train_generator=in_training(generator),
        train_posterior=in_training(posterior),
        event_shape=event_shape,
        nz=nz,
    )


def _image_networks(
    model: Any, event_shape: tuple[int, ...], axis_name: str | None
) -> Networks:
    nz, unet = model.nz, model.unet
    trunk = {
        "patch_size": unet.patch_size,
        "nf": unet.nf,
        "ch_mult": tuple(unet.ch_mult),
        "num_res_blocks": unet.num_res_blocks,
        "attn_resolutions": tuple(unet.attn_resolutions),
        "dropout_rate": unet.dropout,
        "fir": unet.fir,
        "progressive_input": unet.progressive_input,
        "dtype": model.dtype,
        "remat": model.remat,
    }
    energy = ncsnpp.Energy(trunk)
    generator = ncsnpp.Generator(unet.z_emb_dim, unet.n_mlp, trunk)
    widths = (nz, model.encoder.ngf, model.encoder.t_emb_dim, model.dtype)
    is_residual = event_shape[0] >= choices.RESIDUAL_FROM
    posterior = (
        encoder.ResidualEncoder(*widths, axis_name)
        if is_residual
        else encoder.ConvEncoder(*widths)
    )

    def init(key: Array) -> Players:
        # lazy_init draws parameter by parameter without a forward pass: as one program,
        # a thousand initialisers take minutes to compile.
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

    # Without batch norm, training and evaluation are the same.
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
        group=choices.STDDEV_GROUP if is_residual else 1,
    )
