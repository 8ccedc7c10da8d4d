"""Layers shared by the networks."""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@partial(jax.jit, static_argnums=1)
def _unit_uniform(key: Array, length: int) -> Float[Array, " length"]:
    return jax.random.uniform(key, (length,), minval=-1.0)


@partial(jax.jit, static_argnums=1)
def _shaped(flat: Array, shape: tuple[int, ...], bound: Array) -> Array:
    return bound * flat[: math.prod(shape)].reshape(shape)


def uniform(key: Array, shape: Sequence[int], bound: float) -> Array:
    """Draw uniformly from ±bound; the numbers are those of `jax.random.uniform`.

    In JAX a number depends on its place in the flat array only. So a vector is drawn
    whose length is the next power of four, and cut: many shapes share a few programs.
    """
    length = 4 ** (((math.prod(shape) - 1).bit_length() + 1) // 2)
    return _shaped(_unit_uniform(key, length), tuple(shape), bound)


def variance_scaling(scale: float) -> nn.initializers.Initializer:
    """Return vs(s): variance scaling, fan_avg, uniform; s = 0 means 1e-10."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        positions, (fan_in, fan_out) = math.prod(shape[:-2]), shape[-2:]
        fan_avg = positions * (fan_in + fan_out) / 2
        bound = (3 * max(scale, 1e-10) / fan_avg) ** 0.5
        return uniform(key, shape, bound).astype(dtype)

    return init


def uniform_fan_in(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """Draw a kernel (last axis: outputs) uniformly from ±1/√fan_in."""
    return uniform(key, shape, math.prod(shape[:-1]) ** -0.5).astype(dtype)


def conv(
    features: int, kernel: int, scale: float = 1.0, dtype: str = "float32", **kwargs
) -> nn.Conv:
    """Return a convolution that keeps the sides, with kernel vs(scale) and bias 0.

    Args:
      features: channels of the output.
      kernel: side of the kernel.
      scale: of the kernel's initialiser.
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
    """Return a Dense layer with kernel vs(scale) and bias 0; see `conv`."""
    return nn.Dense(
        features, kernel_init=variance_scaling(scale), dtype=dtype, **kwargs
    )


def dropout(x: Array, rate: float, keys: Array | None, index: int) -> Array:
    """Return x with units dropped, by a mask per example.

    Args:
      x: [batch, …].
      rate: share of dropped units; the others are scaled by 1/(1 − rate).
      keys: one per example; None: no dropout.
      index: number of this dropout layer in its network, which selects its masks.
    """
    if keys is None or rate == 0.0:
        return x

    def mask(key: Array) -> Array:
        # A flat draw, of the same numbers, compiles three times as fast.
        key = jax.random.fold_in(key, index)
        flat = jax.random.bernoulli(key, 1.0 - rate, (math.prod(x.shape[1:]),))
        return flat.reshape(x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), jnp.zeros_like(x))


def sinusoidal_embedding(
    t: Int[Array, " batch"], dim: int
) -> Float[Array, "batch dim"]:
    """Return [sin(t·w), cos(t·w)], w_i = exp(−i·ln(10000)/(dim/2−1)).

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
    """max(x, 0) + slope·min(x, 0) with one learned slope, initially 0.25."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), ())
        return jnp.where(x >= 0, x, slope * x)


class BatchNorm(nn.Module):
    """Batch norm with ε = 1e-5 and running averages with momentum 0.9.

    With `train`, normalise by the batch's statistics and update the running averages;
    without, normalise by these, so that examples are independent.

    Attributes:
      axis_name: mapped axis over which the batch is split; statistics are of the whole
        batch. None: it is not split.
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
