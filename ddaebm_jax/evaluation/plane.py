"""How near a model in the plane is to the truth: its samples and its density."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class ModeCoverage(NamedTuple):
    """What samples of a mixture hit.

    Attributes:
      modes_found: modes with at least one high-quality sample.
      high_quality: share of samples within 3σ of the nearest mode's centre. Of the
        true mixture it is 1 − e^{−4.5} = 0.989.
    """

    modes_found: int
    high_quality: float


def mode_coverage(
    samples: Float[np.ndarray, "n 2"], modes: Float[np.ndarray, "m 2"], std: float
) -> ModeCoverage:
    """Counts modes found and the share of high-quality samples.

    Args:
      samples: the model's points.
      modes: centres of the mixture's components.
      std: their standard deviation.
    """
    distances = np.sqrt(((samples[:, None, :] - modes[None, :, :]) ** 2).sum(axis=-1))
    good = distances.min(axis=1) <= 3.0 * std
    return ModeCoverage(
        modes_found=len(np.unique(distances.argmin(axis=1)[good])),
        high_quality=float(good.mean()),
    )


def sliced_wasserstein(
    first: Float[Array, "n dim"],
    second: Float[Array, "n dim"],
    key: Array,
    num_projections: int = 500,
) -> Float[Array, ""]:
    """Returns the sliced 2-Wasserstein distance of two samples of equal size.

    The root of the mean, over random directions, of the squared 2-Wasserstein
    distance of the projections (Bonneel et al. 2015).

    Raises:
      ValueError: if the samples differ in size.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"the samples have shapes {first.shape} and {second.shape}; "
            "draw as many of one as of the other"
        )
    directions = jax.random.normal(key, (num_projections, first.shape[1]))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)

    def squared(direction: Array) -> Array:
        gaps = jnp.sort(first @ direction) - jnp.sort(second @ direction)
        return (gaps**2).mean()

    return jnp.sqrt(jax.lax.map(squared, directions).mean())


def jensen_shannon(
    log_p: Float[Array, "*cells"], log_q: Float[Array, "*cells"]
) -> Float[Array, ""]:
    """Returns the Jensen-Shannon divergence of two grids of log masses, in nats.

    Each is normalised over the cells first. 0 for equal ones, log 2 = 0.693 for
    disjoint ones.
    """
    log_p = jax.nn.log_softmax(log_p.ravel())
    log_q = jax.nn.log_softmax(log_q.ravel())
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)

    def kl(log_from: Array) -> Array:
        # A cell without mass adds nothing; there log_from and log_m may be −inf.
        empty = jnp.isneginf(log_from)
        ratio = jnp.where(empty, 0.0, log_from - log_m)
        return (jnp.exp(log_from) * ratio).sum()

    return 0.5 * (kl(log_p) + kl(log_q))
