"""Layers that several of the networks use."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoidal_embedding(
    t: Int[Array, " batch"], dim: int
) -> Float[Array, "batch dim"]:
    """Returns [sin(t·w), cos(t·w)], w_i = exp(−i·ln(10000)/(dim/2−1)).

    Raises:
      ValueError: if `dim` is odd or below 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the time embedding's width is {dim}; even and ≥ 4 is needed")
    half = dim // 2
    w = np.exp(-np.arange(half) * np.log(10000.0) / (half - 1)).astype(np.float32)
    phase = t.astype(jnp.float32)[:, None] * w[None, :]
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)


class PReLU(nn.Module):
    """max(x, 0) + slope·min(x, 0) with one learned slope, 0.25 at first."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), ())
        return jnp.where(x >= 0, x, slope * x)


class BatchNorm(nn.Module):
    """Batch norm with ε = 1e-5; the running averages keep 0.9 a call.

    With `train` it normalises by this call's statistics and updates the running
    averages, else it normalises by the running averages, so that an example does
    not depend on its neighbours.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], train: bool
    ) -> Float[Array, "batch features"]:
        return nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm"
        )(x)
