"""The energy, the generator and the posterior as PyTorch modules, channels first.

The same layers, sizes and initial weights as in `ddaebm_jax.models`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SQRT_HALF = 0.5**0.5


class TimeEmbedding(nn.Module):
    """[sin(t·w), cos(t·w)], w_i = exp(−i·ln(10000)/(dim/2−1))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        rates = torch.exp(-torch.arange(half) * math.log(10000.0) / (half - 1))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.rates
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class Trunk(nn.Module):
    """A multilayer perceptron of a point and its time."""

    def __init__(self, inputs: int, outputs: int, mlp: Any, norm: bool) -> None:
        super().__init__()

        def layers(inputs: int, widths: Sequence[int], out: int, norm: bool):
            found = []
            for width in widths:
                found.append(nn.Linear(inputs, width))
                if norm:
                    found.append(nn.BatchNorm1d(width))
                found.append(nn.PReLU())
                inputs = width
            return nn.Sequential(*found, nn.Linear(inputs, out))

        *x_widths, x_out = mlp.x_widths
        *t_widths, t_out = mlp.t_widths
        self.x = layers(inputs, x_widths, x_out, norm)
        self.embed = TimeEmbedding(mlp.t_embed_dim)
        self.t = layers(mlp.t_embed_dim, t_widths, t_out, False)
        self.hidden = layers(x_out + t_out, mlp.hidden, outputs, norm)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.hidden(torch.cat([self.x(x), self.t(self.embed(t))], dim=1))


