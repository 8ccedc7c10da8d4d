"""One training step of the game in PyTorch: algorithm 1 of Geng et al. 2024.

The energy's update first, then the generator's and the posterior's against the updated
energy, on the same draws; then the moving averages.
"""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Energy = Callable[[Tensor, Tensor], Tensor]

# What the step covers of a config; another value is refused.
_COVERED = {
    "data.whiten": (False,),
    "levels.move_at": ((),),
    "model.confinement": (0.0,),
    "model.reference": (0,),
    "model.remat": ("none",),
    "game.gamma_final": (None,),
    "game.lazy_reg": (1,),
    "game.energy_l2": (0.0,),
    "game.noise_at_data": (False,),
    "game.num_negatives": (1,),
    "game.recon": ("nll", "mse"),
    "game.latent": (True,),
    "game.posterior": (True,),
    "game.divergence": ("jeffreys",),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.max_grad_norm": (None,),
    "optimizer.accumulate": (1,),
}
_COVERED_POINTS = {
    "model.dtype": ("float32",),
    "model.mlp.activation": ("prelu",),
}
_COVERED_IMAGES = {
    "data.image_size": (8, 16, 32, 64),
    "model.unet.fir": (True,),
    "model.unet.progressive_input": ("residual",),
}
_POSITIVE = ("game.gamma", "game.lambda_z", "game.lambda_f")


def check(config: Any) -> None:
    """Checks that the step covers a config.

    Raises:
      ValueError: naming the field, if not.
    """
    own = _COVERED_POINTS if config.model.name == "mlp" else _COVERED_IMAGES
    for field, allowed in (_COVERED | own).items():
        value = attrgetter(field)(config)
        if value not in allowed:
            covered = ", ".join(map(repr, allowed))
            raise ValueError(f"{field} is {value!r}; the PyTorch step covers {covered}")
    for field in _POSITIVE:
        if (value := attrgetter(field)(config)) <= 0:
            raise ValueError(f"{field} is {value}; the PyTorch step needs it positive")


