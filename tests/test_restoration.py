"""Restoration against NumPy, closed forms, and the posterior of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULE, STEPS, normals
from hypothesis import given
from hypothesis import strategies as st
from test_likelihood import NO_VARIABLES, experiment, gaussian_networks

from ddaebm_jax import reference, restoration
from ddaebm_jax.data import reference_fit
from ddaebm_jax.evaluation import reference_draws, restoring
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.restoration import BlockMean, Blur, Identity, Mask, Measurement

SHAPE = (4, 6, 2)
KERNEL = np.array([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], np.float32) / 16


def operators():
    known = np.random.default_rng(0).random((3, *SHAPE)) < 0.5
    return {
        "identity": (Identity(), lambda x: x),
        "mask": (Mask(jnp.asarray(known)), lambda x: np.where(known, x, 0.0)),
        "mean": (BlockMean(2), block_means),
        "blur": (Blur((0.25, 0.5, 0.25)), blurred),
    }


def block_means(x):
    out = np.zeros((len(x), 2, 3, 2))
    for i in range(2):
        for j in range(3):
            out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2))
    return out


def blurred(x):
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="symmetric")
    out = np.zeros_like(x)
    for i in range(4):
        for j in range(6):
            square = padded[:, i : i + 3, j : j + 3]
            out[:, i, j] = np.einsum("nijc,ij->nc", square, KERNEL)
    return out


@pytest.mark.parametrize("name", ["identity", "mask", "mean", "blur"])
def test_operators_and_their_adjoints(name: str):
    operator, expected = operators()[name]
    x = normals(1, 3, *SHAPE)
    seen = operator.apply(x)
    np.testing.assert_allclose(seen, expected(np.asarray(x)), rtol=1e-5, atol=1e-6)
    y = normals(2, *seen.shape)
    back = restoration.adjoint(operator, y, SHAPE)
    products = (seen * y).sum(axis=(1, 2, 3)), (x * back).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)
    again = operator.apply(restoration.adjoint(operator, y, SHAPE))
    gains = (again * y).sum(axis=(1, 2, 3)) / (y * y).sum(axis=(1, 2, 3))
    assert (gains <= operator.gain * (1 + 1e-5)).all()
    # So that examples can be repeated and taken.
    assert all(len(leaf) == 3 for leaf in jax.tree.leaves(operator))


@given(st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.sampled_from(["mask", "mean"]))
def test_guidance_is_the_conditional_mean(std: float, tau: float, name: str):
    """Of x_0 ~ N(x̂_0, τ² I) given y, by the normal equations."""
    operator, apply = operators()[name]
    prediction = np.asarray(normals(3, 3, *SHAPE))
    y = np.asarray(operator.apply(normals(4, 3, *SHAPE)))
    size = prediction[0].size
    basis = np.eye(size).reshape(size, 1, *SHAPE).repeat(3, axis=1)
    matrix = np.stack(
        [apply(b).reshape(3, -1) for b in basis], axis=2
    )  # [3, seen, size]
    precision = np.eye(size) / tau**2 + np.swapaxes(matrix, 1, 2) @ matrix / std**2
    right = prediction.reshape(3, -1) / tau**2
    right = right + np.einsum("nsd,ns->nd", matrix, y.reshape(3, -1)) / std**2
    expected = np.linalg.solve(precision, right[..., None])[..., 0]
    measurement = Measurement(operator, jnp.asarray(y), jnp.full(3, std))
    found = restoration.guided(measurement, jnp.asarray(prediction), tau**2)
    np.testing.assert_allclose(found.reshape(3, -1), expected, rtol=1e-3, atol=1e-4)


def known_gaussians(std: float = 0.5):
    """Measurements of N(0, I) in the plane, and the posterior's moments."""
    known = np.array([[True, True], [True, False], [False, False]])
    y = np.where(known, np.array([[1.0, -0.5], [0.8, 0.0], [0.0, 0.0]]), 0.0)
    measurement = Measurement(
        Mask(known), y.astype(np.float32), np.full(3, std, np.float32)
    )
    mean = np.where(known, y / (1 + std**2), 0.0)
    variance = np.where(known, std**2 / (1 + std**2), 1.0)
    return measurement, mean, variance


