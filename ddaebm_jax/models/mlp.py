"""Multilayer perceptrons for points in the plane and rows of tables.

The three networks share one `Trunk`: point and time are encoded separately, then
concatenated and passed through hidden layers. Widths and the data's dimension are free.
The released 2-D networks of Geng et al. 2024.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddaebm_jax.models import layers


class UniformDense(nn.Module):
    """Dense layer with kernel and bias initially uniform in ±1/√fan_in.

    Attributes:
      features: width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch out"]:
        init = layers.uniform_within(x.shape[-1] ** -0.5)
        dense = nn.Dense(self.features, kernel_init=init, bias_init=init, name="dense")
        return dense(x)


def activation(name: str) -> Callable[[Array], Array]:
    """Return a new activation; each `prelu` has one learned slope."""
    return layers.PReLU() if name == "prelu" else getattr(nn, name)


class Trunk(nn.Module):
    """Map a point and its time to `out` numbers.

    Attributes:
      out: width of the output.
      x_widths: widths of the point's encoder, the last without activation.
      t_embed_dim: width of the sinusoidal time embedding.
      t_widths: widths of the time's encoder, the last without activation.
      hidden: widths of the hidden layers after concatenation.
      act: name of the activation.
      norm: `batch`: batch norm after every hidden Dense of the point's encoder and
        of the hidden layers, before the activation; `none`.
      axis_name: see `layers.BatchNorm`.
    """

    out: int
    x_widths: Sequence[int]
    t_embed_dim: int
    t_widths: Sequence[int]
    hidden: Sequence[int]
    act: str
    norm: str
    axis_name: str | None = None

    def _hidden_layer(
        self, h: Float[Array, "batch inputs"], width: int, norm: bool, train: bool
    ) -> Float[Array, "batch width"]:
        h = UniformDense(width)(h)
        if norm:
            h = layers.BatchNorm(self.axis_name)(h, train=train)
        return activation(self.act)(h)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], t: Int[Array, " batch"], train: bool = False
    ) -> Float[Array, "batch out"]:
        batch_norm = self.norm == "batch"
        h = x
        for width in self.x_widths[:-1]:
            h = self._hidden_layer(h, width, batch_norm, train)
        h = UniformDense(self.x_widths[-1])(h)
        s = layers.sinusoidal_embedding(t, self.t_embed_dim)
        for width in self.t_widths[:-1]:
            s = self._hidden_layer(s, width, False, train)
        s = UniformDense(self.t_widths[-1])(s)
        h = jnp.concatenate([h, s], axis=1)
        for width in self.hidden:
            h = self._hidden_layer(h, width, batch_norm, train)
        return UniformDense(self.out)(h)


class Energy(nn.Module):
    """f(x, t), one number per example; larger means more likely.

    Attributes:
      trunk: keyword arguments of `Trunk`, without `out` and `norm`.
    """

    trunk: Mapping[str, Any]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], t: Int[Array, " batch"]
    ) -> Float[Array, " batch"]:
        return Trunk(out=1, norm="none", **self.trunk)(x, t)[:, 0]


class Generator(nn.Module):
    """G(x_{t+1}, t, z) → x̂_0.

    Attributes:
      dim: D, width of the data.
      trunk: keyword arguments of `Trunk`, without `out`.
    """

    dim: int
    trunk: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        x_next: Float[Array, "batch dim"],
        t: Int[Array, " batch"],
        z: Float[Array, "batch nz"],
        train: bool = False,
    ) -> Float[Array, "batch dim"]:
        inputs = jnp.concatenate([x_next, z], axis=1)
        return Trunk(out=self.dim, **self.trunk)(inputs, t, train)


class Posterior(nn.Module):
    """q(z | x_t, x_{t+1}, t) → (μ, log σ²), the variational encoder.

    Attributes:
      nz: width of the latent.
      features: width of the trunk's output, the input of two Dense heads.
      trunk: keyword arguments of `Trunk`, without `out`.
    """

    nz: int
    features: int
    trunk: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "batch dim"],
        x_next: Float[Array, "batch dim"],
        t: Int[Array, " batch"],
        train: bool = False,
    ) -> tuple[Float[Array, "batch nz"], Float[Array, "batch nz"]]:
        inputs = jnp.concatenate([x_t, x_next], axis=1)
        h = Trunk(out=self.features, **self.trunk)(inputs, t, train)
        mu = UniformDense(self.nz, name="mu")(h)
        logvar = UniformDense(self.nz, name="logvar")(h)
        return mu, logvar
