"""A reference density of the data, known at every level and under every condition.

With it f(x, t) = c·tanh(network(x, t)/c) + log p_ref(x_t), so that the network learns
what the reference misses, at most c nats of it (residual energies, Deng et al. 2020,
arXiv 2004.11714): where no data are, the energy falls off as the reference does. An
image's network, −½‖x − U(x, t)‖², is not bounded: it only lowers the energy.

p_ref of tables is one half a mixture of Gaussians and one half a window estimate
(Parzen 1962), a narrow Gaussian around each of the training rows; that of images is the
mixture alone, or windows alone, under which training images score higher than equally
likely new ones. p_ref(·, t) is its density after diffusion, that of x_t = A_t x_0 +
S_t ε. Both halves stay mixtures of Gaussians, and so does p_ref(x_t | x_{t+1}), the
defensive part of the proposal. The reference travels with the energy's variables, and
is not trained; `data.reference_fit` fits it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks

COLLECTION = "reference"
# Rows of the window; and full covariances up to these widths, of tables and images,
# beyond them diagonal ones.
NUM_POINTS, _MAX_COLUMNS, _MAX_PIXELS = 1_000, 64, 256
_ABSENT = -1e30  # Log weight of Gaussians that are not used.
# Fewer bits, the default on GPUs and TPUs, would cost tenths of a nat.
_EXACT = jax.lax.Precision.HIGHEST


class Gaussians(NamedTuple):
    """A mixture, for each of a batch or one for all.

    Attributes:
      log_weights: of the k Gaussians.
      means: their means.
      variances: their variances along the axes.
      axes: an orthogonal matrix each, whose columns are axes; None: the coordinates'.
    """

    log_weights: Float[Array | np.ndarray, "*batch k"]
    means: Float[Array | np.ndarray, "*batch k d"]
    variances: Float[Array | np.ndarray, "*batch k d"]
    axes: Float[Array | np.ndarray, "k d d"] | None


class Window(NamedTuple):
    """Gaussians of one variance around shift + scale·points, for each of a batch.

    Attributes:
      log_weights: of the m Gaussians.
      points: the same for the batch.
      shift, scale, variance: of each of the batch.
    """

    log_weights: Float[Array, "batch m"]
    points: Float[Array, "m d"]
    shift: Float[Array, "batch d"]
    scale: Float[Array, "batch 1"]
    variance: Float[Array, "batch 1"]


class Density(NamedTuple):
    """p_ref(x_t) or p_ref(x_t | x_{t+1}), one for each of a batch."""

    gaussians: Gaussians
    window: Window


class Reference(NamedTuple):
    """p_ref(x_0) before the noise of level 0; its arrays are among the variables.

    Attributes:
      gaussians: one half of the density, or all of it; of `windows` without weight.
      points: training rows, of the other half; of an images' mixture without weight.
      log_weights: of the points.
      variance: of images' windows; None: windows have the noise of the level alone.
    """

    gaussians: Gaussians
    points: Float[Array | np.ndarray, "m d"]
    log_weights: Float[Array | np.ndarray, " m"]
    variance: Float[Array | np.ndarray, ""] | None = None


def with_reference(
    networks: Networks,
    schedule: Schedule,
    num: int,
    limit: float | None,
    kind: str = "mixture",
) -> Networks:
    """Returns networks whose energy has a reference of at most `num` Gaussians.

    Initial variables hold one without weight; `with_fitted` fills in that of the data.

    Args:
      networks: of points or images.
      schedule: the diffusion.
      num: most Gaussians of the mixture, or windows.
      limit: c, nats; None: what the network adds is not bounded.
      kind: `mixture`, or, of images, `windows`.
    """
    shape = networks.event_shape

    def init(key: Array) -> Any:
        return with_fitted(networks.init(key), empty(num, shape, kind))

    def residual(variables, x, t, rngs=None):
        learnt = networks.energy({"params": variables["params"]}, x, t, rngs)
        return learnt if limit is None else limit * jnp.tanh(learnt / limit)

    def energy(variables, x, t, rngs=None):
        density = at_level(read(variables), schedule, t)
        known = log_density(density, x.reshape(x.shape[0], -1))
        return residual(variables, x, t, rngs) + known

    return networks._replace(init=init, energy=energy, residual=residual)


def with_fitted(variables: Any, reference: Reference) -> Any:
    """Returns players' variables with this reference among the energy's."""
    held = reference._asdict()
    held |= {"gaussians": reference.gaussians._asdict()}
    if reference.gaussians.axes is None:
        del held["gaussians"]["axes"]
    if reference.variance is None:
        del held["variance"]
    return variables._replace(energy={**variables.energy, COLLECTION: held})


def read(energy_variables: Any) -> Reference | None:
    """Returns the reference among the energy's variables; None: there is none."""
    if COLLECTION not in energy_variables:
        return None
    held = dict(energy_variables[COLLECTION])
    gaussians = Gaussians(**{"axes": None, **held.pop("gaussians")})
    return Reference(gaussians, **held)