def close(draws: np.ndarray, mean: np.ndarray, variance: np.ndarray, count: float):
    """Whether moments are those expected, by as many independent draws."""
    error = np.sqrt(variance / count)
    assert (np.abs(draws.mean(axis=1) - mean) < 5 * error).all()
    ratio = draws.var(axis=1) / variance
    assert (np.abs(ratio - 1) < 5 * np.sqrt(2 / count)).all(), ratio


def test_noise_space_draws_from_the_posterior():
    exact = experiment(gaussian_networks())
    measurement, mean, variance = known_gaussians()
    search = restoring.Search(num_steps=10, num_moves=60)
    model = exact, NO_VARIABLES, measurement
    draws = restoring.noise_space(*model, 50, 0, search)
    assert draws.shape == (3, 1_500, 2)
    close(draws, mean, variance, count=400)


def posterior(operator, y, mean, covariance):
    """Mean and variances of x ~ N(mean, covariance) given y with noise of 0.3."""
    basis = jnp.eye(mean.size).reshape(-1, *SHAPE)
    matrix = np.asarray(operator.apply(basis)).reshape(mean.size, -1).T
    gain = covariance @ matrix.T
    gain = gain @ np.linalg.inv(matrix @ gain + 0.3**2 * np.eye(len(matrix)))
    residual = y.reshape(-1) - matrix @ mean.reshape(-1)
    found = mean.reshape(-1) + gain @ residual
    return found, np.diag(covariance - gain @ matrix @ covariance)


def one_gaussian(shape: tuple[int, ...]):
    """A reference of one Gaussian of full covariance, and variables that hold it."""
    rng, size = np.random.default_rng(0), int(np.prod(shape))
    found = reference.empty(2, shape)
    found.gaussians.log_weights[1] = 0.0
    found.gaussians.means[1] = rng.normal(size=size)
    found.gaussians.variances[1] = rng.uniform(0.1, 1.0, size)
    found.gaussians.axes[1] = np.linalg.qr(rng.normal(size=(size, size)))[0]
    variables = Players({"params": {}}, {"params": {}}, {"params": {}})
    return found, reference.with_fitted(variables, found)


@pytest.mark.parametrize("name", ["identity", "mask", "mean", "blur"])
def test_draws_of_the_reference_given_a_measurement(name: str):
    """One Gaussian of full covariance, by the normal equations."""
    operator, _ = operators()[name]
    (found, variables), num = one_gaussian(SHAPE), 4_000
    assert reference_draws.are_possible(variables)
    y = np.asarray(operator.apply(normals(4, 3, *SHAPE)))
    measurement = Measurement(operator, y, np.full(3, 0.3, np.float32))
    model = experiment(gaussian_networks()._replace(event_shape=SHAPE)), variables
    drawn = reference_draws.draws(*model, measurement, num, seed=0, kept=0.3)
    axes, variances = found.gaussians.axes[1], found.gaussians.variances[1]
    covariance = axes * (variances - 0.7 * reference_fit.ADDED_VARIANCE) @ axes.T
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], operator)
        expected = posterior(own, y[i], found.gaussians.means[1], covariance)
        close(drawn[i].reshape(1, num, -1), *expected, count=num)
        mean = drawn[i].mean(axis=0).ravel()
        np.testing.assert_allclose(mean, expected[0], atol=1e-5)


