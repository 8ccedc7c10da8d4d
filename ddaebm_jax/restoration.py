"""Restoration: what is likely of x_0 given a measurement y = A x_0 + σ ε.

Two ways to draw from p(x_0 | y):

- In noise space the generator turns ξ = (x_T, z_t, ε_t) ~ N(0, I) into x_0(ξ), so
  p(ξ | y) ∝ exp −U(ξ), U = ½‖ξ‖² + ‖y − A x_0(ξ)‖²/(2σ²), which needs no density of
  x_0. Hamiltonian Monte Carlo (Neal 2011, arXiv 1206.1901) draws from it.
- Twisted sequential Monte Carlo (Wu et al. 2023, arXiv 2306.17775): particles go from
  level T to 0 and are weighted by ψ_t(x_t)/ψ_{t+1}(x_{t+1}), where
  ψ_t(x_t) = N(y; A x̂_0(x_t), (σ² + τ_t²) I), x̂_0 is the generator's prediction and τ_t
  its error; ψ_0 is the likelihood. The prior is the generator's law, or with the
  energies' weights (see `density`) exp f(·, 0).
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddaebm_jax import diffusion, objective
from ddaebm_jax import proposal as proposal_lib
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal, ProposalNoise

# Linear operators A; `gain`: the largest eigenvalue of A Aᵀ. Arrays have a batch axis.


@flax.struct.dataclass
class Identity:
    """All of x is seen: denoising."""

    gain = 1.0

    def apply(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
        """Returns x."""
        return x


@flax.struct.dataclass
class Mask:
    """Some pixels or cells are seen, the others are 0: inpainting, missing cells."""

    known: Bool[Array, "batch *shape"]
    gain = 1.0

    def apply(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
        """Returns x where it is known, else 0."""
        return jnp.where(self.known, x, 0.0)


@flax.struct.dataclass
class BlockMean:
    """Means of factor × factor pixels are seen: super-resolution."""

    factor: int = flax.struct.field(pytree_node=False)

    @property
    def gain(self) -> float:
        """A Aᵀ = I/factor²."""
        return self.factor**-2

    def apply(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height2 width2 channels"]:
        """Returns the means; `factor` divides both sides."""
        batch, height, width, channels = x.shape
        f = self.factor
        blocks = x.reshape(batch, height // f, f, width // f, f, channels)
        return blocks.mean(axis=(2, 4))


@flax.struct.dataclass
class Blur:
    """Pixels are averaged along both axes, mirrored at the edges: deblurring.

    `line`: an odd number of nonnegative weights with sum 1, the same from both ends;
    the kernel is its outer product with itself.
    """

    line: tuple[float, ...] = flax.struct.field(pytree_node=False)
    gain = 1.0

    def apply(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Returns the averages."""
        for axis in (1, 2):
            pads = [(len(self.line) // 2 * (a == axis),) * 2 for a in range(4)]
            padded, side = jnp.pad(x, pads, mode="symmetric"), x.shape[axis]
            x = sum(
                weight * jax.lax.slice_in_dim(padded, i, i + side, axis=axis)
                for i, weight in enumerate(self.line)
            )
        return x


def gaussian_line(std: float, side: int) -> tuple[float, ...]:
    """Returns a Gaussian of this standard deviation, cut at 3σ or the image's side."""
    reach = min(int(np.ceil(3 * std)), side - 1)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / std) ** 2)
    return tuple((line / line.sum()).tolist())


Operator = Identity | Mask | BlockMean | Blur


def adjoint(
    operator: Operator, y: Float[Array, "batch *seen"], shape: tuple[int, ...]
) -> Float[Array, "batch *shape"]:
    """Returns Aᵀy, like points of this shape (without the batch)."""
    points = jax.ShapeDtypeStruct((len(y), *shape), y.dtype)
    return jax.linear_transpose(operator.apply, points)(y)[0]


