"""Resampling of images by 2, with the filter (1, 3, 3, 1) or without.

The filter is separable, and per axis each output depends on two or four inputs. So both
directions are sums of shifted slices (the polyphase form) with zeros outside the image:
no convolution, and no products with inserted zeros. The filter is that of Karras et al.
2020 (arXiv 1912.04958).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _padded(x: Array, axis: int, before: int, after: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return jnp.pad(x, pads)


def _interleave(even: Array, odd: Array, axis: int) -> Array:
    shape = list(even.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis=axis + 1).reshape(shape)


def _up_axis(x: Array, axis: int) -> Array:
    """Even outputs are ¼x₋₁ + ¾x, odd ones ¾x + ¼x₊₁."""
    length = x.shape[axis]
    padded = _padded(0.25 * x, axis, 1, 1)
    centre = 0.75 * x
    before = jax.lax.slice_in_dim(padded, 0, length, axis=axis)
    after = jax.lax.slice_in_dim(padded, 2, length + 2, axis=axis)
    return _interleave(before + centre, centre + after, axis)


def _filter_axis(x: Array, axis: int, pad: int, stride: int) -> Array:
    """Every `stride`-th of (x_i + 3x_{i+1} + 3x_{i+2} + x_{i+3})/8 of the padded x."""
    padded = _padded(x, axis, pad, pad)
    end = padded.shape[axis] - 3
    first, second, third, fourth = (
        jax.lax.slice_in_dim(padded, i, i + end, stride, axis) for i in range(4)
    )
    return 0.125 * (first + fourth) + 0.375 * (second + third)


def fir_up(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height2 width2 channels"]:
    """Double both sides: zeros after every sample, padding (2, 1), gain 2 per axis."""
    return _up_axis(_up_axis(x, 1), 2)


def fir_down(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height2 width2 channels"]:
    """Halve both sides, rounded down: padding (1, 1), filter, every second sample."""
    return _filter_axis(_filter_axis(x, 1, 1, 2), 2, 1, 2)


def fir_filter(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height2 width2 channels"]:
    """Filter with padding (2, 2); each side grows by one.

    A 3×3 convolution with stride 2 and no padding then halves an even side.
    """
    return _filter_axis(_filter_axis(x, 1, 2, 1), 2, 2, 1)


def repeat_up(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height2 width2 channels"]:
    """Double both sides by repeating every sample."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def mean_down(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height2 width2 channels"]:
    """Halve both (even) sides by means of 2×2 squares."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return squares.mean(axis=(2, 4))
