"""The image model's posteriors q_ψ(z | x_t, x_{t+1}, t), for small and large images.

The released encoders of Geng et al. 2024; that of large images is built like DDGAN's
discriminator (Xiao et al. 2022).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddaebm_jax.config.choices import STDDEV_GROUP
from ddaebm_jax.models import resample
from ddaebm_jax.models.layers import (
    conv,
    dense,
    sinusoidal_embedding,
    uniform_fan_in,
    uniform_within,
)

_SQRT_HALF = 0.5**0.5


def activation(x: Array) -> Array:
    """LeakyReLU with slope 0.2."""
    return nn.leaky_relu(x, 0.2)


class TimeEmbedding(nn.Module):
    """Sinusoids → Dense → LeakyReLU → Dense → LeakyReLU.

    Attributes:
      dim: width of the embedding.
      dtype: of the computation.
    """

    dim: int
    dtype: str

    @nn.compact
    def __call__(self, t: Int[Array, " batch"]) -> Float[Array, "batch dim"]:
        h = sinusoidal_embedding(t, self.dim)
        h = activation(dense(self.dim, dtype=self.dtype, name="dense_0")(h))
        return activation(dense(self.dim, dtype=self.dtype, name="dense_1")(h))


class ConvEncoder(nn.Module):
    """Posterior for sides of 8 to 64, powers of two.

    One 3×3 convolution and log2(side) − 2 of 4×4 with stride 2, which double the width,
    as h = act(conv(h)) + Dense(time); two 4×4 heads.

    Attributes:
      nz: width of the latent.
      ngf: width after the first convolution.
      t_emb_dim: width of the time embedding.
      dtype: of the computation; μ and log σ² are float32.
    """

    nz: int
    ngf: int
    t_emb_dim: int
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "batch side side channels"],
        x_next: Float[Array, "batch side side channels"],
        t: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch nz"], Float[Array, "batch nz"]]:
        time = TimeEmbedding(self.t_emb_dim, self.dtype, name="time")(t)
        h = jnp.concatenate([x_t, x_next], axis=-1).astype(self.dtype)
        depth = x_t.shape[1].bit_length() - 3
        for i in range(depth + 1):
            width = self.ngf * 2**i
            kernel, stride = (3, 1) if i == 0 else (4, 2)
            h = nn.Conv(
                width,
                (kernel, kernel),
                strides=stride,
                padding=((1, 1), (1, 1)),
                use_bias=False,
                kernel_init=uniform_fan_in,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(h)
            shift = dense(width, dtype=self.dtype, name=f"time_{i}")(time)
            h = activation(h) + shift[:, None, None, :]

        bias_init = uniform_within((h.shape[1] * h.shape[2] * h.shape[3]) ** -0.5)

        def head(name: str) -> Array:
            out = nn.Conv(
                self.nz,
                (4, 4),
                padding="VALID",
                kernel_init=uniform_fan_in,
                bias_init=bias_init,
                name=name,
            )(h.astype(jnp.float32))
            return out[:, 0, 0, :]

        return head("mu"), head("logvar")


class DownBlock(nn.Module):
    """Residual block that halves the sides with the FIR filter.

    Attributes:
      features: channels of the output.
      dtype: of the computation.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        time: Float[Array, "batch time"],
    ) -> Float[Array, "batch height2 width2 features"]:
        h = conv(self.features, 3, dtype=self.dtype, name="conv_0")(activation(x))
        shift = dense(self.features, dtype=self.dtype, name="time")(time)
        h = resample.fir_down(activation(h + shift[:, None, None, :]))
        h = conv(self.features, 3, scale=0.0, dtype=self.dtype, name="conv_1")(h)
        x = conv(self.features, 1, dtype=self.dtype, use_bias=False, name="skip")(
            resample.fir_down(x)
        )
        return (x + h) * _SQRT_HALF


def minibatch_stddev(
    h: Float[Array, "batch height width channels"], axis_name: str | None = None
) -> Float[Array, "batch height width channels1"]:
    """Append a channel with the mean standard deviation within a group of examples.

    A group is 4 consecutive examples, or the largest divisor of the batch below 4.
    Karras et al. 2018 (arXiv 1710.10196).

    Args:
      h: features of a batch, or of this device's shard.
      axis_name: mapped axis over which the batch is split; shards are gathered where
        groups span devices. None: h is the whole batch.
    """
    if axis_name is not None and h.shape[0] % STDDEV_GROUP:
        size = h.shape[0]
        whole = minibatch_stddev(jax.lax.all_gather(h, axis_name, tiled=True))
        start = jax.lax.axis_index(axis_name) * size
        return jax.lax.dynamic_slice_in_dim(whole, start, size)
    batch, height, width, channels = h.shape
    group = next(g for g in range(STDDEV_GROUP, 0, -1) if batch % g == 0)
    grouped = h.astype(jnp.float32).reshape(-1, group, height, width, channels)
    stddev = jnp.sqrt(grouped.var(axis=1) + 1e-8).mean(axis=(1, 2, 3))
    channel = jnp.repeat(stddev, group)[:, None, None, None]
    channel = jnp.broadcast_to(channel, (batch, height, width, 1)).astype(h.dtype)
    return jnp.concatenate([h, channel], axis=-1)


class ResidualEncoder(nn.Module):
    """Posterior for sides of 128 and more: six down blocks and a sum over space.

    Attributes:
      nz: width of the latent.
      ngf: a quarter of the width after the first block.
      t_emb_dim: width of the time embedding.
      dtype: of the computation; μ and log σ² are float32.
      axis_name: see `minibatch_stddev`.
    """

    nz: int
    ngf: int
    t_emb_dim: int
    dtype: str
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "batch side side channels"],
        x_next: Float[Array, "batch side side channels"],
        t: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch nz"], Float[Array, "batch nz"]]:
        time = TimeEmbedding(self.t_emb_dim, self.dtype, name="time")(t)
        h = jnp.concatenate([x_t, x_next], axis=-1).astype(self.dtype)
        h = conv(2 * self.ngf, 1, dtype=self.dtype, name="conv_in")(h)
        for i, multiple in enumerate((4, 8, 8, 8, 8, 8)):
            h = DownBlock(multiple * self.ngf, self.dtype, name=f"block_{i}")(h, time)
        h = minibatch_stddev(h, self.axis_name)
        h = activation(conv(8 * self.ngf, 3, dtype=self.dtype, name="conv_out")(h))
        h = h.astype(jnp.float32).sum(axis=(1, 2))
        mu = dense(self.nz, name="mu")(h)
        return mu, -nn.softplus(dense(self.nz, name="logvar")(h))