def test_two_models_share_the_draws():
    exact, (_, variables) = experiment(gaussian_networks()), one_gaussian((2,))
    model = exact, variables, known_gaussians()[0]
    search, error = restoring.Search(3, num_moves=4), np.full(2, 0.1, np.float32)
    mix = reference_draws.Mix(0.3)
    draws = reference_draws.averaged(*model, 5, 0, search, error, mix)
    first = restoring.noise_space(*model, 5, 0, search, error)
    second = reference_draws.draws(*model, 7, 0)
    assert draws.shape == first.shape == (3, 10, 2)
    of_first = (draws[:, :, None] == first[:, None]).all(axis=3).any(axis=2)
    of_second = (draws[:, :, None] == second[:, None]).all(axis=3).any(axis=2)
    assert (of_first.sum(axis=1) == 3).all() and (of_second.sum(axis=1) == 7).all()


@pytest.mark.parametrize("right", ["generator", "reference"])
def test_the_share_is_that_of_the_better_model(right: str):
    exact, (found, variables) = experiment(gaussian_networks()), one_gaussian((2,))
    x = np.asarray(normals(6, 100, 2))
    if right == "reference":
        _, means, variances, axes = (leaf[1] for leaf in found.gaussians)
        x = means + (np.sqrt(variances) * x) @ axes.T
    model = exact, variables, known_gaussians()[0]
    found = reference_draws.best_mix(*model, x, 0, restoring.Search(5, num_moves=10))
    right_share = found.generator if right == "generator" else 1 - found.generator
    assert right_share > 0.7, found


@pytest.mark.parametrize("kept", [0.1, 1.0])
def test_as_much_added_variance_is_kept_as_the_data_have(kept: float):
    exact, (found, _) = experiment(gaussian_networks()), one_gaussian((2,))
    added = reference_fit.ADDED_VARIANCE
    found.gaussians.variances[1] = added, 1.0
    variables = reference.with_fitted(Players({"params": {}}, *2 * [{}]), found)
    _, means, variances, axes = (leaf[1] for leaf in found.gaussians)
    x = np.asarray(normals(6, 500, 2))
    x = means + (np.sqrt(variances - (1 - kept) * added) * x) @ axes.T
    y, std = np.zeros((1, 2), np.float32), np.full(1, 0.1, np.float32)
    model = exact, variables, Measurement(Identity(), y, std)
    found = reference_draws.best_mix(*model, x, 0, restoring.Search(5, num_moves=10))
    assert found.kept == kept, found


def test_what_is_known_without_noise_is_kept():
    """Of a mask, by all ways and by the generator's error; the rest is drawn."""
    measurement, _, _ = known_gaussians(std=1e-3)
    known, y = measurement.operator.known, measurement.y
    exact, (_, variables) = experiment(gaussian_networks()), one_gaussian((2,))
    first = reference_draws.draws(exact, variables, measurement, 20, 0)
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, 20, axis=0), measurement)
    noise = [normals(seed, 60, 2) for seed in (6, 7, 8)]
    second = restoration.with_error(rows, noise[0], jnp.full(2, 0.3), *noise[1:])
    model = exact, variables, measurement
    search = restoring.Search(num_moves=20)
    third = restoring.noise_space(*model, 20, 0, search)
    fourth = restoring.particles(*model, 4_000, 0, weighted=False).x
    for draws in (first, np.asarray(second).reshape(3, 20, 2), third, fourth):
        error = np.abs(draws - y[:, None]).max(axis=1)
        assert (error[known] < 0.05).all(), error
        assert (draws.std(axis=1)[~known] > 0.1).all()


@pytest.mark.parametrize("name", ["identity", "mask", "mean", "blur"])
def test_the_generators_error_given_a_measurement(name: str):
    """Of x_0 ~ N(x̂_0, diag τ²) given y, by the normal equations; τ of each pixel."""
    operator, _ = operators()[name]
    prediction, num = np.asarray(normals(3, 1, *SHAPE)), 4_000
    tau = np.asarray(jnp.exp(0.5 * normals(6, *SHAPE)))
    if name == "mask":
        operator = Mask(operator.known[:1])
    y = np.asarray(operator.apply(normals(4, 1, *SHAPE)))
    covariance = np.diag(tau.reshape(-1) ** 2)
    mean, variance = posterior(operator, y, prediction, covariance)
    seen = np.repeat(y, num, axis=0)
    measurement = Measurement(operator, jnp.asarray(seen), jnp.full(num, 0.3))
    draws = restoration.with_error(
        measurement,
        jnp.repeat(prediction, num, axis=0),
        jnp.asarray(tau),
        normals(7, num, *SHAPE),
        normals(8, *seen.shape),
    )
    draws = np.asarray(draws).reshape(1, num, -1)
    close(draws, mean, variance, count=num)