class Measurement(NamedTuple):
    """What is known of each of a batch.

    Attributes:
      operator: A.
      y: A x_0 + σ ε; where a mask hides x, 0.
      std: σ > 0, of each example.
    """

    operator: Operator
    y: Float[Array, "batch *seen"]
    std: Float[Array, " batch"]


def log_likelihood(
    measurement: Measurement,
    x0: Float[Array, "batch *shape"],
    variance: Float[Array, " batch"] | float = 0.0,
) -> Float[Array, " batch"]:
    """Returns log N(y; A x_0, (σ² + variance) I) up to a constant of the example, nats.

    `variance` is that of the errors of x_0, in the units of y.
    """
    residual = measurement.y - measurement.operator.apply(x0)
    return -0.5 * objective.sum_over_dims(residual**2) / (measurement.std**2 + variance)


def guided(
    measurement: Measurement,
    x0_pred: Float[Array, "batch *shape"],
    variance: Float[Array, " batch"] | float,
) -> Float[Array, "batch *shape"]:
    """Returns x̂_0 + τ²Aᵀ(y − A x̂_0)/(σ² + τ²‖A Aᵀ‖).

    If A Aᵀ is a multiple of a projection, it is the mean of x_0 ~ N(x̂_0, τ² I) given y.
    """
    operator = measurement.operator
    residual = measurement.y - operator.apply(x0_pred)
    gain = variance / (measurement.std**2 + variance * operator.gain)
    step = adjoint(operator, residual, x0_pred.shape[1:])
    return x0_pred + diffusion.per_example(gain, x0_pred) * step


def with_error(
    measurement: Measurement,
    x0_pred: Float[Array, "batch *shape"],
    error: Float[Array, "*shape"],
    eps: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *seen"],
) -> Float[Array, "batch *shape"]:
    """Returns a draw of x_0 ~ N(x̂_0, diag τ²) given y, by Matheron's rule.

    That is x + K (y − A x − σ ε'), where x = x̂_0 + τ ε and K = τ²Aᵀ(A τ²Aᵀ + σ² I)⁻¹,
    by conjugate gradients; ε (`eps`) and ε' (`noise`) are standard normal.
    """
    operator, std = measurement.operator, diffusion.per_example(measurement.std, eps)

    def spread(y: Array) -> Array:
        return error[None] ** 2 * adjoint(operator, y, eps.shape[1:])

    x = x0_pred + error[None] * eps
    residual = measurement.y - operator.apply(x) - std * noise
    solved, _ = jax.scipy.sparse.linalg.cg(
        lambda y: operator.apply(spread(y)) + std**2 * y, residual
    )
    return x + spread(solved)


# Noise space.


class NoisePath(NamedTuple):
    """ξ: the randomness of a sample.

    Attributes:
      x_last: x_T.
      z: the latent of each step t.
      eps: the posterior's noise at each step t; that of t = 0 only where level 0 of
        generated points carries noise.
    """

    x_last: Float[Array, "batch *shape"]
    z: Float[Array, "batch steps nz"]
    eps: Float[Array, "batch steps *shape"]


def generate(
    schedule: Schedule,
    networks: Networks,
    generator: dict,
    path: NoisePath,
    latent: bool = True,
    level: int | None = None,
) -> Float[Array, "batch *shape"]:
    """Returns x_0(ξ), the sample that the sampler makes of this noise.

    Args:
      schedule: the diffusion.
      networks: the apply functions.
      generator: the generator's variables.
      path: ξ.
      latent: False: z ≡ 0.
      level: of which `path.x_last` is taken to be; None: T.
    """
    x = path.x_last
    for step in reversed(range(level or schedule.num_steps)):
        t = jnp.full((len(x),), step, jnp.int32)
        z = path.z[:, step] if latent else jnp.zeros_like(path.z[:, step])
        x0 = networks.generator(generator, x, t, z)
        x = diffusion.sample_posterior(schedule, x0, x, t, path.eps[:, step])
    return x