def has_axes(event_shape: tuple[int, ...]) -> bool:
    """Returns whether Gaussians of this shape may have full covariances."""
    most = _MAX_COLUMNS if len(event_shape) == 1 else _MAX_PIXELS
    return math.prod(event_shape) <= most


def empty(num: int, event_shape: tuple[int, ...], kind: str = "mixture") -> Reference:
    """Returns a reference whose `num` Gaussians and points have no weight."""
    dim, num_points = math.prod(event_shape), NUM_POINTS if len(event_shape) == 1 else 1
    variance, rotated = None, has_axes(event_shape)
    if kind == "windows":
        num, num_points, variance, rotated = 1, num, np.float32(1), False
    zeros, absent = np.zeros((num, dim), np.float32), np.float32(_ABSENT)
    axes = np.zeros((num, dim, dim), np.float32) if rotated else None
    return Reference(
        Gaussians(np.full(num, absent), zeros, np.ones_like(zeros), axes),
        np.zeros((num_points, dim), np.float32),
        np.full(num_points, absent),
        variance,
    )


def given_measurement(
    gaussians: Gaussians,
    matrix: Float[np.ndarray, "m d"],
    y: Float[np.ndarray, " m"],
    std: float,
) -> tuple[
    Float[np.ndarray, " k"], Float[np.ndarray, "k d"], Float[np.ndarray, "k d d"]
]:
    """Returns the mixture's p(x_0 | y) of y = A x_0 + σ ε, one point.

    That is the log evidence of each Gaussian, with its weight, and means and
    covariances of x_0; all in double precision on the host.

    Args:
      gaussians: one mixture, all of whose Gaussians are in use, with axes.
      matrix: A.
      y: the measurement.
      std: σ > 0.
    """
    log_weights, means, variances, axes = gaussians
    covariances = axes * variances[:, None] @ axes.swapaxes(1, 2)
    cross = matrix @ covariances
    inner = cross @ matrix.T + std**2 * np.eye(len(y))
    residual = y - means @ matrix.T
    gain = np.linalg.solve(inner, cross).swapaxes(1, 2)
    solved = np.linalg.solve(inner, residual[..., None])[..., 0]
    logs = log_weights - 0.5 * (residual * solved).sum(axis=1)
    logs = logs - 0.5 * np.linalg.slogdet(2 * np.pi * inner)[1]
    moved = np.einsum("kdm,km->kd", gain, residual)
    return logs, means + moved, covariances - gain @ cross


def in_use(gaussians: Gaussians) -> Gaussians:
    """Returns the Gaussians of a fitted mixture, in double precision on the host."""
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gaussians)
    used = found.log_weights > _ABSENT / 2
    return jax.tree.map(lambda leaf: leaf[used], found)


def roots(covariances: Float[np.ndarray, "k d d"]) -> Float[np.ndarray, "k d d"]:
    """Returns square roots R of covariances, R Rᵀ."""
    values, vectors = np.linalg.eigh(covariances)
    return vectors * np.sqrt(np.maximum(values, 0.0))[:, None]


def at_level(
    reference: Reference, schedule: Schedule, t: Int[Array, " batch"]
) -> Density:
    """Returns p_ref(x_t) for each t: means scaled by A_t, variances A_t² v + S_t²."""
    own = 0.0 if reference.variance is None else reference.variance
    a, s = (jnp.asarray(v)[t][:, None] for v in (schedule.a_cum, schedule.sigma_cum))
    shape = (*t.shape, *reference.log_weights.shape)
    window = Window(
        log_weights=jnp.broadcast_to(reference.log_weights, shape),
        points=reference.points,
        shift=jnp.zeros((*t.shape, reference.points.shape[1])),
        scale=a,
        variance=a**2 * own + s**2,
    )
    return Density(gaussians_at_level(reference.gaussians, schedule, t), window)


def gaussians_at_level(
    gaussians: Gaussians, schedule: Schedule, t: Int[Array, " batch"]
) -> Gaussians:
    """Returns the half of `at_level` that is a mixture."""
    levels = schedule.a_cum, schedule.sigma_cum
    a, s = (jnp.asarray(v)[t][:, None, None] for v in levels)
    shape = (*t.shape, *gaussians.log_weights.shape)
    return gaussians._replace(
        log_weights=jnp.broadcast_to(gaussians.log_weights, shape),
        means=a * gaussians.means[None],
        variances=a**2 * gaussians.variances[None] + s**2,
    )


