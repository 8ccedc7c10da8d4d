"""From noise to data: the few-step sampler (Geng et al. 2024, algorithm 2)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddaebm_jax import diffusion
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks


def _row_keys(key: Array, rows: Array | None, num: int) -> Array:
    rows = jnp.arange(num) if rows is None else rows
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(rows)


def denoise(
    schedule: Schedule,
    networks: Networks,
    variables: Any,
    key: Array,
    x_last: Float[Array, "batch *shape"],
    latent: bool = True,
    rows: Int[Array, " batch"] | None = None,
) -> Float[Array, "levels batch *shape"]:
    """Takes x_T to x_0 by T calls of the generator.

    The randomness of row i comes from fold_in(key, rows[i]) alone.

    Args:
      schedule: the diffusion.
      networks: the apply functions.
      variables: the generator's.
      key: source of the latents and of the posterior's noise.
      x_last: x_T.
      latent: False: z ≡ 0 (the paper's ablation).
      rows: the rows' numbers, where many are taken a chunk at a time, or split over
        devices; None: 0, 1, ….

    Returns:
      x_T, …, x_0, in this order, T+1 levels.
    """
    batch, event_shape = x_last.shape[0], x_last.shape[1:]
    num_steps = schedule.num_steps
    keys = _row_keys(key, rows, batch)

    def normals(t: int, call: int, shape: tuple[int, ...]) -> Array:
        return jax.vmap(
            lambda k: jax.random.normal(jax.random.fold_in(k, 2 * t + call), shape)
        )(keys)

    x, levels = x_last, [x_last]
    for step in reversed(range(num_steps)):
        t = jnp.full((batch,), step, jnp.int32)
        z = normals(step, 0, (networks.nz,))
        z = z if latent else jnp.zeros_like(z)
        x0 = networks.generator(variables, x, t, z)
        eps = normals(step, 1, event_shape)
        x = diffusion.sample_posterior(schedule, x0, x, t, eps)
        levels.append(x)
    return jnp.stack(levels)


def sample_trajectory(
    schedule: Schedule,
    networks: Networks,
    variables: Any,
    key: Array,
    num_samples: int,
    latent: bool = True,
    rows: Int[Array, " num_samples"] | None = None,
) -> Float[Array, "levels num_samples *shape"]:
    """Draws x_T ~ N(0, I) and returns x_T, …, x_0; see `denoise`."""
    key_last, key_steps = jax.random.split(key)
    keys = _row_keys(key_last, rows, num_samples)
    x_last = jax.vmap(lambda k: diffusion.sample_prior(k, networks.event_shape))(keys)
    return denoise(schedule, networks, variables, key_steps, x_last, latent, rows)


def sample(
    schedule: Schedule,
    networks: Networks,
    variables: Any,
    key: Array,
    num_samples: int,
    latent: bool = True,
    rows: Int[Array, " num_samples"] | None = None,
) -> Float[Array, "num_samples *shape"]:
    """Draws samples of the data; see `sample_trajectory`."""
    how = key, num_samples, latent, rows
    return sample_trajectory(schedule, networks, variables, *how)[-1]