def test_the_generators_error_is_fitted_towards_the_truth():
    """Of x ~ N(0, 1 + 0.8²) under a generator of N(0, I); the fit starts at 0.3."""
    x = np.sqrt(1.0 + 0.8**2) * np.asarray(normals(5, 500, 2))
    search = restoring.Search(num_steps=10, num_moves=30)
    model = experiment(gaussian_networks()), NO_VARIABLES, x
    found = restoring.generator_error(*model, 0, search)
    assert (found > 0.4).all() and (found < 0.85).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_particles_draw_from_the_posterior(weighted: bool):
    exact = experiment(gaussian_networks())
    measurement, mean, variance = known_gaussians()
    found = restoring.particles(exact, NO_VARIABLES, measurement, 2_000, 0, weighted)
    assert (found.effective > 0.05).all()
    close(found.x, mean, variance, count=300)


SIDE, SPREAD = np.array([-1.4, -0.7, 0.0, 0.7, 1.4]), 0.1
CENTRES = np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(25, 2)


def grid_networks() -> Networks:
    """The exact generator of 25 Gaussians: z chooses one given x_{t+1}, and a point."""

    def generator(variables, x_next, t, z, rngs=None):
        a, s = (v[t + 1][:, None] for v in (SCHEDULE.a_cum, SCHEDULE.sigma_cum))
        variance = (a * SPREAD) ** 2 + s**2
        centres = jnp.asarray(CENTRES, jnp.float32)
        away = x_next[:, None] - a[:, None] * centres[None]
        below = jnp.cumsum(jax.nn.softmax(-0.5 * (away**2).sum(2) / variance), axis=1)
        uniform = jax.scipy.stats.norm.cdf(z[:, :1]) * below[:, -1:]
        k = jnp.minimum((below < uniform).sum(axis=1), 24)
        gain = a * SPREAD**2 / variance
        moved = gain * (x_next - a * centres[k])
        return centres[k] + moved + SPREAD * s / jnp.sqrt(variance) * z[:, 1:]

    return gaussian_networks()._replace(generator=generator, nz=3)


def test_particles_draw_from_the_posterior_of_25_gaussians():
    """Against quadrature over the plane."""
    known = np.array([[True, False], [True, True], [False, True]])
    y = np.where(known, [[0.3, 0.0], [-1.1, 0.5], [0.0, 1.0]], 0.0).astype(np.float32)
    std = np.array([0.3, 0.5, 0.2], np.float32)
    measurement = Measurement(Mask(known), y, std)
    exact = experiment(grid_networks())
    found = restoring.particles(exact, NO_VARIABLES, measurement, 4_000, 0, False)
    line = np.linspace(-2.5, 2.5, 501)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    parts = np.exp(-0.5 * ((grid[:, None] - CENTRES) / SPREAD) ** 2).prod(axis=2)
    for seen, value, sigma, drawn in zip(known, y, std, found.x, strict=True):
        likelihood = np.exp(-0.5 * (((grid - value) / sigma) ** 2 * seen).sum(axis=1))
        p = parts.sum(axis=1) * likelihood
        p = p / p.sum()
        mean = p @ grid
        variance = p @ (grid - mean) ** 2
        close(drawn[None], mean[None], variance[None], count=400)
        # Of modes, too: a mean does not tell five of them from one.
        nearest = ((drawn[:, None] - CENTRES) ** 2).sum(axis=2).argmin(axis=1)
        shares = np.bincount(nearest, minlength=25) / len(drawn)
        expected = np.bincount(
            ((grid[:, None] - CENTRES) ** 2).sum(axis=2).argmin(axis=1), p, 25
        )
        np.testing.assert_allclose(shares, expected, atol=0.03)


