"""Energies and scores of data, grids of the plane, and evaluation in chunks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddaebm_jax import objective
from ddaebm_jax.models import Networks


def energy_at_data(
    networks: Networks, variables: Any, x: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Returns f(x, 0), the unnormalised log density of data, nats.

    Args:
      networks: the apply functions.
      variables: the energy's.
      x: points.
    """
    return networks.energy(variables, x, jnp.zeros((x.shape[0],), jnp.int32))


def score_at_data(
    networks: Networks, variables: Any, x: Float[Array, "batch *shape"]
) -> Float[Array, "batch *shape"]:
    """Returns ∇_x f(x, 0), the model's score."""
    return objective.energy_and_score(
        lambda points: energy_at_data(networks, variables, points), x
    )[1]


def grid_points(extent: float, cells: int) -> Float[Array, "points 2"]:
    """Returns the centres of cells×cells squares that tile [−extent, extent]².

    The first coordinate varies slowest.
    """
    width = 2.0 * extent / cells
    centres = -extent + width * (jnp.arange(cells) + 0.5)
    first, second = jnp.meshgrid(centres, centres, indexing="ij")
    return jnp.stack([first.ravel(), second.ravel()], axis=1)


def evaluate_in_chunks(
    function: Callable[[Any], Array], x: Array | np.ndarray, chunk: int = 20_000
) -> Array:
    """Applies a jitted row-wise function to many rows, a chunk at a time.

    The last chunk is padded with its first row, so that one program serves all.

    Raises:
      ValueError: if there are no rows.
    """
    rows = x.shape[0]
    if rows == 0:
        raise ValueError("there are no rows to evaluate")
    chunk = min(chunk, rows)
    parts = []
    for start in range(0, rows, chunk):
        part = x[start : start + chunk]
        missing = chunk - part.shape[0]
        if missing:
            # On the host, rows stay there until their turn.
            xp = np if isinstance(part, np.ndarray) else jnp
            part = xp.concatenate([part, xp.repeat(part[:1], missing, axis=0)])
        parts.append(function(part)[: chunk - missing])
    return jnp.concatenate(parts)
