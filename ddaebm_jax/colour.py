"""Noise of the images' own colour, by an invertible linear map around the mathematics.

With C = L Lᵀ the covariance of the noise, the game is played on u = L⁻¹x with white
noise: x_t = A_t x_0 + S_t L ε is u_t = A_t u_0 + S_t ε, and all closed forms stay. The
networks see x. L scales the coefficients of a discrete cosine transform (DCT-II,
orthonormal) by the root of the images' power, which is averaged over frequencies of one
radius.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddaebm_jax.models import Networks

Std = Float[np.ndarray | Array, "height width"]
Images = Float[np.ndarray | Array, "n height width channels"]

# Share of the mean power that is added to each, as to the eigenvalues of tables.
_RIDGE = 0.01
# Fewer bits, the default of accelerators, would show.
_EXACT = jax.lax.Precision.HIGHEST


def fit(images: Images) -> Std:
    """Returns the noise's standard deviation by coefficient, whose mean square is 1.

    The power is that about the mean image, over images and channels.
    """
    images = np.asarray(images, np.float64)
    height, width = images.shape[1:3]
    rows, columns = _basis(height), _basis(width)
    found = np.einsum(
        "kh,nhwc,lw->nklc", rows, images - images.mean(axis=0), columns, optimize=True
    )
    radius = np.hypot(*np.indices((height, width))).round().astype(int)
    total = np.bincount(radius.ravel(), (found**2).mean(axis=(0, 3)).ravel())
    power = (total / np.bincount(radius.ravel()))[radius]
    # Images that are all alike have no colour.
    power = power + (_RIDGE * power.mean() or 1.0)
    return np.sqrt(power / power.mean())


def coloured(std: Std, u: Images) -> Array:
    """Returns x = L u."""
    return _filtered(std, u)


def whitened(std: Std, x: Images) -> Array:
    """Returns u = L⁻¹ x."""
    return _filtered(1.0 / std, x)


def log_det(std: Std, channels: int) -> float:
    """Returns log |det L⁻¹|, nats."""
    return -channels * float(np.log(std).sum())


def with_colour(networks: Networks, std: Std | None) -> Networks:
    """Returns networks of u whose insides see x = L u; None: they stay as they are."""
    if std is None:
        return networks

    def seen(u: Array) -> Array:
        return coloured(std, u)

    def energy(variables, u, t, rngs=None):
        return networks.energy(variables, seen(u), t, rngs=rngs)

    def generator(variables, u_next, t, z, rngs=None):
        x0 = networks.generator(variables, seen(u_next), t, z, rngs=rngs)
        return whitened(std, x0)

    def train_generator(variables, u_next, t, z, rngs=None):
        x0, stats = networks.train_generator(variables, seen(u_next), t, z, rngs=rngs)
        return whitened(std, x0), stats

    def posterior(variables, u_t, u_next, t):
        return networks.posterior(variables, seen(u_t), seen(u_next), t)

    def train_posterior(variables, u_t, u_next, t):
        return networks.train_posterior(variables, seen(u_t), seen(u_next), t)

    return networks._replace(
        energy=energy,
        generator=generator,
        train_generator=train_generator,
        posterior=posterior,
        train_posterior=train_posterior,
    )


def _basis(size: int) -> Float[np.ndarray, "size size"]:
    """Returns the orthonormal DCT-II, a row for each frequency."""
    frequency, place = np.indices((size, size))
    waves = np.cos(np.pi * frequency * (place + 0.5) / size)
    return waves * np.where(frequency == 0, 1.0, np.sqrt(2.0)) / np.sqrt(size)


def _filtered(scale: Std, x: Images) -> Array:
    rows, columns = (jnp.asarray(_basis(n), jnp.float32) for n in scale.shape)
    scale = jnp.asarray(scale, jnp.float32)[None, ..., None]

    def along(first: Array, second: Array, values: Array) -> Array:
        return jnp.einsum("kh,nhwc,lw->nklc", first, values, second, precision=_EXACT)

    return along(rows.T, columns.T, scale * along(rows, columns, jnp.asarray(x)))
