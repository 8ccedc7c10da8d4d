"""The NCSN++ U-Net of the image model's energy and generator.

One trunk for both: the latent z adapts the norms of the generator's residual blocks,
and the energy is f = −½‖x − U(x, t)‖². Trunk: Song et al. 2021 (arXiv 2011.13456,
appendix H); heads: Geng et al. 2024.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddaebm_jax.config.choices import MAX_GROUPS
from ddaebm_jax.models import resample
from ddaebm_jax.models.layers import (
    conv,
    dense,
    dropout,
    dropout_masks,
    sinusoidal_embedding,
)

_SQRT_HALF = 0.5**0.5

Image = Float[Array, "batch height width channels"]


def num_groups(channels: int) -> int:
    """Return the number of groups of a group norm, min(C/4, 32)."""
    return min(channels // 4, MAX_GROUPS)


def group_norm(
    x: Image,
    scale: Float[Array, "#batch channels"],
    shift: Float[Array, "#batch channels"],
    dtype: str,
) -> Image:
    """Return the group norm of x with ε = 1e-6 and statistics in float32.

    Sums over positions come first, then, as one product, those of a group's channels:
    the large array is read in its own layout, and few operations are left to
    differentiate twice.
    """
    _, height, width, channels = x.shape
    groups = num_groups(channels)
    size = channels // groups
    block = np.full((size, size), 1 / (height * width * size), np.float32)
    over_group = np.kron(np.eye(groups, dtype=np.float32), block)

    # On GPUs and TPUs the default product of float32 has TF32's or bfloat16's digits.
    mean_over = partial(jnp.dot, b=over_group, precision=jax.lax.Precision.HIGHEST)

    h = x.astype(jnp.float32)
    mean, square = mean_over(h.sum(axis=(1, 2))), mean_over((h * h).sum(axis=(1, 2)))
    # Not below 0 by rounding.
    variance = nn.relu(square - mean * mean)
    scale = scale * jax.lax.rsqrt(variance + 1e-6)
    shift = shift - mean * scale
    return (h * scale[:, None, None, :] + shift[:, None, None, :]).astype(dtype)


class GroupNorm(nn.Module):
    """Group norm with a learned scale and shift per channel; `dtype`: of the result."""

    dtype: str

    @nn.compact
    def __call__(self, x: Image) -> Image:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return group_norm(x, scale[None, :], bias[None, :], self.dtype)


class AdaptiveGroupNorm(nn.Module):
    """Group norm with scale γ and shift b affine in a style; `dtype`: of the result."""

    dtype: str

    @nn.compact
    def __call__(self, x: Image, style: Float[Array, "batch style"]) -> Image:
        channels = x.shape[-1]

        def identity_init(key: Array, shape: Sequence[int], dtype) -> Array:
            del key
            return jnp.repeat(jnp.array([1, 0], dtype), shape[0] // 2)

        affine = dense(2 * channels, bias_init=identity_init, name="style")(
            style.astype(jnp.float32)
        )
        scale, shift = jnp.split(affine, 2, axis=-1)
        return group_norm(x, scale, shift, self.dtype)


class ResidualBlock(nn.Module):
    """BigGAN's residual block, optionally with resampling by 2.

    Attributes:
      features: channels of the output.
      dtype: of the computation.
      dropout_rate: share of dropped units.
      resampling: function that resamples h and x; None: sides stay.
    """

    features: int
    dtype: str
    dropout_rate: float
    resampling: Callable[[Array], Array] | None = None

    def _norm(self, h: Array, style: Array | None, name: str) -> Array:
        if style is None:
            return GroupNorm(self.dtype, name=name)(h)
        return AdaptiveGroupNorm(self.dtype, name=name)(h, style)

    @nn.compact
    def __call__(
        self,
        x: Image,
        time: Float[Array, "batch time"],
        style: Float[Array, "batch style"] | None,
        kept: Bool[Array, "batch height2 width2 features"] | None,
    ) -> Float[Array, "batch height2 width2 features"]:
        h = nn.silu(self._norm(x, style, "norm_0"))
        if self.resampling is not None:
            h, x = self.resampling(h), self.resampling(x)
        h = conv(self.features, 3, dtype=self.dtype, name="conv_0")(h)
        shift = dense(self.features, dtype=self.dtype, name="time")(time)
        h = nn.silu(self._norm(h + shift[:, None, None, :], style, "norm_1"))
        h = dropout(h, self.dropout_rate, kept)
        h = conv(self.features, 3, scale=0.0, dtype=self.dtype, name="conv_1")(h)
        if self.resampling is not None or x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        return (x + h) * _SQRT_HALF


class Attention(nn.Module):
    """Single-head self-attention over all positions; `dtype`: of the computation."""

    dtype: str

    @nn.compact
    def __call__(self, x: Image) -> Image:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        query, key, value = (
            dense(channels, 0.1, self.dtype, name=name)(h)[:, :, None, :]
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value)[:, :, 0, :]
        h = dense(channels, 0.0, self.dtype, name="out")(h)
        return (x + h.reshape(x.shape)) * _SQRT_HALF


def to_patches(x: Image, size: int) -> Float[Array, "batch rows columns features"]:
    """Return x with each square of size² pixels as the channels of one position."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def from_patches(x: Float[Array, "batch rows columns features"], size: int) -> Image:
    """Return the inverse of `to_patches`."""
    batch, rows, columns, features = x.shape
    x = x.reshape(batch, rows, columns, size, size, features // size**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * size, columns * size, features // size**2)


class UNet(nn.Module):
    """The trunk: maps an image, its time and, in the generator, a style to an image.

    Layer names: `down_{level}_block_{i}`, `down_{level}_attention_{i}`,
    `down_{level}_resample`, `down_{level}_pyramid`; `middle_…`; `up_…` likewise.

    Attributes:
      patch_size: pixels on a side that the first level takes as one position, p; the
        p² pixels are its channels (Luhman & Luhman 2022, arXiv 2207.04316).
      nf: base width.
      ch_mult: width of each level in units of nf; every level but the last ends with
        halved sides.
      num_res_blocks: residual blocks per level of the down path; the up path has one
        more.
      attn_resolutions: sides, in positions, at which attention follows a block.
      dropout_rate: share of dropped units.
      fir: True: resample with the filter (1, 3, 3, 1); False: by repeats and means.
      progressive_input: `residual`: add a pyramid of the input at every level; `none`.
      dtype: of the computation; parameters, norms, softmax and the last convolution
        are float32.
      remat: `blocks`: recompute residual blocks and attention in the backward pass;
        `none`.
    """

    patch_size: int
    nf: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    dropout_rate: float
    fir: bool
    progressive_input: str
    dtype: str
    remat: str

    def _block_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Return the shapes, without the batch, of the blocks' outputs in order."""
        last = len(self.ch_mult) - 1
        sides = [(height >> level, width >> level) for level in range(last + 1)]
        widths = [self.nf * multiple for multiple in self.ch_mult]
        shapes = []
        for level, features in enumerate(widths):
            shapes += [(*sides[level], features)] * self.num_res_blocks
            if level < last:
                shapes.append((*sides[level + 1], features))
        shapes += [(*sides[last], widths[last])] * 2
        for level in range(last, -1, -1):
            shapes += [(*sides[level], widths[level])] * (self.num_res_blocks + 1)
            if level > 0:
                shapes.append((*sides[level - 1], widths[level]))
        return shapes

    @nn.compact
    def __call__(
        self,
        x: Image,
        t: Int[Array, " batch"],
        style: Float[Array, "batch style"] | None = None,
        keys: Array | None = None,
    ) -> Image:
        block_type, attention_type = ResidualBlock, Attention
        if self.remat == "blocks":
            block_type, attention_type = nn.remat(ResidualBlock), nn.remat(Attention)
        down = resample.fir_down if self.fir else resample.mean_down
        up = resample.fir_up if self.fir else resample.repeat_up
        last = len(self.ch_mult) - 1
        widths = [self.nf * multiple for multiple in self.ch_mult]
        x = to_patches(x, self.patch_size)
        masks = itertools.repeat(None)
        if keys is not None and self.dropout_rate > 0:
            shapes = self._block_shapes(*x.shape[1:3])
            masks = iter(dropout_masks(keys, self.dropout_rate, shapes))

        time = sinusoidal_embedding(t, self.nf)
        time = dense(4 * self.nf, dtype=self.dtype, name="time_0")(time)
        time = dense(4 * self.nf, dtype=self.dtype, name="time_1")(nn.silu(time))
        time = nn.silu(time)

        def block(h: Array, features: int, name: str, resampling=None) -> Array:
            return block_type(
                features, self.dtype, self.dropout_rate, resampling, name=name
            )(h, time, style, next(masks))

        def attention(h: Array, name: str) -> Array:
            return attention_type(self.dtype, name=name)(h)

        def half_pyramid(pyramid: Array, features: int, name: str) -> Array:
            halve = conv(features, 3, dtype=self.dtype, strides=2, padding=0, name=name)
            return halve(resample.fir_filter(pyramid))

        channels = x.shape[-1]
        pyramid = x.astype(self.dtype)
        h = conv(self.nf, 3, dtype=self.dtype, name="conv_in")(pyramid)
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = block(h, width, f"down_{level}_block_{i}")
                if h.shape[1] in self.attn_resolutions:
                    h = attention(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < last:
                h = block(h, width, f"down_{level}_resample", down)
                if self.progressive_input == "residual":
                    pyramid = half_pyramid(pyramid, width, f"down_{level}_pyramid")
                    h = pyramid = (pyramid + h) * _SQRT_HALF
                skips.append(h)

        h = block(h, widths[-1], "middle_block_0")
        h = attention(h, "middle_attention")
        h = block(h, widths[-1], "middle_block_1")

        for level in range(last, -1, -1):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, widths[level], f"up_{level}_block_{i}")
            if h.shape[1] in self.attn_resolutions:
                h = attention(h, f"up_{level}_attention")
            if level > 0:
                h = block(h, widths[level], f"up_{level}_resample", up)

        # In float32: the energy is a difference of nearly equal numbers.
        h = nn.silu(GroupNorm("float32", name="norm_out")(h))
        h = conv(channels, 3, scale=0.0, name="conv_out")(h)
        return from_patches(h, self.patch_size)


class Energy(nn.Module):
    """f(x, t) = −½ Σ (x − U(x, t))², in float32; larger means more likely.

    Attributes:
      trunk: keyword arguments of `UNet`.
    """

    trunk: Any

    @nn.compact
    def __call__(
        self, x: Image, t: Int[Array, " batch"], keys: Array | None = None
    ) -> Float[Array, " batch"]:
        h = UNet(**self.trunk, name="trunk")(x, t, keys=keys)
        residual = x.astype(jnp.float32) - h
        return -0.5 * (residual**2).sum(axis=(1, 2, 3))


class Generator(nn.Module):
    """G(x_{t+1}, t, z) → x̂_0 in (−1, 1).

    Attributes:
      z_emb_dim: width of the latent's embedding.
      n_mlp: number of its layers after the first.
      trunk: keyword arguments of `UNet`.
    """

    z_emb_dim: int
    n_mlp: int
    trunk: Any

    @nn.compact
    def __call__(
        self,
        x_next: Image,
        t: Int[Array, " batch"],
        z: Float[Array, "batch nz"],
        keys: Array | None = None,
    ) -> Image:
        dtype = self.trunk["dtype"]
        style = z * jax.lax.rsqrt((z**2).mean(axis=1, keepdims=True) + 1e-8)
        for i in range(self.n_mlp + 1):
            layer = dense(self.z_emb_dim, dtype=dtype, name=f"latent_{i}")
            style = nn.silu(layer(style))
        h = UNet(**self.trunk, name="trunk")(x_next, t, style, keys)
        return jnp.tanh(h)
