"""The NCSN++ U-Net of the image model's energy and generator.

One trunk serves both. The generator's residual blocks are normalised adaptively by the
latent z; the energy is f = −½‖x − U(x, t)‖². Song et al. 2021 (arXiv 2011.13456,
appendix H) for the trunk, Geng et al. 2024 for the two heads.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddaebm_jax.config.choices import MAX_GROUPS
from ddaebm_jax.models import resample
from ddaebm_jax.models.layers import conv, dense, dropout, sinusoidal_embedding

_SQRT_HALF = 0.5**0.5

Image = Float[Array, "batch height width channels"]


def num_groups(channels: int) -> int:
    """Returns the number of groups of a group norm: min(C/4, 32)."""
    return min(channels // 4, MAX_GROUPS)


def group_norm(
    x: Float[Array, "batch height width channels"],
    scale: Float[Array, "#batch channels"],
    shift: Float[Array, "#batch channels"],
    dtype: str,
) -> Float[Array, "batch height width channels"]:
    """Returns the group norm of x with ε = 1e-6, its statistics in float32.

    Sums over positions come first, one a channel, and groups are made of those: the
    large array is read along its own layout, never reshaped into groups.
    """
    batch, height, width, channels = x.shape
    groups = num_groups(channels)
    size = height * width * (channels // groups)

    def over_group(values: Array) -> Array:
        sums = values.sum(axis=(1, 2)).reshape(batch, groups, channels // groups)
        return jnp.repeat(sums.sum(axis=2) / size, channels // groups, axis=1)

    h = x.astype(jnp.float32)
    mean, square = over_group(h), over_group(h * h)
    variance = jnp.maximum(square - mean * mean, 0.0)
    scale = scale * jax.lax.rsqrt(variance + 1e-6)
    h = (h - mean[:, None, None, :]) * scale[:, None, None, :]
    return (h + shift[:, None, None, :]).astype(dtype)


class GroupNorm(nn.Module):
    """Group norm with a learned scale and shift of each channel.

    Attributes:
      dtype: of the result.
    """

    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return group_norm(x, scale[None, :], bias[None, :], self.dtype)


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale γ and shift b are an affine function of a style.

    Attributes:
      dtype: of the result.
    """

    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        style: Float[Array, "batch style"],
    ) -> Float[Array, "batch height width channels"]:
        channels = x.shape[-1]

        def starts_at_identity(key: Array, shape: Sequence[int], dtype) -> Array:
            del key
            return jnp.concatenate(
                [jnp.ones(shape[0] // 2, dtype), jnp.zeros(shape[0] // 2, dtype)]
            )

        affine = dense(2 * channels, bias_init=starts_at_identity, name="style")(
            style.astype(jnp.float32)
        )
        scale, shift = jnp.split(affine, 2, axis=-1)
        return group_norm(x, scale, shift, self.dtype)


class ResidualBlock(nn.Module):
    """BigGAN's residual block, which may resample by 2 on its way.

    Attributes:
      features: channels of the output.
      dtype: of the computation.
      rate: of the dropout.
      place: which block this is; tells dropout masks apart.
      resampling: what takes h and x to another size; None: nothing.
    """

    features: int
    dtype: str
    rate: float
    place: int
    resampling: Any = None

    def _norm(self, h: Array, style: Array | None, name: str) -> Array:
        if style is None:
            return GroupNorm(self.dtype, name=name)(h)
        return AdaptiveGroupNorm(self.dtype, name=name)(h, style)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        time: Float[Array, "batch time"],
        style: Float[Array, "batch style"] | None,
        keys: Array | None,
    ) -> Float[Array, "batch height2 width2 features"]:
        h = nn.silu(self._norm(x, style, "norm_0"))
        if self.resampling is not None:
            h, x = self.resampling(h), self.resampling(x)
        h = conv(self.features, 3, dtype=self.dtype, name="conv_0")(h)
        shift = dense(self.features, dtype=self.dtype, name="time")(time)
        h = nn.silu(self._norm(h + shift[:, None, None, :], style, "norm_1"))
        h = dropout(h, self.rate, keys, self.place)
        h = conv(self.features, 3, scale=0.0, dtype=self.dtype, name="conv_1")(h)
        if self.resampling is not None or x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        return (x + h) * _SQRT_HALF


class Attention(nn.Module):
    """Single-head self-attention over all positions of an image.

    Attributes:
      dtype: of the computation; the softmax is in float32.
    """

    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
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


class UNet(nn.Module):
    """The trunk: an image, its time and, for the generator, a style → an image.

    Layers are named by path: `down_{level}_block_{i}`, `down_{level}_attention_{i}`,
    `down_{level}_resample`, `down_{level}_pyramid`; `middle_…`; `up_…` likewise.

    Attributes:
      nf: base width.
      ch_mult: width of each level, in units of nf; each level but the last halves.
      num_res_blocks: residual blocks a level on the way down (one more on the way up).
      attn_resolutions: sides of the images after which attention follows.
      rate: of the dropout.
      fir: resample with the filter (1, 3, 3, 1), else by repeats and means.
      progressive_input: `residual`: a pyramid of the input is summed in at every
        level; `none`.
      dtype: of the computation; parameters, norms, softmax and the last convolution
        are float32.
      remat: `blocks`: residual blocks and attention are computed again in the
        backward pass instead of kept; `none`.
    """

    nf: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    rate: float
    fir: bool
    progressive_input: str
    dtype: str
    remat: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Int[Array, " batch"],
        style: Float[Array, "batch style"] | None = None,
        keys: Array | None = None,
    ) -> Float[Array, "batch height width channels"]:
        block_type, attention_type = ResidualBlock, Attention
        if self.remat == "blocks":
            block_type, attention_type = nn.remat(ResidualBlock), nn.remat(Attention)
        down = resample.fir_down if self.fir else resample.mean_down
        up = resample.fir_up if self.fir else resample.repeat_up
        last = len(self.ch_mult) - 1
        widths = [self.nf * multiple for multiple in self.ch_mult]
        places = iter(range(10**6))

        time = sinusoidal_embedding(t, self.nf)
        time = dense(4 * self.nf, dtype=self.dtype, name="time_0")(time)
        time = dense(4 * self.nf, dtype=self.dtype, name="time_1")(nn.silu(time))
        time = nn.silu(time)

        def block(h: Array, features: int, name: str, resampling=None) -> Array:
            return block_type(
                features,
                self.dtype,
                self.rate,
                next(places),
                resampling,
                name=name,
            )(h, time, style, keys)

        def attention(h: Array, name: str) -> Array:
            return attention_type(self.dtype, name=name)(h)

        channels = x.shape[-1]
        x = x.astype(self.dtype)
        pyramid = x
        h = conv(self.nf, 3, dtype=self.dtype, name="conv_in")(x)
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
                    pyramid = conv(
                        width,
                        3,
                        strides=2,
                        padding="VALID",
                        dtype=self.dtype,
                        name=f"down_{level}_pyramid",
                    )(resample.fir_filter(pyramid))
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

        # In float32: the energy is a difference of what is nearly equal.
        h = nn.silu(GroupNorm("float32", name="norm_out")(h))
        return conv(channels, 3, scale=0.0, name="conv_out")(h)


