"""Points in the plane, drawn on the device, with their true densities.

A distribution is a pair of pure functions: one draws a point from a key, the other
gives the log density of points. Where the density has no closed form it is a
quadrature whose error is far below what the evaluation resolves.

The parameters of gaussians25, pinwheel and swissroll are the paper's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, logsumexp
from jaxtyping import Array, Float

LogDensity = Callable[[Float[Array, "batch 2"]], Float[Array, " batch"]]

_LOG_2PI = float(np.log(2 * np.pi))


class Synthetic(NamedTuple):
    """A distribution in the plane.

    Attributes:
      sample: key → one point, [2].
      log_density: points [n, 2] → log p, nats, [n].
      extent: the square [−extent, extent]², in which densities are compared, holds all
        but a negligible mass.
      cells: cells a side for that comparison, well below the finest detail.
      modes: centres of the modes of a mixture of Gaussians, [m, 2]; else None.
      mode_std: standard deviation of a mode.
    """

    sample: Callable[[Array], Float[Array, "2"]]
    log_density: LogDensity
    extent: float
    cells: int
    modes: Float[np.ndarray, "modes 2"] | None = None
    mode_std: float | None = None


def _log_normal(squares: Array, std: float) -> Array:
    """Returns log N in the plane from squared distances."""
    return -0.5 * squares / std**2 - _LOG_2PI - 2 * np.log(std)


def _gaussians_at(centres: np.ndarray, std: float) -> LogDensity:
    """Returns the log density of an even mixture of round Gaussians."""

    def log_density(x: Array) -> Array:
        gaps = x[:, None, :] - jnp.asarray(centres)[None, :, :]
        logs = _log_normal((gaps**2).sum(axis=-1), std)
        return logsumexp(logs, axis=1) - np.log(len(centres))

    return log_density


def _mixture(modes: np.ndarray, std: float, extent: float, cells: int):
    """An even mixture of round Gaussians."""
    modes = modes.astype(np.float32)

    def sample(key: Array) -> Array:
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.randint(key_mode, (), 0, len(modes))
        return jnp.asarray(modes)[mode] + std * jax.random.normal(key_noise, (2,))

    return Synthetic(sample, _gaussians_at(modes, std), extent, cells, modes, std)


def gaussians25() -> Synthetic:
    """25 Gaussians on the grid 2·{−2..2}², std 0.1, all divided by 2.828."""
    axis = 2.0 * np.arange(-2, 3)
    modes = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return _mixture(modes / 2.828, 0.1 / 2.828, 4.0, 800)


def gaussians8() -> Synthetic:
    """8 Gaussians on a circle of radius 2, std 0.1, all divided by 1.414."""
    angle = 2 * np.pi * np.arange(8) / 8
    modes = 2.0 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return _mixture(modes / 1.414, 0.1 / 1.414, 4.0, 400)


def pinwheel() -> Synthetic:
    """5 arms, radial std 0.3, tangential std 0.1, rate 0.25, scaled by 2.

    A point u ~ N((1, 0), diag(0.3², 0.1²)) is turned by −(θ_arm + rate·e^{u_0}) and
    doubled. The map keeps |u|; its determinant is 1 − rate·e^{u_0}·u_1 before
    scaling. The density inverts it, in polar form, by Newton's method.
    """
    arms, radial, tangential, rate, scale = 5, 0.3, 0.1, 0.25, 2.0
    offsets = (2 * np.pi / arms * np.arange(arms)).astype(np.float32)

    def sample(key: Array) -> Array:
        key_arm, key_noise = jax.random.split(key)
        arm = jax.random.randint(key_arm, (), 0, arms)
        noise = jax.random.normal(key_noise, (2,))
        u = noise * jnp.array([radial, tangential]) + jnp.array([1.0, 0.0])
        angle = -(jnp.asarray(offsets)[arm] + rate * jnp.exp(u[0]))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turned = jnp.stack([cos * u[0] - sin * u[1], sin * u[0] + cos * u[1]])
        return scale * turned

    def log_density(x: Array) -> Array:
        y = x / scale
        radius = jnp.sqrt((y**2).sum(axis=1))[:, None]
        angle = jnp.arctan2(y[:, 1], y[:, 0])[:, None] + jnp.asarray(offsets)[None, :]

        def residual(psi):
            """angle(y) + θ + rate·e^{r cos ψ} − ψ, wrapped; 0 at the polar u."""
            gap = angle + rate * jnp.exp(radius * jnp.cos(psi)) - psi
            return jnp.arctan2(jnp.sin(gap), jnp.cos(gap))

        def newton(_, psi):
            slope = rate * radius * jnp.sin(psi) * jnp.exp(radius * jnp.cos(psi)) + 1.0
            safe = jnp.where(jnp.abs(slope) < 0.1, 0.1, slope)
            move = jnp.clip(residual(psi) / safe, -0.5, 0.5)
            return jnp.clip(psi + move, -jnp.pi, jnp.pi)

        psi = jax.lax.fori_loop(0, 30, newton, jnp.zeros_like(angle))
        u0, u1 = radius * jnp.cos(psi), radius * jnp.sin(psi)
        log_u = -0.5 * (((u0 - 1.0) / radial) ** 2 + (u1 / tangential) ** 2)
        log_u = log_u - _LOG_2PI - np.log(radial * tangential)
        determinant = jnp.abs(1.0 + rate * jnp.exp(u0) * u1)
        logs = log_u - jnp.log(jnp.maximum(determinant, 1e-3))
        solved = jnp.abs(residual(psi)) < 1e-3
        logs = jnp.where(solved, logs, -1e3)
        return logsumexp(logs, axis=1) - np.log(arms * scale**2)

    return Synthetic(sample, log_density, 4.0, 200)


def _noisy_curve(
    curves: list[Callable[[Array], Array]],
    std: float,
    extent: float,
    cells: int,
    nodes: int,
) -> Synthetic:
    """Uniform on the parameter of curves [0, 1] → plane, plus round Gaussian noise.

    The density is the midpoint rule over `nodes` parameters of each curve.
    """
    parameter = jnp.asarray((np.arange(nodes) + 0.5) / nodes)
    centres = np.concatenate([np.asarray(curve(parameter)) for curve in curves])

    def sample(key: Array) -> Array:
        key_curve, key_place, key_noise = jax.random.split(key, 3)
        place = jax.random.uniform(key_place, (1,))
        points = jnp.concatenate([curve(place) for curve in curves])
        which = jax.random.randint(key_curve, (), 0, len(curves))
        return points[which] + std * jax.random.normal(key_noise, (2,))

    return Synthetic(sample, _gaussians_at(centres, std), extent, cells)


def _arc(radius: float, start: float, stop: float, centre: tuple[float, float]):
    def curve(place: Array) -> Array:
        angle = start + (stop - start) * place
        points = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return points + jnp.asarray(centre)[None, :]

    return curve


def swissroll() -> Synthetic:
    """A spiral (s cos s, s sin s), s in 1.5π…4.5π, noise 1.0, all divided by 5."""

    def curve(place: Array) -> Array:
        s = 1.5 * jnp.pi * (1.0 + 2.0 * place)
        return jnp.stack([s * jnp.cos(s), s * jnp.sin(s)], axis=-1) / 5.0

    return _noisy_curve([curve], 0.2, 4.0, 200, 400)


def moons() -> Synthetic:
    """Two interleaving half circles of radius 1.5, noise 0.15."""
    upper = _arc(1.5, 0.0, np.pi, (-0.75, -0.375))
    lower = _arc(1.5, np.pi, 2 * np.pi, (0.75, 0.375))
    return _noisy_curve([upper, lower], 0.15, 4.0, 200, 200)


def spirals() -> Synthetic:
    """Two spiral arms, one the other turned by π, one and a half turns, noise 0.1."""

    def arm(sign: float) -> Callable[[Array], Array]:
        def curve(place: Array) -> Array:
            angle = 3 * jnp.pi * jnp.sqrt(place)
            points = jnp.stack([-jnp.cos(angle), jnp.sin(angle)], axis=-1)
            return sign * angle[:, None] / 3.0 * points

        return curve

    return _noisy_curve([arm(1.0), arm(-1.0)], 0.1, 4.0, 400, 1000)


def _rings(radii: np.ndarray, std: float) -> Synthetic:
    """Even shares on concentric circles, plus round Gaussian noise.

    A noisy circle's density is (2πσ²)⁻¹ exp(−(r²+R²)/2σ²) I_0(rR/σ²).
    """
    radii = radii.astype(np.float32)

    def sample(key: Array) -> Array:
        key_ring, key_angle, key_noise = jax.random.split(key, 3)
        radius = jnp.asarray(radii)[jax.random.randint(key_ring, (), 0, len(radii))]
        angle = jax.random.uniform(key_angle, (), maxval=2 * jnp.pi)
        point = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return point + std * jax.random.normal(key_noise, (2,))

    def log_density(x: Array) -> Array:
        r = jnp.sqrt((x**2).sum(axis=1))[:, None]
        ring = jnp.asarray(radii)[None, :]
        bessel = jnp.log(i0e(r * ring / std**2))
        logs = _log_normal((r - ring) ** 2, std) + bessel
        return logsumexp(logs, axis=1) - np.log(len(radii))

    return Synthetic(sample, log_density, 4.0, 400)


def circles() -> Synthetic:
    """Two circles, radii 1 and 2, noise 0.12."""
    return _rings(np.array([1.0, 2.0]), 0.12)


def rings() -> Synthetic:
    """Four circles, radii 0.6, 1.2, 1.8 and 2.4, noise 0.08."""
    return _rings(np.array([0.6, 1.2, 1.8, 2.4]), 0.08)


def checkerboard() -> Synthetic:
    """Uniform on the 8 dark unit squares of a 4×4 board centred at 0."""

    def sample(key: Array) -> Array:
        key_square, key_place = jax.random.split(key)
        square = jax.random.randint(key_square, (), 0, 8)
        row, column = square // 2, 2 * (square % 2) + (square // 2) % 2
        corner = jnp.stack([row, column]).astype(jnp.float32) - 2.0
        return corner + jax.random.uniform(key_place, (2,))

    def log_density(x: Array) -> Array:
        cell = jnp.floor(x + 2.0)
        inside = ((cell >= 0) & (cell < 4)).all(axis=1)
        dark = (cell.sum(axis=1) % 2) == 0
        # A floor rather than −inf keeps differences of logs finite.
        return jnp.where(inside & dark, -np.log(8.0), -1e3)

    return Synthetic(sample, log_density, 4.0, 200)


_MAKERS = (gaussians25, gaussians8, pinwheel, swissroll, moons)
_MAKERS += (circles, rings, checkerboard, spirals)
SYNTHETIC: dict[str, Callable[[], Synthetic]] = {f.__name__: f for f in _MAKERS}


def draw(distribution: Synthetic, keys: Array) -> Float[Array, "batch 2"]:
    """Draws one point from each key; pure, so that it runs inside a jitted step."""
    return jax.vmap(distribution.sample)(keys)
