"""Which exact form of the energy's gradient, penalty included, is cheapest?

  python benchmarks/gradient_penalty.py --config=configs/released_gaussians25.py
  python benchmarks/gradient_penalty.py --config=configs/photos32.py --repeats=15

With s = ∇_x log q(x_{t+1}|x_t) and v = ∇_x f + s, the parameter gradient of
γ·½‖v‖² − f is written in three ways, all exact:

  reverse over reverse  ∇_θ [γ·½‖∇_x f + s‖² − f]
  forward over reverse  γ·∂_ε ∇_θ f(θ, x + εv) at ε = 0, minus ∇_θ f; v is held fixed
  reverse over forward  ∇_θ [γ·⟨v, ∇_x f⟩ − f] with the product as a forward-mode jvp

Work is what is left of each form in the compiled program, as XLA counts it, which
computes once what a form writes down twice; beside it, what is written down.
"""

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from ml_collections import config_flags
from timing import counted_flops, counted_work, device_name, interleaved_seconds

from ddaebm_jax import diffusion, experiment, game, objective

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/released_gaussians25.py", "The recipe."
)
_BATCH = flags.DEFINE_integer("batch", None, "Default: the recipe's.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 201, "Calls timed.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    if _BATCH.value is not None:
        config.data.batch_size = _BATCH.value
    described = experiment.build(config, open_images=False)
    energy, gamma = described.networks.energy, config.game.gamma
    variables = experiment.init_state(described).variables.energy
    variables = jax.device_put(variables, jax.devices()[0])
    index = jnp.arange(config.data.batch_size, dtype=jnp.int32)
    step = jnp.zeros((), jnp.int32)
    keys = game.example_keys(jax.random.key(1), step, index)
    noise = game.draw_noise(
        jax.random.key(2),
        step,
        index,
        described.schedule.num_steps,
        described.networks.event_shape,
        described.networks.nz,
    )
    if described.source.holds_images:
        shape = (len(index), *described.source.event_shape)
        x0 = jax.random.uniform(jax.random.key(3), shape, minval=-1, maxval=1)
    else:
        x0 = described.source.draw(described.source.arrays, None, keys)
    x, x_next = diffusion.diffuse_pair(
        described.schedule, x0, noise.t, noise.eps_t, noise.eps_next
    )
    known = diffusion.score_log_q(described.schedule, x_next, x, noise.t)

    def f(params, points):
        return energy({"params": params}, points, noise.t, rngs=noise.dropout)

    def score(params):
        return objective.energy_and_score(lambda p: f(params, p), x)[1] + known

    def reverse_over_reverse(params):
        def loss(params):
            values, gradient = objective.energy_and_score(lambda p: f(params, p), x)
            penalty = objective.gradient_penalty(gradient + known).mean()
            return gamma * penalty - values.mean()

        return jax.grad(loss)(params)

    def forward_over_reverse(params):
        def mean_gradient(points):
            return jax.grad(lambda params: f(params, points).mean())(params)

        plain, along = jax.jvp(mean_gradient, (x,), (score(params),))
        return jax.tree.map(lambda p, a: gamma * a - p, plain, along)

    def reverse_over_forward(params):
        v = score(params)

        def loss(params):
            values, along = jax.jvp(lambda p: f(params, p), (x,), (v,))
            return gamma * along.mean() - values.mean()

        return jax.grad(loss)(params)

    forms = {
        "reverse over reverse": reverse_over_reverse,
        "forward over reverse": forward_over_reverse,
        "reverse over forward": reverse_over_forward,
    }
    params = variables["params"]
    traced = {name: jax.jit(form).trace(params) for name, form in forms.items()}
    compiled = {name: one.lower().compile() for name, one in traced.items()}
    wanted = compiled["reverse over reverse"](params)
    print(f"device {device_name()}, jax {jax.__version__}, batch {len(index)}")
    seconds = interleaved_seconds(
        {name: lambda run=run: run(params) for name, run in compiled.items()},
        _REPEATS.value,
    )
    base = seconds["reverse over reverse"]
    for name, run in compiled.items():
        gap = jax.tree.map(jnp.subtract, run(params), wanted)
        relative = optax.tree.norm(gap) / optax.tree.norm(wanted)
        print(
            f"{name}: {seconds[name] * 1e3:.3f} ms, {seconds[name] / base:.2f} of the "
            f"first, {counted_flops(run) / 1e6:.1f} MFLOP (written down: "
            f"{counted_work(traced[name].jaxpr) / 1e6:.1f}), relative difference "
            f"{relative:.1e}"
        )


if __name__ == "__main__":
    app.run(main)
