"""One training step of the image model against the authors' PyTorch code.

`data/reference_image_step.npz` holds weights, batch, noise and the results of their
code. No parameter has its initial value, so that no layer hides behind a zero.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from released import LETTERS, reference_config, state_dict

from ddaebm_jax import diffusion, experiment, interop, models, objective
from ddaebm_jax.game import Noise, Optimizers, TrainState
from ddaebm_jax.models import Players
from ddaebm_jax.step import make_step

CONFIG = reference_config()
SCHEDULE = diffusion.make_schedule(**CONFIG.diffusion)

# Takes no step, and keeps the gradient as its state.
RECORDER = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (
        jax.tree.map(jnp.zeros_like, grads),
        grads,
    ),
)


class Figures(NamedTuple):
    """Results of our code on the reference's weights and noise."""

    tensors: dict[str, np.ndarray]
    scalars: dict[str, float]
    gradients: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def reference(test_data: Path) -> dict[str, np.ndarray]:
    with np.load(test_data / "reference_image_step.npz") as arrays:
        return dict(arrays)


def part(reference: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays under a prefix."""
    return {
        key.removeprefix(prefix): value
        for key, value in reference.items()
        if key.startswith(prefix)
    }


def tensor(reference: dict[str, np.ndarray], name: str) -> np.ndarray:
    value = reference[f"tensor/{name}"]
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def noise_of(reference: dict[str, np.ndarray]) -> Noise:
    drawn = ("eps_t", "eps_next", "z", "eps_post", "eps_z")
    return Noise(
        t=jnp.asarray(tensor(reference, "t"), jnp.int32),
        **{name: jnp.asarray(tensor(reference, name)) for name in drawn},
        dropout=jax.random.split(jax.random.key(0), 3),
    )


def run_step(networks: models.Networks, state: Any, x0: jax.Array, noise: Any):
    """Return each network's outputs, the loss terms and gradients of one step."""
    optimizers = Optimizers(RECORDER, RECORDER)
    game = experiment.build_game(CONFIG.game, CONFIG.train.num_steps)
    step = make_step(game, SCHEDULE, networks, optimizers)
    after, metrics = step(state, x0, noise)

    v, t = state.variables, noise.t
    x_t, x_next = diffusion.diffuse_pair(SCHEDULE, x0, t, noise.eps_t, noise.eps_next)
    x0_pred = networks.generator(v.generator, x_next, t, noise.z)
    x_fake = diffusion.sample_posterior(SCHEDULE, x0_pred, x_next, t, noise.eps_post)
    mean, logvar = networks.posterior(v.posterior, x_t, x_next, t)
    mean_fake, logvar_fake = networks.posterior(v.posterior, x_fake, x_next, t)
    z = objective.sample_latent(mean, logvar, noise.eps_z)
    x0_posterior = networks.generator(v.generator, x_next, t, z)
    tensors = {
        "x_t": x_t,
        "x_next": x_next,
        "x0_pred": x0_pred,
        "x_fake": x_fake,
        "f_real": networks.energy(v.energy, x_t, t)[:, None],
        "f_fake": networks.energy(v.energy, x_fake, t)[:, None],
        "post_mean": mean,
        "post_logvar": logvar,
        "post_mean_fake": mean_fake,
        "post_logvar_fake": logvar_fake,
    }
    from_posterior = (SCHEDULE, x_t, x0_posterior, x_next, t)
    floor = objective.variance_floor(SCHEDULE, None)
    scalars = {
        "loss_energy": metrics["energy/loss"],
        "f_real": metrics["energy/real"],
        "f_fake": metrics["energy/fake"],
        "loss_gen": metrics["generator/loss"],
        "ef": -metrics["generator/reverse_potential"],
        "latent": game.lambda_z * metrics["generator/latent_log_prob"],
        "kld": metrics["generator/latent_kl"],
        "rec_mse_prior": metrics["generator/reconstruction"],
        "rec_mse_posterior": objective.reconstruction_mse(*from_posterior).mean(),
        "rec_nll": objective.reconstruction_nll(*from_posterior, floor).mean(),
        "rec_weighted_nll": objective.reconstruction_nll(
            *from_posterior, floor, SCHEDULE.recon_weight
        ).mean(),
        "grad_penalty": game.gamma * metrics["energy/gradient_penalty"],
    }
    gradients = Players(after.opt_energy, *after.opt_generator)
    return tensors, scalars, gradients


@pytest.fixture(scope="module")
def ours(reference: dict[str, np.ndarray]) -> Figures:
    networks = models.build(CONFIG.model, (32, 32, 3))
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    params = Players(*(one["params"] for one in shapes))
    names = interop.parameter_paths(CONFIG.model, 32, params)

    params = Players(
        *(
            interop.to_params(
                part(reference, f"{LETTERS[player]}/param/"),
                getattr(names, player),
                getattr(params, player),
                player,
            )
            for player in Players._fields
        )
    )
    weights = Players(*({"params": one} for one in params))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=weights,
        ema=weights,
        opt_energy=RECORDER.init(params.energy),
        opt_generator=RECORDER.init((params.generator, params.posterior)),
    )
    run = quick.jit(lambda *inputs: run_step(networks, *inputs))
    x0 = jnp.asarray(tensor(reference, "x0"))
    tensors, scalars, gradients = jax.device_get(run(state, x0, noise_of(reference)))
    by_name = {
        player: state_dict(getattr(names, player), getattr(gradients, player))
        for player in Players._fields
    }
    return Figures(tensors, scalars, by_name)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖actual − expected‖ / ‖expected‖."""
    assert actual.shape == expected.shape
    difference = np.asarray(actual, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def test_tensors(ours: Figures, reference: dict[str, np.ndarray]):
    inputs = {"x0", "t", "eps_t", "eps_next", "z", "eps_post", "eps_z"}
    assert ours.tensors.keys() == part(reference, "tensor/").keys() - inputs
    for name, actual in ours.tensors.items():
        expected = tensor(reference, name)
        assert distance(actual, expected) < 1e-4, name
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def test_scalars(ours: Figures, reference: dict[str, np.ndarray]):
    expected = part(reference, "scalar/")
    assert ours.scalars.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours.scalars[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("player", Players._fields)
def test_gradients(ours: Figures, reference: dict[str, np.ndarray], player: str):
    """Parameter by parameter."""
    letter, gradients = LETTERS[player], ours.gradients[player]
    expected = part(reference, f"{letter}/grad_norm/")
    assert gradients.keys() == expected.keys()
    for name, norm in expected.items():
        gradient = gradients[name].ravel()
        head = reference[f"{letter}/grad_head/{name}"]
        if name.endswith("NIN_1.b"):
            # The softmax is invariant to the keys' bias: only rounding is left.
            assert np.linalg.norm(gradient) < 1e-5, name
            continue
        np.testing.assert_allclose(
            np.linalg.norm(gradient), norm, rtol=1e-3, err_msg=name
        )
        assert distance(gradient[: len(head)], head) < 1e-3, name
