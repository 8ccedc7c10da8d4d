"""What a trained model says of single points; larger means more likely an inlier."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from ddaebm_jax import density, diffusion, objective
from ddaebm_jax import sharding as parallel
from ddaebm_jax.data import images
from ddaebm_jax.diffusion import Schedule
from ddaebm_jax.models import Networks


def ood_scores(
    networks: Networks,
    schedule: Schedule,
    variables: Any,
    x: UInt8[Array | np.ndarray, "n *shape"] | Float[Array | np.ndarray, "n *shape"],
    seed: int,
    num_draws: int,
    chunk: int,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Returns three scores of each point, by name, float32 [n].

    - `energy`: f(x, 0), the unnormalised log density, nats.
    - `gradient norm`: −‖∇_x f(x, 0)‖, Euclidean over all dimensions; the approximate
      mass of Grathwohl et al. 2020 (arXiv 1912.03263), by which typical points have
      a flat density around them.
    - `energy over t`: Σ_{t=0}^{T−1} E_{q(x_t|x_0)} f(x_t, t), the mean over
      `num_draws` draws of the noise. Each f(·, t) is known up to a constant: the sum
      ranks points, it is no log density.

    Args:
      networks: the apply functions.
      schedule: the diffusion that the networks were trained with.
      variables: the energy's.
      x: points in the networks' units, or uint8 images.
      seed: of the noise: draw j of point i at t depends on (seed, i, j, t) only.
      num_draws: at least 1.
      chunk: points that a network takes at once; changes nothing but rounding.
      mesh: devices over which they are split; None: one device.

    Raises:
      ValueError: if there is no point, or a number is below 1.
    """
    if num_draws < 1 or chunk < 1:
        raise ValueError(
            f"num_draws is {num_draws} and chunk is {chunk}; both must be at least 1"
        )
    key = jax.random.key(seed)
    mesh = parallel.make_mesh(1) if mesh is None else mesh
    whole = parallel.replicated(mesh)
    variables = jax.device_put(variables, whole)

    def in_chunks(score: Callable[[Array, Array], Array]) -> np.ndarray:
        # A chunk is its points' places: those that fill up the last one bring their
        # own noise, and are dropped.
        def of(places: np.ndarray) -> Array:
            part = parallel.split_rows(mesh, np.asarray(x)[places])
            found = score(part, parallel.split_rows(mesh, places))
            # Every process is to have them all.
            return jax.device_put(found, whole)[: len(places)]

        numbers = np.arange(len(x), dtype=np.int32)
        return np.asarray(density.evaluate_in_chunks(of, numbers, chunk))

    def over_t(part: Array, places: Array) -> Array:
        # Not in one program: that would hold all activations at once, or scan, which
        # is slow on a CPU.
        total: Any = 0.0
        for draw in range(num_draws):
            for t in range(schedule.num_steps):
                total += _energy_at(
                    networks, schedule, variables, part, key, places, draw, t
                )
        return total / num_draws

    return {
        "energy": in_chunks(lambda part, _: _energy(networks, variables, part)),
        "gradient norm": in_chunks(
            lambda part, _: _gradient_norm(networks, variables, part)
        ),
        "energy over t": in_chunks(over_t),
    }


def _as_float(x: Array) -> Array:
    return images.to_float(x) if x.dtype == jnp.uint8 else x


# The networks are functions and so static: one program for all chunks of a run.
@partial(jax.jit, static_argnums=0)
def _energy(networks, variables, x):
    return density.energy_at_data(networks, variables, _as_float(x))


@partial(jax.jit, static_argnums=0)
def _gradient_norm(networks, variables, x):
    score = density.score_at_data(networks, variables, _as_float(x))
    return -jnp.sqrt(objective.sum_over_dims(score**2))


@partial(jax.jit, static_argnums=0)
def _energy_at(networks, schedule, variables, x, key, places, draw, t):
    """f(x_t, t) for one draw of x_t."""
    x0 = _as_float(x)

    def noise(place: Array) -> Array:
        own = jax.random.fold_in(key, place)
        own = jax.random.fold_in(jax.random.fold_in(own, draw), t)
        return jax.random.normal(own, x0.shape[1:])

    times = jnp.full(places.shape, t, jnp.int32)
    x_t = diffusion.diffuse(schedule, x0, times, jax.vmap(noise)(places))
    return networks.energy(variables, x_t, times)