def potential(
    schedule: Schedule,
    networks: Networks,
    generator: dict,
    measurement: Measurement,
    path: NoisePath,
    latent: bool = True,
) -> tuple[Float[Array, " batch"], Float[Array, "batch *shape"]]:
    """Returns U(ξ) = ½‖ξ‖² + ‖y − A x_0(ξ)‖²/(2σ²), and x_0(ξ); see `generate`."""
    x0 = generate(schedule, networks, generator, path, latent)
    return _half_squares(path) - log_likelihood(measurement, x0), x0


def entry_level(schedule: Schedule, std: float) -> int:
    """Returns the least level from 1 on whose noise S_t/A_t is at least `std`, or T."""
    ratios = schedule.sigma_cum / schedule.a_cum
    return min(max(1, int((ratios < std).sum())), schedule.num_steps)


def entered(
    schedule: Schedule,
    level: int,
    y: Float[Array, "batch *shape"],
    std: Float[Array, " batch"],
    eps: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Returns A_t y plus as much noise as level t has more than y = x_0 + σ ε."""
    a, s = schedule.a_cum[level], schedule.sigma_cum[level]
    missing = jnp.sqrt(jnp.maximum(s**2 - (a * std) ** 2, 0.0))
    return a * y + diffusion.per_example(missing, y) * eps


def _half_squares(tree: NoisePath) -> Float[Array, " batch"]:
    return sum(0.5 * objective.sum_over_dims(leaf**2) for leaf in tree)


def leapfrog(
    gradient: Callable[[NoisePath], NoisePath],
    path: NoisePath,
    momentum: NoisePath,
    step_size: Float[Array, " batch"],
    start: NoisePath,
) -> tuple[NoisePath, NoisePath, NoisePath]:
    """Takes one leapfrog step; returns path, momentum, and ∇U of the new path.

    Args:
      gradient: ξ → ∇U(ξ).
      path: ξ.
      momentum: of unit mass, shaped as ξ.
      step_size: of each example.
      start: ∇U(ξ).
    """
    momentum = _moved(momentum, -0.5 * step_size, start)
    path = _moved(path, step_size, momentum)
    end = gradient(path)
    return path, _moved(momentum, -0.5 * step_size, end), end


@jax.jit
def _moved(start: NoisePath, size: Float[Array, " batch"], way: NoisePath) -> NoisePath:
    return jax.tree.map(lambda x, d: x + diffusion.per_example(size, x) * d, start, way)


class State(NamedTuple):
    """A chain in noise space: ξ, its momentum, U(ξ), and x_0(ξ)."""

    path: NoisePath
    momentum: NoisePath
    potential: Float[Array, " batch"]
    x0: Float[Array, "batch *shape"]


@jax.jit
def accept(
    before: State, after: State, uniform: Float[Array, " batch"]
) -> tuple[State, Float[Array, " batch"]]:
    """Returns a trajectory's end or, where the Metropolis test fails, its start.

    And the acceptance. An end that is not finite is rejected.

    Args:
      before: where the trajectory starts.
      after: where it ends.
      uniform: of [0, 1).
    """
    start, end = (_half_squares(s.momentum) + s.potential for s in (before, after))
    acceptance = jnp.exp(jnp.minimum(jnp.nan_to_num(start - end, nan=-jnp.inf), 0.0))
    taken = uniform < acceptance

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(diffusion.per_example(taken, new), new, old)

    return jax.tree.map(chosen, after, before), acceptance


# Twisted sequential Monte Carlo.


class Twisted(NamedTuple):
    """Particles at a level.

    Attributes:
      x: x_t.
      x0: x̂_0(x_t).
      log_target: log ψ_t(x_t), plus f(x_t, t) if weighted, nats.
      log_weight: the log incremental weight, nats.
    """

    x: Float[Array, "batch *shape"]
    x0: Float[Array, "batch *shape"]
    log_target: Float[Array, " batch"]
    log_weight: Float[Array, " batch"]


def predicted(
    networks: Networks,
    generator: dict,
    x: Float[Array, "batch *shape"],
    level: Int[Array, " batch"],
    z: Float[Array, "batch draws nz"],
) -> Float[Array, "batch *shape"]:
    """Returns x̂_0(x_t), the generator's mean over draws of z; x itself at level 0."""
    t, num = jnp.maximum(level - 1, 0), z.shape[1]
    drawn = [networks.generator(generator, x, t, z[:, i]) for i in range(num)]
    return jnp.where(diffusion.per_example(level > 0, x), sum(drawn) / num, x)


def twisted_start(
    weighted: bool,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    measurement: Measurement,
    errors: Float[Array, " levels"],
    x: Float[Array, "batch *shape"],
    z: Float[Array, "batch draws nz"],
) -> Twisted:
    """Returns particles x_T ~ N(0, I), weighed by ψ_T; see `twisted_move`."""
    level = jnp.full((len(x),), schedule.num_steps, jnp.int32)
    x0 = predicted(networks, variables.generator, x, level, z)
    log_potential = log_likelihood(measurement, x0, errors[level])
    log_prior = objective.log_standard_normal(x) if weighted else 0.0
    return Twisted(x, x0, log_potential + log_prior, log_potential)


def twisted_move(
    proposal: Proposal,
    weighted: bool,
    schedule: Schedule,
    networks: Networks,
    variables: Players,
    measurement: Measurement,
    errors: Float[Array, " levels"],
    before: Twisted,
    t: Int[Array, " batch"],
    noise: ProposalNoise,
    z: Float[Array, "batch draws nz"],
) -> Twisted:
    """Moves particles from level t+1 to t, towards y, and weighs them.

    Draws are shifted as `guided` shifts x̂_0(x_{t+1}); weights undo that, so that only
    their variance depends on it. Weighted ones are of the proposal (see `proposal`),
    with the energies' weights. The others are of the generator, whose law at t = 0 is
    too narrow to be shifted.

    Args:
      proposal: the settings of g; unweighted, whether there is a latent.
      weighted: whether the prior is exp f(·, 0); else it is the generator's law.
      schedule: the diffusion.
      networks: the apply functions.
      variables: of all three.
      measurement: of each particle's example.
      errors: τ² by level 0 … T, the mean squared error of x̂_0(x_t); τ_0 = 0.
      before: particles at level t+1.
      t: which step.
      noise: of the draws.
      z: standard normal latents that x̂_0(x_t) is the mean over.
    """
    x_next = before.x
    variance = errors[t + 1] * (1.0 if weighted else t > 0)
    c1 = diffusion.per_example(schedule.posterior_c1[t], x_next)
    shift = c1 * (guided(measurement, before.x0, variance) - before.x0)
    if weighted:
        model = schedule, networks, variables
        drawn = proposal_lib.draw(proposal, *model, x_next, t, noise)
        x = drawn.x + shift
        log_weight = drawn.log_ratio + (
            diffusion.log_q(schedule, x_next, x, t)
            - diffusion.log_q(schedule, x_next, drawn.x, t)
        )
        log_prior = networks.energy(variables.energy, x, t)
    else:
        latent = noise.z if proposal.latent else jnp.zeros_like(noise.z)
        x0 = networks.generator(variables.generator, x_next, t, latent)
        mean = diffusion.posterior_mean(schedule, x0, x_next, t)
        log_var = schedule.posterior_log_var[t]
        x = diffusion.sample_posterior(schedule, x0, x_next, t, noise.eps)
        log_weight = -objective.gaussian_log_prob(x, mean, log_var)
        x = x + shift
        log_weight = log_weight + objective.gaussian_log_prob(x, mean, log_var)
        log_prior = 0.0
    z = z if proposal.latent else jnp.zeros_like(z)
    x0 = predicted(networks, variables.generator, x, t, z)
    log_target = log_likelihood(measurement, x0, errors[t]) + log_prior
    return Twisted(x, x0, log_target, log_weight + log_target - before.log_target)
