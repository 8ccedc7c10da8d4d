"""Two calls of one network, against one call on both inputs together.

  python benchmarks/fused_passes.py --config=configs/photos32.py
  python benchmarks/fused_passes.py --config=configs/cifar10.py --batch=64 \
      --dtype=bfloat16

In a step each network is called twice on B examples. As one call on 2B:

  generator  from the prior and from the posterior z; gradient in φ
  posterior  q of (x_t, x_{t+1}) and of (x̃_t, x_{t+1}); gradient in ψ and x̃_t
  energy     f of x̃_t and of x_t; the energy's loss, with the penalty at x_t; gradient
             in θ. In one call the score is taken for the real half only, yet what
             computes it, and all that differentiates it, runs over both halves.

The first two exclude each other: the posterior's z needs q of (x_t, x_{t+1}) first,
while x̃_t needs the generator's call on the prior z. Both exist only for a recipe with
game.recon_latent=posterior; with `prior` there is no second call of the generator.

Weights and inputs are random; the two forms take turns, and their times are medians.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from timing import counted_work, device_name, interleaved_seconds

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, objective
from ddaebm_jax.models import Networks

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/photos32.py", "The recipe; networks without batch norm only."
)
_BATCH = flags.DEFINE_integer("batch", None, "B; default: the recipe's.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Calls timed.", lower_bound=1)

# A case's two forms, each from what `_draws` returns to gradients.
Forms = tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any]]


def _both(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _generator(networks: Networks) -> Forms:
    def passes(draws):
        names = ("x_next", "t", "z", "keys", "towards")
        second = [draws.get(f"{name}_2", draws[name]) for name in names]
        return [draws[name] for name in names], second

    def call(variables, x_next, t, z, keys, towards):
        x0, _ = networks.train_generator(variables, x_next, t, z, rngs=keys)
        return (x0 * towards).sum()

    def two(draws):
        def loss(variables):
            return sum(call(variables, *one) for one in passes(draws))

        return jax.grad(loss)(draws["variables"].generator)

    def one(draws):
        def loss(variables):
            return call(variables, *_both(*passes(draws)))

        return jax.grad(loss)(draws["variables"].generator)

    return two, one


def _posterior(networks: Networks) -> Forms:
    def loss(draws, of_real, of_fake):
        latent = objective.latent_log_prob(draws["z"], *of_fake)
        return (latent + objective.latent_kl(*of_real)).mean()

    def two(draws):
        rest = draws["x_next"], draws["t"]

        def separate(variables, fake):
            of_real, _ = networks.train_posterior(variables, draws["x"], *rest)
            of_fake, _ = networks.train_posterior(variables, fake, *rest)
            return loss(draws, of_real, of_fake)

        variables = draws["variables"].posterior
        return jax.grad(separate, argnums=(0, 1))(variables, draws["fake"])

    def one(draws):
        rest = draws["x_next"], draws["t"]

        def together(variables, fake):
            inputs = _both((draws["x"], *rest), (fake, *rest))
            moments, _ = networks.train_posterior(variables, *inputs)
            halves = zip(*(jnp.split(moment, 2) for moment in moments), strict=True)
            return loss(draws, *halves)

        variables = draws["variables"].posterior
        return jax.grad(together, argnums=(0, 1))(variables, draws["fake"])

    return two, one


def _energy(networks: Networks, gamma: float) -> Forms:
    def loss(draws, f_real, f_fake, score):
        penalty = objective.gradient_penalty(score + draws["known"])
        return (f_fake - f_real + gamma * penalty).mean()

    def two(draws):
        t = draws["t"]

        def separate(variables):
            f_fake = networks.energy(variables, draws["fake"], t, rngs=draws["keys"])
            f_real, score = objective.energy_and_score(
                lambda x: networks.energy(variables, x, t, rngs=draws["keys_2"]),
                draws["x"],
            )
            return loss(draws, f_real, f_fake, score)

        return jax.grad(separate)(draws["variables"].energy)

    def one(draws):
        real, fake = draws["x"], draws["fake"]
        t, keys = _both((draws["t"], draws["keys_2"]), (draws["t"], draws["keys"]))

        def together(variables):
            f, pull_back = jax.vjp(
                lambda x: networks.energy(variables, _both(x, fake), t, rngs=keys), real
            )
            (score,) = pull_back((jnp.arange(len(f)) < len(real)).astype(f.dtype))
            return loss(draws, *jnp.split(f, 2), score)

        return jax.grad(together)(draws["variables"].energy)

    return two, one


def _draws(described: experiment.Experiment, batch: int) -> dict[str, Any]:
    networks, key = described.networks, jax.random.key(0)
    shapes = {
        **dict.fromkeys(("x", "x_next", "fake", "known"), networks.event_shape),
        **dict.fromkeys(("towards", "towards_2"), networks.event_shape),
        **dict.fromkeys(("z", "z_2"), (networks.nz,)),
    }
    draws: dict[str, Any] = {
        name: jax.random.normal(jax.random.fold_in(key, i), (batch, *shape))
        for i, (name, shape) in enumerate(shapes.items())
    }
    for i, name in enumerate(("keys", "keys_2")):
        draws[name] = jax.random.split(jax.random.fold_in(key, 100 + i), batch)
    draws["t"] = jnp.arange(batch, dtype=jnp.int32) % described.schedule.num_steps
    draws["variables"] = _spread(experiment.init_state(described).variables)
    return draws


def _spread(variables: Any) -> Any:
    """Moves weights off their start, where some are zero and gradients vanish."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten(
        [
            leaf + 0.02 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
    )


def _gap(found: Any, wanted: Any) -> float:
    """Returns the norm of the difference of two trees over that of the second."""

    def norm(tree):
        return sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(tree)) ** 0.5

    return norm(jax.tree.map(jnp.subtract, found, wanted)) / norm(wanted)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    if _BATCH.value is not None:
        config.data.batch_size = _BATCH.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    described = experiment.build(config, open_images=False)
    networks, batch = described.networks, config.data.batch_size
    draws = _draws(described, batch)
    if jax.tree.leaves(draws["variables"].generator.get("batch_stats", {})):
        raise app.UsageError("with batch norm one call is not the same as two")
    cases = {"generator": _generator(networks)}
    if described.game.has_encoder:
        cases["posterior"] = _posterior(networks)
    cases["energy"] = _energy(networks, config.game.gamma)
    print(
        f"{device_name()}, jax {jax.__version__}, {config.model.dtype}, B = {batch}, "
        f"{_REPEATS.value} calls of each"
    )
    print(
        f"{'network':<10} {'two calls':>12} {'one call':>12} {'ratio':>7} "
        f"{'work of two':>13} {'of one':>13} {'gap':>9}"
    )
    for name, forms in cases.items():
        traced = [jax.jit(form).trace(draws) for form in forms]
        work = [counted_work(one.jaxpr) for one in traced]
        two, one = (each.lower().compile() for each in traced)
        gap = _gap(one(draws), two(draws))
        seconds = interleaved_seconds(
            {"two": lambda two=two: two(draws), "one": lambda one=one: one(draws)},
            _REPEATS.value,
        )
        print(
            f"{name:<10} "
            f"{seconds['two'] * 1e3:>9.2f} ms {seconds['one'] * 1e3:>9.2f} ms "
            f"{seconds['one'] / seconds['two']:>7.3f} "
            f"{work[0] / 1e9:>7.2f} GFLOP {work[1] / 1e9:>7.2f} GFLOP {gap:>9.1e}"
        )


if __name__ == "__main__":
    app.run(main)