def test_without_a_latent_z_is_zero():
    networks = gaussian_networks()

    def generator(variables, x_next, t, z, rngs=None):
        found = networks.generator(variables, x_next, t, z)
        return jnp.where((z == 0).all(), found, jnp.nan)

    exact = experiment(networks._replace(generator=generator))
    game = exact.game._replace(latent=False)
    game = game._replace(proposal=game.proposal._replace(latent=False))
    model = exact._replace(game=game), NO_VARIABLES, known_gaussians()[0]
    found = restoring.particles(*model, 8, 0, False).x, restoring.direct(*model, 8, 0)
    found += (restoring.noise_space(*model, 8, 0, restoring.Search(3, num_moves=2)),)
    assert all(np.isfinite(draws).all() for draws in found)


def test_energies_correct_a_wrong_generator():
    """The prior is then exp f(·, 0), whatever is drawn."""
    wrong = experiment(gaussian_networks(shift=0.15, spread=1.1), defensive=0.1)
    measurement, mean, variance = known_gaussians()
    model = wrong, NO_VARIABLES, measurement
    found = restoring.particles(*model, 10_000, 0, weighted=True)
    close(found.x, mean, variance, count=500)
    plain = restoring.particles(*model, 2_000, 0, weighted=False)
    assert (plain.x[2].mean(axis=0) > 0.15).all()


def test_direct_denoising_of_gaussians():
    """From the level whose noise is that of y: one draw of p(x_0 | x_t = A_t y)."""
    exact = experiment(gaussian_networks())
    level = 2
    std = float(SCHEDULE.sigma_cum[level] / SCHEDULE.a_cum[level])
    y = np.array([[0.4, -1.0]], np.float32)
    measurement = Measurement(Identity(), y, np.full(1, std, np.float32))
    draws = restoring.direct(exact, NO_VARIABLES, measurement, 2_000, 0)
    close(draws, y / (1 + std**2), np.full((1, 2), std**2 / (1 + std**2)), 1_000)


def test_the_level_to_enter():
    ratios = np.asarray(SCHEDULE.sigma_cum / SCHEDULE.a_cum).tolist()
    for level in range(1, STEPS + 1):
        assert restoration.entry_level(SCHEDULE, 0.99 * ratios[level]) == level
    assert restoration.entry_level(SCHEDULE, 2 * ratios[-1]) == STEPS
    assert restoration.entry_level(SCHEDULE, 0.0) == 1


def test_seeds_repeat_and_devices_agree():
    measurement, _, _ = known_gaussians()
    found, (_, variables) = [], one_gaussian((2,))
    for num_devices in (1, 8):
        exact = experiment(gaussian_networks())
        exact.config.parallel.num_devices = num_devices
        model = exact, variables, measurement
        search = restoring.Search(3, num_moves=2)
        tau = np.full(2, 0.1, np.float32)
        how = search, tau, reference_draws.Mix()
        found.append(
            (
                restoring.particles(*model, 8, 0, True).x,
                restoring.noise_space(*model, 8, 0, search, tau),
                restoring.direct(*model, 8, 0),
                reference_draws.averaged(*model, 8, 0, *how),
            )
        )
    for one, eight in zip(*found, strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-5)
    other = reference_draws.averaged(*model, 8, 1, *how)
    assert (np.abs(other - found[1][3]) > 1e-3).mean() > 0.9


@given(st.floats(0.1, 3.0), st.integers(2, 12))
def test_gaussian_line(std: float, side: int):
    line = restoration.gaussian_line(std, side)
    assert sum(line) == pytest.approx(1.0, rel=1e-5) and line == line[::-1]
    assert len(line) % 2 == 1 and len(line) < 2 * side
    centre = len(line) // 2
    ratio = line[centre - 1] / line[centre]
    assert ratio == pytest.approx(np.exp(-0.5 / std**2), rel=1e-4)