class Energy(nn.Module):
    """f(x, t) = −½ Σ (x − U(x, t))², summed in float32; larger is more likely.

    Attributes:
      trunk: keyword arguments of `UNet`.
    """

    trunk: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Int[Array, " batch"],
        keys: Array | None = None,
    ) -> Float[Array, " batch"]:
        h = UNet(**self.trunk, name="trunk")(x, t, keys=keys)
        residual = x.astype(jnp.float32) - h
        return -0.5 * (residual**2).sum(axis=(1, 2, 3))


class Generator(nn.Module):
    """G(x_{t+1}, t, z) → x̂_0 in (−1, 1).

    Attributes:
      z_emb_dim: width of the latent's embedding.
      n_mlp: layers of that embedding after the first.
      trunk: keyword arguments of `UNet`.
    """

    z_emb_dim: int
    n_mlp: int
    trunk: Any

    @nn.compact
    def __call__(
        self,
        x_next: Float[Array, "batch height width channels"],
        t: Int[Array, " batch"],
        z: Float[Array, "batch nz"],
        keys: Array | None = None,
    ) -> Float[Array, "batch height width channels"]:
        dtype = self.trunk["dtype"]
        style = z * jax.lax.rsqrt((z**2).mean(axis=1, keepdims=True) + 1e-8)
        for i in range(self.n_mlp + 1):
            style = nn.silu(
                dense(self.z_emb_dim, dtype=dtype, name=f"latent_{i}")(style)
            )
        h = UNet(**self.trunk, name="trunk")(x_next, t, style, keys)
        return jnp.tanh(h)