def energy_and_score(energy: Energy, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns f(x) and ∇_x f(x), which can be differentiated again."""
    x = x.detach().requires_grad_()
    f = energy(x, t)
    (score,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    return f, score


def traceable_energy_and_score(
    energy: Energy, x: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the same; as one program `torch.compile` can differentiate only this."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        f = energy(x, t)
        return f.sum(), f

    score, f = torch.func.grad(total, has_aux=True)(x)
    return f, score


class Trainer:
    """The networks, their optimisers and averages, and the step that changes them.

    Attributes:
      networks: by player.
    """

    def __init__(
        self,
        config: Any,
        networks: dict[str, nn.Module],
        schedule: dict[str, Tensor],
        compiled: bool,
    ) -> None:
        """Makes the optimisers and averages.

        Args:
          config: the recipe.
          networks: by player, on their device.
          schedule: `diffusion.Schedule`'s fields, on the same device.
          compiled: whether to compile the networks by `torch.compile`, and to keep
            images channels last.
        """
        self.game, self.nz = config.game, config.model.nz
        self.num_steps = config.diffusion.num_steps
        self.flip = config.data.flip
        self.schedule = schedule
        self.networks = networks
        floor = config.game.recon_floor
        log_var = schedule["posterior_log_var"]
        log_floor = log_var[1].item() if floor is None else math.log(floor)
        self.recon_log_var = log_var.clamp(min=log_floor)

        is_image = config.model.name == "ncsnpp"
        self.layout = torch.contiguous_format
        if compiled and is_image:
            self.layout = torch.channels_last
        for network in networks.values():
            network.to(memory_format=self.layout)
        energy, generator, posterior = (
            networks[player] for player in ("energy", "generator", "posterior")
        )
        self.parameters = [p for net in networks.values() for p in net.parameters()]
        self.decay = config.optimizer.ema_decay
        self.averages = [p.detach().clone() for p in self.parameters if self.decay]
        self.update_averages = get_ema_multi_avg_fn(self.decay)

        rate = config.optimizer.learning_rate
        energy_rate = config.optimizer.energy_learning_rate or rate
        players = [*generator.parameters(), *posterior.parameters()]
        betas = config.optimizer.beta1, config.optimizer.beta2
        self.optimizers = [
            torch.optim.Adam(params, lr, betas, fused=True)
            for params, lr in ((energy.parameters(), energy_rate), (players, rate))
        ]
        self.rates = []
        if config.optimizer.schedule == "cosine":
            final = config.optimizer.final_learning_rate
            self.rates = [
                torch.optim.lr_scheduler.CosineAnnealingLR(
                    optimizer, config.train.num_steps, final
                )
                for optimizer in self.optimizers
            ]
        device = schedule["beta"].device.type
        autocast = config.model.dtype == "bfloat16"

        def called(network: nn.Module) -> Callable[..., Any]:
            def call(*args):
                with torch.autocast(device, torch.bfloat16, enabled=autocast):
                    return network(*args)

            return call

        self.energy, self.generator, self.posterior = (
            called(network) for network in (energy, generator, posterior)
        )
        self.energy_and_score = energy_and_score
        if compiled:
            for network in networks.values():
                network.compile()
            self.energy_and_score = torch.compile(traceable_energy_and_score)

    def _at(self, name: str, k: Tensor, like: Tensor) -> Tensor:
        """Returns a field of the schedule at k, to scale `like` by example."""
        return self.schedule[name][k].reshape(-1, *(1,) * (like.ndim - 1))

    def _posterior_mean(self, x0: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
        c1, c2 = self._at("posterior_c1", t, x0), self._at("posterior_c2", t, x0)
        return c1 * x0 + c2 * x_next

    def _log_q(self, x_next: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a, beta = self._at("a", t + 1, x_t), self._at("beta", t + 1, x_t)
        squares = (x_next - a * x_t).square() / beta
        return -0.5 * (squares + (2 * math.pi * beta).log()).flatten(1).sum(dim=1)

    def _score_log_q(self, x_next: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a, beta = self._at("a", t + 1, x_t), self._at("beta", t + 1, x_t)
        return a * (x_next - a * x_t) / beta

    def _reconstruction(
        self, x_t: Tensor, x0: Tensor, x_next: Tensor, t: Tensor
    ) -> Tensor:
        squares = (x_t - self._posterior_mean(x0, x_next, t)).square()
        squares = squares.flatten(1)
        if self.game.recon == "mse":
            return squares.sum(dim=1)
        log_var = self.recon_log_var[t][:, None]
        nll = 0.5 * (squares * (-log_var).exp() + log_var + math.log(2 * math.pi))
        return nll.sum(dim=1)

    def _data(self, x0: Tensor) -> Tensor:
        """Returns points as they are; images, uint8, in [−1, 1] and flipped."""
        if x0.ndim == 2:
            return x0
        x0 = x0.float() / 127.5 - 1.0
        x0 = x0.contiguous(memory_format=self.layout)
        if not self.flip:
            return x0
        flipped = torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5
        return torch.where(flipped, x0.flip(3), x0)

    def _update(self, index: int, loss: Tensor) -> None:
        loss.backward()
        self.optimizers[index].step()
        self.optimizers[index].zero_grad(set_to_none=True)
        if self.rates:
            self.rates[index].step()

    def step(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one step; returns the two losses.

        Args:
          x0: points, [batch, dim], or images, uint8 [batch, channels, side, side].
        """
        x0 = self._data(x0)
        t = torch.randint(self.num_steps, (len(x0),), device=x0.device)
        x_t = self._at("a_cum", t, x0) * x0
        x_t = x_t + self._at("sigma_cum", t, x0) * torch.randn_like(x0)
        x_next = self._at("a", t + 1, x0) * x_t
        x_next = x_next + self._at("sigma", t + 1, x0) * torch.randn_like(x0)
        z = torch.randn(len(x0), self.nz, device=x0.device)
        x0_pred = self.generator(x_next, t, z)
        std = (0.5 * self._at("posterior_log_var", t, x0)).exp()
        std = torch.where(t.reshape(std.shape) > 0, std, 0.0)
        x_fake = self._posterior_mean(x0_pred, x_next, t) + std * torch.randn_like(x0)

        energy_loss = self._energy_loss(x_t, x_next, x_fake.detach(), t)
        self._update(0, energy_loss)

        self.networks["energy"].requires_grad_(False)
        generator_loss = self._generator_loss(x_t, x_next, x_fake, x0_pred, z, t)
        self._update(1, generator_loss)
        self.networks["energy"].requires_grad_(True)

        if self.averages:
            self.update_averages(self.averages, self.parameters, None)
        return energy_loss.detach(), generator_loss.detach()

    def _energy_loss(
        self, x_t: Tensor, x_next: Tensor, x_fake: Tensor, t: Tensor
    ) -> Tensor:
        f_fake = self.energy(x_fake, t)
        f_real, score = self.energy_and_score(self.energy, x_t, t)
        score = score + self._score_log_q(x_next, x_t, t)
        penalty = 0.5 * score.square().flatten(1).sum(dim=1)
        return (f_fake - f_real + self.game.gamma * penalty).mean()

    def _generator_loss(
        self,
        x_t: Tensor,
        x_next: Tensor,
        x_fake: Tensor,
        x0_pred: Tensor,
        z: Tensor,
        t: Tensor,
    ) -> Tensor:
        f_fake = self.energy(x_fake, t)
        fake_mu, fake_logvar = self.posterior(x_fake, x_next, t)
        mu, logvar = self.posterior(x_t, x_next, t)
        if self.game.recon_latent == "posterior":
            z_real = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            x0_pred = self.generator(x_next, t, z_real)
        potential = -(f_fake + self._log_q(x_next, x_fake, t))
        squares = (z - fake_mu).square() / (1e-6 + fake_logvar.exp())
        latent = 0.5 * (fake_logvar + squares).sum(dim=1)
        kl = 0.5 * (logvar.exp() + mu.square() - 1.0 - logvar).sum(dim=1)
        forward = self._reconstruction(x_t, x0_pred, x_next, t) + kl
        game = self.game
        return (potential + game.lambda_z * latent + game.lambda_f * forward).mean()