class PointEnergy(nn.Module):
    """f(x, t) of points, without normalisation."""

    def __init__(self, dim: int, mlp: Any) -> None:
        super().__init__()
        self.trunk = Trunk(dim, 1, mlp, norm=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.trunk(x, t)[:, 0]


class PointGenerator(nn.Module):
    """G(x_{t+1}, t, z) → x̂_0 of points."""

    def __init__(self, dim: int, nz: int, mlp: Any) -> None:
        super().__init__()
        self.trunk = Trunk(dim + nz, dim, mlp, norm=mlp.norm == "batch")

    def forward(self, x_next: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.trunk(torch.cat([x_next, z], dim=1), t)


class PointPosterior(nn.Module):
    """q(z | x_t, x_{t+1}, t) of points → (μ, log σ²)."""

    def __init__(self, dim: int, nz: int, mlp: Any) -> None:
        super().__init__()
        features = mlp.posterior_features
        self.trunk = Trunk(2 * dim, features, mlp, norm=mlp.norm == "batch")
        self.mu = nn.Linear(features, nz)
        self.logvar = nn.Linear(features, nz)

    def forward(self, x_t: Tensor, x_next: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(torch.cat([x_t, x_next], dim=1), t)
        return self.mu(h), self.logvar(h)


def scaled(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Gives a layer vs(scale) weights and a bias of 0; returns it."""
    nn.init.xavier_uniform_(layer.weight, gain=max(scale, 1e-10) ** 0.5)
    nn.init.zeros_(layer.bias)
    return layer


def dense(inputs: int, outputs: int) -> nn.Module:
    """Returns a linear layer with vs(1) weights."""
    return scaled(nn.Linear(inputs, outputs))


def conv(inputs: int, outputs: int, kernel: int, scale: float = 1.0) -> nn.Module:
    """Returns a convolution that keeps the sides, with vs(scale) weights."""
    return scaled(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), scale)


class Fir(nn.Module):
    """Filters each channel by outer([1, 3, 3, 1])/64.

    As one depthwise convolution, which on a CPU was mostly faster than sums of shifted
    slices, XLA's best form, and products with resampling matrices.
    """

    def __init__(self, channels: int, resampling: str) -> None:
        """`resampling`: `down` halves the sides, `up` doubles them, `none` adds one."""
        super().__init__()
        taps = torch.tensor([0.125, 0.375, 0.375, 0.125])
        gain = 4.0 if resampling == "up" else 1.0
        kernel = (gain * torch.outer(taps, taps)).repeat(channels, 1, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)
        self.resampling = resampling

    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[1]
        if self.resampling == "down":
            return F.conv2d(x, self.kernel, stride=2, padding=1, groups=groups)
        if self.resampling == "up":
            return F.conv_transpose2d(
                x, self.kernel, stride=2, padding=1, groups=groups
            )
        return F.conv2d(x, self.kernel, padding=2, groups=groups)


class GroupNorm(nn.Module):
    """Group norm; its scale and shift are learned, or affine in a style."""

    def __init__(self, channels: int, style_dim: int | None = None) -> None:
        super().__init__()
        learned = style_dim is None
        groups = min(channels // 4, 32)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6, affine=learned)
        self.style = None if learned else dense(style_dim, 2 * channels)
        if not learned:
            nn.init.ones_(self.style.bias[:channels])

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        if self.style is None:
            return h
        scale, shift = self.style(style)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, scale, h)


class ResidualBlock(nn.Module):
    """BigGAN's residual block, optionally with resampling by 2."""

    def __init__(
        self,
        inputs: int,
        features: int,
        time_dim: int,
        style_dim: int | None,
        dropout: float,
        resampling: str | None = None,
    ) -> None:
        super().__init__()
        self.norm_0 = GroupNorm(inputs, style_dim)
        self.conv_0 = conv(inputs, features, 3)
        self.time = dense(time_dim, features)
        self.norm_1 = GroupNorm(features, style_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv_1 = conv(features, features, 3, scale=0.0)
        self.fir = None if resampling is None else Fir(inputs, resampling)
        self.skip = nn.Identity()
        if resampling is not None or inputs != features:
            self.skip = conv(inputs, features, 1)

    def forward(self, x: Tensor, time: Tensor, style: Tensor | None) -> Tensor:
        h = F.silu(self.norm_0(x, style))
        if self.fir is not None:
            h, x = self.fir(h), self.fir(x)
        h = self.conv_0(h) + self.time(time)[:, :, None, None]
        h = self.dropout(F.silu(self.norm_1(h, style)))
        return (self.skip(x) + self.conv_1(h)) * _SQRT_HALF


class Attention(nn.Module):
    """Single-head self-attention over all positions.

    Products and a softmax: the fused kernels have no second derivative, which the
    gradient penalty needs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.query = conv(channels, channels, 1, scale=0.1)
        self.key = conv(channels, channels, 1, scale=0.1)
        self.value = conv(channels, channels, 1, scale=0.1)
        self.out = conv(channels, channels, 1, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            layer(h).flatten(2) for layer in (self.query, self.key, self.value)
        )
        logits = query.transpose(1, 2) @ key * x.shape[1] ** -0.5
        h = value @ logits.softmax(dim=2).transpose(1, 2)
        return (x + self.out(h.reshape(x.shape))) * _SQRT_HALF


class Level(nn.Module):
    """What a U-Net does at one size of the image, on its way down or up."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        resample: nn.Module | None,
        pyramid: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample
        self.pyramid = pyramid


class UNet(nn.Module):
    """The trunk: maps an image, its time and, in the generator, a style to an image."""

    def __init__(
        self, unet: Any, side: int, channels: int, style_dim: int | None = None
    ) -> None:
        super().__init__()
        nf, last = unet.nf, len(unet.ch_mult) - 1
        widths = [nf * multiple for multiple in unet.ch_mult]
        sides = [side // 2**level for level in range(last + 1)]

        def block(inputs, features, resampling=None):
            rest = 4 * nf, style_dim, unet.dropout, resampling
            return ResidualBlock(inputs, features, *rest)

        self.time = nn.Sequential(
            TimeEmbedding(nf), dense(nf, 4 * nf), nn.SiLU(), dense(4 * nf, 4 * nf)
        )
        self.conv_in = conv(channels, nf, 3)
        skips, inputs, pyramid = [nf], nf, channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(unet.num_res_blocks):
                blocks.append(block(inputs, width))
                inputs = width
                skips.append(width)
            attends = sides[level] in unet.attn_resolutions
            attentions = [Attention(width) for _ in blocks] if attends else []
            if level == last:
                self.down.append(Level(blocks, attentions, None))
                continue
            halve = nn.Sequential(
                Fir(pyramid, "none"), scaled(nn.Conv2d(pyramid, width, 3, stride=2))
            )
            half = block(width, width, "down")
            self.down.append(Level(blocks, attentions, half, halve))
            pyramid = width
            skips.append(width)

        self.middle_0 = block(inputs, inputs)
        self.middle_attention = Attention(inputs)
        self.middle_1 = block(inputs, inputs)

        for level in range(last, -1, -1):
            blocks, width = [], widths[level]
            for _ in range(unet.num_res_blocks + 1):
                blocks.append(block(inputs + skips.pop(), width))
                inputs = width
            attends = sides[level] in unet.attn_resolutions
            attentions = [Attention(width)] if attends else []
            double = block(width, width, "up") if level > 0 else None
            self.up.append(Level(blocks, attentions, double))
        self.norm_out = GroupNorm(inputs)
        self.conv_out = conv(inputs, channels, 3, scale=0.0)

    def forward(self, x: Tensor, t: Tensor, style: Tensor | None = None) -> Tensor:
        time = F.silu(self.time(t))
        pyramid, h = x, self.conv_in(x)
        skips = [h]
        for level in self.down:
            for i, block in enumerate(level.blocks):
                h = block(h, time, style)
                if level.attentions:
                    h = level.attentions[i](h)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, time, style)
                h = pyramid = (level.pyramid(pyramid) + h) * _SQRT_HALF
                skips.append(h)

        h = self.middle_attention(self.middle_0(h, time, style))
        h = self.middle_1(h, time, style)

        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time, style)
            for attention in level.attentions:
                h = attention(h)
            if level.resample is not None:
                h = level.resample(h, time, style)

        # In float32: the energy is a difference of nearly equal numbers.
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_out(F.silu(self.norm_out(h.float())))


class ImageEnergy(nn.Module):
    """f(x, t) = −½ Σ (x − U(x, t))²."""

    def __init__(self, unet: Any, side: int, channels: int) -> None:
        super().__init__()
        self.trunk = UNet(unet, side, channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -0.5 * (x - self.trunk(x, t)).square().sum(dim=(1, 2, 3))


class ImageGenerator(nn.Module):
    """G(x_{t+1}, t, z) → x̂_0 in (−1, 1)."""

    def __init__(self, unet: Any, side: int, channels: int, nz: int) -> None:
        super().__init__()
        layers, inputs = [], nz
        for _ in range(unet.n_mlp + 1):
            layers += [dense(inputs, unet.z_emb_dim), nn.SiLU()]
            inputs = unet.z_emb_dim
        self.latent = nn.Sequential(*layers)
        self.trunk = UNet(unet, side, channels, unet.z_emb_dim)

    def forward(self, x_next: Tensor, t: Tensor, z: Tensor) -> Tensor:
        z = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        return torch.tanh(self.trunk(x_next, t, self.latent(z)))


class ImagePosterior(nn.Module):
    """q(z | x_t, x_{t+1}, t) of images with sides of 8 to 64 → (μ, log σ²)."""

    def __init__(self, encoder: Any, side: int, channels: int, nz: int) -> None:
        super().__init__()
        dim, inputs = encoder.t_emb_dim, 2 * channels
        self.time = nn.Sequential(
            TimeEmbedding(dim),
            dense(dim, dim),
            nn.LeakyReLU(0.2),
            dense(dim, dim),
            nn.LeakyReLU(0.2),
        )
        self.convs, self.shifts = nn.ModuleList(), nn.ModuleList()
        for i in range(side.bit_length() - 2):
            width = encoder.ngf * 2**i
            kernel, stride = (3, 1) if i == 0 else (4, 2)
            layer = nn.Conv2d(inputs, width, kernel, stride, padding=1, bias=False)
            self.convs.append(layer)
            self.shifts.append(dense(dim, width))
            inputs = width
        self.mu, self.logvar = nn.Conv2d(inputs, nz, 4), nn.Conv2d(inputs, nz, 4)

    def forward(self, x_t: Tensor, x_next: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = self.time(t)
        h = torch.cat([x_t, x_next], dim=1)
        for layer, shift in zip(self.convs, self.shifts, strict=True):
            h = F.leaky_relu(layer(h), 0.2) + shift(time)[:, :, None, None]
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            return self.mu(h).flatten(1), self.logvar(h).flatten(1)


def build(model: Any, event_shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """Returns the networks that a config's `model` section describes, by player.

    Args:
      model: the section.
      event_shape: of one example in JAX's layout, [dim] or [side, side, channels].
    """
    if model.name == "mlp":
        (dim,) = event_shape
        return {
            "energy": PointEnergy(dim, model.mlp),
            "generator": PointGenerator(dim, model.nz, model.mlp),
            "posterior": PointPosterior(dim, model.nz, model.mlp),
        }
    side, _, channels = event_shape
    return {
        "energy": ImageEnergy(model.unet, side, channels),
        "generator": ImageGenerator(model.unet, side, channels, model.nz),
        "posterior": ImagePosterior(model.encoder, side, channels, model.nz),
    }
