"""Layers shared by the networks."""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


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


def uniform_within(bound: float) -> nn.initializers.Initializer:
    """Return an initialiser that draws uniformly from ±bound."""
    return lambda key, shape, dtype: uniform(key, shape, bound).astype(dtype)


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
    kernel_init = variance_scaling(scale)
    return nn.Dense(features, kernel_init=kernel_init, dtype=dtype, **kwargs)


def dropout_masks(
    keys: Array, rate: float, shapes: Sequence[Sequence[int]]
) -> list[Bool[Array, "batch *shape"]]:
    """Return, for each layer of dropout in a network, which units it keeps.

    One draw for all layers: XLA would compile the random bits of each anew, in every
    operation that it fuses them into.

    Args:
      keys: one per example.
      rate: share of dropped units, to 1/2¹⁶.
      shapes: of an example's units in each layer.
    """
    sizes = [math.prod(shape) for shape in shapes]

    def draw(key: Array) -> Array:
        pairs = jax.random.bits(key, ((sum(sizes) + 1) // 2,), jnp.uint32)
        return jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(-1)

    # In 32 bits, as the bound may be 2¹⁶.
    kept = jax.vmap(draw)(keys).astype(jnp.uint32) < round((1.0 - rate) * 2**16)
    ends = np.cumsum(sizes)
    parts = jnp.split(jax.lax.optimization_barrier(kept), ends, axis=1)
    pairs = zip(parts, shapes, strict=False)  # What is left over is cut.
    return [part.reshape(-1, *shape) for part, shape in pairs]


def dropout(x: Array, rate: float, kept: Array | None) -> Array:
    """Return x with units dropped, the others scaled by 1/(1 − rate).

    Args:
      x: [batch, …].
      rate: share of dropped units.
      kept: of `dropout_masks`; None: all units.
    """
    if kept is None:
        return x
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


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
