"""Diagnostics of a step: mean terms, energy gaps by t, and values not finite."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Scalars, and vectors by t.
Metrics = dict[str, Float[Array, "..."]]

_GAP_SUM, _SHARE = "energy/gap_sum_by_t", "energy/share_by_t"
_NOT_FINITE = "/not_finite_by_t"


def summary(
    player: str,
    terms: Mapping[str, Float[Array, " batch"]],
    t: Int[Array, " batch"],
    num_steps: int,
) -> Metrics:
    """Returns the means of a player's terms, and the t of terms that are not finite.

    All values are means over the batch, so that they average over steps, devices and
    parts of a batch.

    Args:
      player: `energy` or `generator`, the prefix of the names.
      terms: name → one value per example.
      t: the examples' denoising steps.
      num_steps: T.
    """
    one_hot = jax.nn.one_hot(t, num_steps)
    finite = jnp.stack([jnp.isfinite(term) for term in terms.values()]).all(axis=0)
    metrics = {f"{player}/{name}": term.mean() for name, term in terms.items()}
    metrics[player + _NOT_FINITE] = (1.0 - finite) @ one_hot / t.shape[0]
    if player == "energy":
        metrics[_GAP_SUM] = (terms["real"] - terms["fake"]) @ one_hot / t.shape[0]
        metrics[_SHARE] = one_hot.mean(axis=0)
    return metrics


def energy_gaps_by_t(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns averaged metrics as numbers, with mean gaps by t as `energy/gap_t{t}`.

    The gap is f(x_t, t) − f(x̃_t, t). A t without examples is left out.
    """
    gaps = np.asarray(metrics[_GAP_SUM]), np.asarray(metrics[_SHARE])
    values = {k: float(v) for k, v in metrics.items() if not k.endswith("_by_t")}
    return values | {
        f"energy/gap_t{t}": float(gap / share)
        for t, (gap, share) in enumerate(zip(*gaps, strict=True))
        if share > 0
    }


@flax.struct.dataclass
class Fault:
    """The first of several steps with a metric that is not finite.

    Attributes:
      step: that step, counted from 1; 0: there was none.
      metrics: of that step; without meaning where there was none.
    """

    step: Int[Array, ""]
    metrics: Metrics

    def describe(self) -> str:
        """Returns which terms are not finite, at which step and t; on the host.

        Terms of the generator are left out where the energy's are not finite either:
        they follow from them.
        """
        bad = [name for name, value in self.metrics.items() if np.ndim(value) == 0]
        bad = [name for name in bad if not np.isfinite(self.metrics[name])]
        first = "energy/" if any(name.startswith("energy/") for name in bad) else ""
        terms = ", ".join(name for name in bad if name.startswith(first))
        shares = [
            np.asarray(value)
            for name, value in self.metrics.items()
            if name.endswith(_NOT_FINITE) and name.startswith(first)
        ]
        steps = np.flatnonzero(sum(share != 0 for share in shares))
        where = f"t = {', '.join(map(str, steps))}" if len(steps) else "no single t"
        return f"{terms} not finite at step {int(self.step)}, {where}"


def first_fault(metrics: Metrics, start: Int[Array, ""]) -> Fault:
    """Returns the first fault of K steps.

    Args:
      metrics: of the steps, stacked: leaves [K, …].
      start: number of steps taken before the first of them.
    """
    rows = (leaf.reshape(leaf.shape[0], -1) for leaf in metrics.values())
    finite = [jnp.isfinite(leaf).all(axis=1) for leaf in rows]
    bad = ~jnp.stack(finite).all(axis=0)
    place = jnp.argmax(bad)
    return Fault(
        step=jnp.where(bad.any(), start + 1 + place, 0),
        metrics={name: leaf[place] for name, leaf in metrics.items()},
    )
