"""Layers that several of the networks use."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def variance_scaling(scale: float) -> nn.initializers.Initializer:
    """Returns vs(s): variance scaling, fan_avg, uniform; s = 0 stands for 1e-10."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


def uniform_fan_in(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """Draws a kernel, whose last axis is the output, uniformly from ±1/√fan_in."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(
    features: int, kernel: int, scale: float = 1.0, dtype: str = "float32", **kwargs
) -> nn.Conv:
    """Returns a convolution with kernel vs(scale), bias 0, that keeps sides.

    Args:
      features: channels of the output.
      kernel: side of the kernel, odd where the sides are to be kept.
      scale: of the kernel's start.
      dtype: of the computation; parameters are float32.
      **kwargs: of `nn.Conv`: name, strides, padding, use_bias.
    """
    pad = kernel // 2
    kwargs.setdefault("padding", ((pad, pad), (pad, pad)))
    return nn.Conv(
        features,
        (kernel, kernel),
        kernel_init=variance_scaling(scale),
        dtype=dtype,
        **kwargs,
    )


def dense(
    features: int, scale: float = 1.0, dtype: str = "float32", **kwargs
) -> nn.Dense:
    """Returns a Dense layer with kernel vs(scale), bias 0; see `conv`."""
    return nn.Dense(
        features, kernel_init=variance_scaling(scale), dtype=dtype, **kwargs
    )


def dropout(x: Array, rate: float, keys: Array | None, place: int) -> Array:
    """Drops units by masks of each example's own.

    Args:
      x: [batch, …].
      rate: share of units that are dropped; what is left is scaled by 1/(1 − rate).
      keys: one a example; None: x is returned as it is.
      place: which dropout layer of the network this is; each has its own masks.
    """
    if keys is None or rate == 0.0:
        return x

    def mask(key: Array) -> Array:
        return jax.random.bernoulli(
            jax.random.fold_in(key, place), 1.0 - rate, x.shape[1:]
        )

    return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), jnp.zeros_like(x))


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

    Attributes:
      axis_name: the mapped axis over which a batch is split; its statistics are then
        of the whole batch. None: each call sees the whole.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], train: bool
    ) -> Float[Array, "batch features"]:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=self.axis_name,
            name="norm",
        )(x)