def given_next(
    reference: Reference,
    schedule: Schedule,
    x_next: Float[Array, "batch d"],
    t: Int[Array, " batch"],
) -> Density:
    """Returns p_ref(x_t | x_{t+1}), whose means are those of a Kalman filter."""
    gaussians, window = at_level(reference, schedule, t)
    a, beta = (jnp.asarray(v)[t + 1][:, None] for v in (schedule.a, schedule.beta))
    # Of each row, beside [batch, k, d].
    wide_a, wide_beta = a[:, :, None], beta[:, :, None]
    of_next = Density(
        gaussians._replace(
            means=wide_a * gaussians.means,
            variances=wide_a**2 * gaussians.variances + wide_beta,
        ),
        window._replace(scale=a * window.scale, variance=a**2 * window.variance + beta),
    )
    log_weights = jax.nn.log_softmax(_all_log_parts(of_next, x_next), axis=1)
    k = gaussians.log_weights.shape[1]
    gain = wide_a * gaussians.variances / of_next.gaussians.variances
    surprise = _rotated(gaussians.axes, x_next[:, None] - of_next.gaussians.means)
    moved = _rotated(gaussians.axes, gain * surprise, back=True)
    narrowed = gaussians.variances * wide_beta / of_next.gaussians.variances
    window_gain = a * window.variance / of_next.window.variance
    return Density(
        gaussians._replace(
            log_weights=log_weights[:, :k],
            means=gaussians.means + moved,
            variances=narrowed,
        ),
        window._replace(
            log_weights=log_weights[:, k:],
            shift=window_gain * x_next,
            scale=window.scale * (1.0 - window_gain * a),
            variance=window.variance * beta / of_next.window.variance,
        ),
    )


def draw(
    density: Density, uniform: Float[Array, " draws"], eps: Float[Array, "draws d"]
) -> Float[Array, "draws d"]:
    """Returns as many draws for each of the batch, by uniform and normal numbers."""
    gaussians, window = density
    log_weights = [gaussians.log_weights, window.log_weights]
    below = jnp.cumsum(jnp.exp(jnp.concatenate(log_weights, axis=1)), axis=1)
    of_each = uniform.reshape(len(below), -1)
    level = of_each[:, :, None] * below[:, None, -1:]
    place = (below[:, None] < level).sum(axis=2).reshape(-1)
    k = gaussians.log_weights.shape[1]
    row = jnp.repeat(jnp.arange(len(below)), of_each.shape[1])
    one = jnp.minimum(place, k - 1)
    noise = jnp.sqrt(gaussians.variances[row, one]) * eps
    if gaussians.axes is not None:
        axes = jnp.asarray(gaussians.axes)[one]
        noise = jnp.einsum("nij,nj->ni", axes, noise, precision=_EXACT)
    of_gaussian = gaussians.means[row, one] + noise
    points = jnp.asarray(window.points)[jnp.maximum(place - k, 0)]
    centre = window.shift[row] + window.scale[row] * points
    of_window = centre + jnp.sqrt(window.variance[row]) * eps
    return jnp.where((place < k)[:, None], of_gaussian, of_window)


def log_density(density: Density, x: Float[Array, "batch d"]) -> Float[Array, " batch"]:
    """Returns the log density of each row, nats."""
    return jax.scipy.special.logsumexp(_all_log_parts(density, x), axis=1)


def _all_log_parts(density: Density, x: Array) -> Float[Array, "batch parts"]:
    """Returns the log weight plus log density of each Gaussian, of both halves."""
    window = density.window
    shifted = x - window.shift
    # ‖x − s·p‖² of all pairs without an array [batch, m, d].
    squares = (shifted**2).sum(axis=1, keepdims=True)
    products = jnp.matmul(shifted, window.points.T, precision=_EXACT)
    squares = squares - 2 * window.scale * products
    squares = squares + window.scale**2 * (window.points**2).sum(axis=1)[None]
    squares = jnp.maximum(squares, 0.0)
    dim = x.shape[1]
    logs = -0.5 * (squares / window.variance)
    logs = logs - 0.5 * dim * jnp.log(2 * jnp.pi * window.variance)
    parts = [log_parts(density.gaussians, x), window.log_weights + logs]
    return jnp.concatenate(parts, axis=1)


def log_parts(gaussians: Gaussians, x: Array) -> Float[Array, "batch k"]:
    """Returns the log weight plus log density of each Gaussian at each row."""
    centred = _rotated(gaussians.axes, x[:, None] - gaussians.means)
    variances = gaussians.variances
    terms = centred**2 / variances + jnp.log(2 * jnp.pi * variances)
    return gaussians.log_weights - 0.5 * terms.sum(axis=2)


def _rotated(
    axes: Float[Array | np.ndarray, "k d d"] | None,
    x: Float[Array, "batch k d"],
    back: bool = False,
) -> Float[Array, "batch k d"]:
    if axes is None:
        return x
    how = "kij,nkj->nki" if back else "kij,nki->nkj"
    return jnp.einsum(how, axes, x, precision=_EXACT)
