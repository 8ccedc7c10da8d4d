"""Noise of the images' own colour, against NumPy and SciPy, and in a run."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from helpers import SCHEDULE, assert_trees_close, normals, smooth_networks
from runs import small_images, train
from scipy import fft, stats
from test_train import folder

from ddaebm_jax import api, colour, diffusion
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference, likelihood
from ddaebm_jax.training.trained_run import load_run

__all__ = ["folder"]
SHAPE = (4, 6, 2)
STD = colour.fit(np.random.default_rng(0).normal(size=(50, *SHAPE)).cumsum(axis=2))
T = jnp.array([0, 1, 2, 3])


def matrix() -> np.ndarray:
    """Return L, of a flattened image."""
    size = int(np.prod(SHAPE))
    columns = colour.coloured(STD, jnp.eye(size).reshape(size, *SHAPE))
    return np.asarray(columns, np.float64).reshape(size, size).T


def test_the_map_scales_the_coefficients_of_scipys_transform():
    x = normals(0, 3, *SHAPE)
    u = colour.whitened(STD, x)
    expected = fft.dctn(np.asarray(x), axes=(1, 2), norm="ortho") / STD[..., None]
    found = fft.dctn(np.asarray(u), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(colour.coloured(STD, u), x, atol=1e-5)
    log_det = -np.linalg.slogdet(matrix())[1]
    assert colour.log_det(STD, SHAPE[-1]) == pytest.approx(log_det, abs=1e-4)
    assert (STD**2).mean() == pytest.approx(1.0)


def test_the_power_of_images_is_found_by_radius():
    true = 1.0 / (1.0 + np.hypot(*np.indices((8, 8))).round())
    white = np.random.default_rng(0).normal(size=(4_000, 8, 8, 1))
    images = 0.3 + np.asarray(colour.coloured(true, jnp.asarray(white)))
    power = true**2 + 0.01 * (true**2).mean()
    expected = np.sqrt(power / power.mean())
    np.testing.assert_allclose(colour.fit(images), expected, rtol=0.03)
    flat = colour.fit(np.zeros((3, 4, 4, 1)))
    np.testing.assert_allclose(flat, 1.0)


def test_forward_process_posterior_and_log_q_have_the_colour():
    """x = L u: noise of covariance β L Lᵀ, on means that are linear in x."""
    x0, x_t, x_next = (normals(i, len(T), *SHAPE) for i in range(3))
    of_u = [colour.whitened(STD, x) for x in (x0, x_t, x_next)]
    lower = matrix()
    covariance = lower @ lower.T
    found = diffusion.log_q(SCHEDULE, of_u[2], of_u[1], T)
    for i, t in enumerate(np.asarray(T)):
        beta, a = float(SCHEDULE.beta[t + 1]), float(SCHEDULE.a[t + 1])
        expected = stats.multivariate_normal.logpdf(
            np.ravel(x_next[i]), a * np.ravel(x_t[i]), beta * covariance
        )
        own = float(found[i]) + colour.log_det(STD, SHAPE[-1])
        assert own == pytest.approx(expected, rel=1e-4)
    means = diffusion.posterior_mean(SCHEDULE, of_u[0], of_u[2], T)
    expected = diffusion.posterior_mean(SCHEDULE, x0, x_next, T)
    np.testing.assert_allclose(colour.coloured(STD, means), expected, atol=1e-4)

    eps = normals(5, 20_000, *SHAPE)
    times, start = jnp.full(len(eps), 2), jnp.broadcast_to(of_u[0][:1], eps.shape)
    drawn = colour.coloured(STD, diffusion.diffuse(SCHEDULE, start, times, eps))
    rows = np.asarray(drawn).reshape(len(eps), -1)
    spread = np.cov(rows.T) / float(SCHEDULE.sigma_cum[2]) ** 2
    np.testing.assert_allclose(spread, covariance, atol=0.06 * covariance.max())


def test_networks_see_images_and_white_noise_changes_nothing():
    """What they make of u is what they make of x = L u."""

    def halves(x, y):
        return (x - y).mean(axis=(2, 3)), (x + y).mean(axis=(2, 3))

    networks = smooth_networks()
    assert colour.with_colour(networks, None) is networks
    networks = networks._replace(
        energy=lambda v, x, t, rngs=None: (v * x**2).sum(axis=(1, 2, 3)) + t,
        generator=lambda v, x, t, z, rngs=None: v * x**2 + z,
        train_generator=lambda v, x, t, z, rngs=None: (v * x + z, {"seen": x}),
        posterior=lambda v, x, y, t: halves(v * x, y),
        train_posterior=lambda v, x, y, t: (halves(x, v * y), {"seen": x}),
    )
    u, other, z = (normals(i, len(T), *SHAPE) for i in range(3))
    v, size = 1.7, int(np.prod(SHAPE))
    for std in (STD, np.ones_like(STD)):
        lower = matrix() if std is STD else np.eye(size)

        def of(x, lower=lower):
            return jnp.asarray((x.reshape(-1, size) @ lower.T).reshape(x.shape))

        found = colour.with_colour(networks, std)
        x, x_other = of(u), of(other)
        near = partial(assert_trees_close, rtol=1e-4, atol=1e-4)
        near(found.energy(v, u, T), networks.energy(v, x, T))
        near(of(found.generator(v, u, T, z)), networks.generator(v, x, T, z))
        x0, stats = found.train_generator(v, u, T, z)
        near((of(x0), stats), networks.train_generator(v, x, T, z))
        inputs, seen = (v, u, other, T), (v, x, x_other, T)
        near(found.posterior(*inputs), networks.posterior(*seen))
        near(found.train_posterior(*inputs), networks.train_posterior(*seen))


def test_a_run_with_coloured_noise(folder: Path, tmp_path: Path):
    config = small_images(folder, data__whiten=True)
    train(config, tmp_path / "run")
    with quick.compilation():
        run = load_run(tmp_path / "run")  # Without the images.
        source = run.experiment.source
        assert source.image_set is None and source.colour.shape == (8, 8)
        opened = load_run(tmp_path / "run", open_images=True).experiment.source
        seen = colour.coloured(source.colour, opened.some_training_images())
        expected = colour.fit(np.asarray(seen))
        np.testing.assert_allclose(source.colour, expected, rtol=1e-4)

        model = api.load(tmp_path / "run")
        pixels = model.sample(5)
        assert pixels.dtype == np.uint8 and pixels.shape == (5, 8, 8, 1)
        floats = pixels / np.float32(127.5) - 1
        energies = inference.energies(run.experiment, run.variables, pixels)
        np.testing.assert_allclose(model.energy(floats), energies, rtol=1e-5)
        pure = jax.jit(jax.vmap(model.log_density))(floats)
        np.testing.assert_allclose(pure, energies, rtol=1e-4)
        back = source.to_own_units(source.from_own_units(pixels))
        np.testing.assert_array_equal(back, pixels)
        rows = likelihood.training_rows(opened, 20)
        bound = likelihood.generator_bound(run.experiment, run.variables, rows, rows, 2)
        assert np.isfinite(bound).all()

    (tmp_path / "run" / "colour.npz").unlink()
    with pytest.raises(InputError, match="does not hold the colour"):
        load_run(tmp_path / "run")
