"""Which exact form of the energy's gradient, penalty included, is cheapest?

  python benchmarks/gradient_penalty.py --config=configs/released_gaussians25.py

With s = ∇_x log q(x_{t+1}|x_t) and v = ∇_x f + s, the parameter gradient of
γ·½‖v‖² − f is written in three ways, all exact:

  reverse over reverse  ∇_θ [γ·½‖∇_x f + s‖² − f]
  forward over reverse  γ·∂_ε ∇_θ f(θ, x + εv) at ε = 0, minus ∇_θ f; v is held fixed
  reverse over forward  ∇_θ [γ·⟨v, ∇_x f⟩ − f] with the product as a forward-mode jvp
"""

import jax
import jax.numpy as jnp
from absl import app
from ml_collections import config_flags
from timing import counted_flops, device_name, median_seconds

from ddaebm_jax import diffusion, minimax, objective, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/released_gaussians25.py", "The recipe."
)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    experiment = train.build(config)
    energy, gamma = experiment.networks.energy, config.game.gamma
    variables = train.init_state(experiment).variables.energy
    index = jnp.arange(config.data.batch_size, dtype=jnp.int32)
    step = jnp.zeros((), jnp.int32)
    keys = minimax.example_keys(jax.random.key(1), step, index)
    noise = minimax.draw_noise(
        jax.random.key(2),
        step,
        index,
        experiment.schedule.num_steps,
        experiment.networks.event_shape,
        experiment.networks.nz,
    )
    x0 = experiment.source.draw(experiment.source.arrays, keys)
    x, x_next = diffusion.diffuse_pair(
        experiment.schedule, x0, noise.t, noise.eps_t, noise.eps_next
    )
    known = diffusion.score_log_q(experiment.schedule, x_next, x, noise.t)

    def f(params, points):
        return energy({"params": params}, points, noise.t)

    def score(params):
        return objective.energy_and_score(lambda p: f(params, p), x)[1] + known

    def reverse_over_reverse(params):
        def loss(params):
            values, gradient = objective.energy_and_score(lambda p: f(params, p), x)
            penalty = objective.gradient_penalty(gradient + known)
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
    compiled = {
        name: jax.jit(form).lower(params).compile() for name, form in forms.items()
    }
    wanted = compiled["reverse over reverse"](params)
    print(f"device {device_name()}, jax {jax.__version__}, batch {len(index)}")
    base = None
    for name, run in compiled.items():
        gaps = jax.tree.map(
            lambda a, b: jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-12),
            run(params),
            wanted,
        )
        seconds = median_seconds(lambda run=run: run(params), 201)
        base = base or seconds
        print(
            f"{name}: {seconds * 1e3:.3f} ms, {seconds / base:.2f} of the first, "
            f"{counted_flops(run) / 1e6:.1f} MFLOP, "
            f"relative difference {max(map(float, jax.tree.leaves(gaps))):.1e}"
        )


if __name__ == "__main__":
    app.run(main)
