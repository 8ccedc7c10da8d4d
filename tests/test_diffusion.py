"""The diffusion against Bayes' rule, integrals, and the authors' numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULE, normals
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ddaebm_jax import config as config_lib
from ddaebm_jax import diffusion, levels

num_steps = st.integers(1, 8)
beta_min = st.floats(0.01, 1.0)
beta_max = st.floats(2.0, 25.0)
standardised = st.floats(-3.0, 3.0)


@st.composite
def schedules(draw) -> diffusion.Schedule:
    """Draw any schedule of `make_schedule`."""
    variance = draw(st.sampled_from(diffusion.VARIANCES))
    time = draw(st.sampled_from(diffusion.TIMES))
    steps = draw(st.integers(2 if time == "lsun" else 1, 8))
    low, high = draw(beta_min), draw(beta_max)
    if variance == "geometric":
        low, high = low / 20, high / 26
    return diffusion.make_schedule(
        steps, variance, low, high, time, min_posterior_var=1e-4
    )


def as_float64(schedule: diffusion.Schedule) -> diffusion.Schedule:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), schedule)


def vp_level(tau: float, low: float, high: float) -> tuple[float, float]:
    """Return (A, S) at time τ by integrating dx = −½β x dt + √β dW numerically."""
    total, _ = integrate.quad(lambda s: low + s * (high - low), 0.0, tau)
    return np.exp(-0.5 * total), np.sqrt(-np.expm1(-total))


# Properties of every schedule.


@given(schedules())
def test_levels_compose(schedule: diffusion.Schedule):
    s = as_float64(schedule)
    a, beta = s.a, s.beta
    np.testing.assert_allclose(a**2 + beta, 1.0, rtol=1e-6)
    np.testing.assert_allclose(s.sigma**2, beta, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(s.a_cum**2 + s.sigma_cum**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(s.a_cum[0], a[0], rtol=1e-6)
    np.testing.assert_allclose(s.a_cum[1:], a[1:] * s.a_cum[:-1], rtol=1e-6)
    noise = a[1:] ** 2 * s.sigma_cum[:-1] ** 2 + beta[1:]
    np.testing.assert_allclose(s.sigma_cum[1:] ** 2, noise, rtol=1e-6)
    assert (beta[1:] > 0).all() and (np.diff(s.sigma_cum) > 0).all()
    assert schedule.num_steps == len(s.posterior_c1) == len(s.beta) - 1


@given(schedules())
def test_posterior_averages_to_the_marginal(schedule: diffusion.Schedule):
    """x_t drawn through x_{t+1} has the law of x_t drawn from x_0."""
    s = as_float64(schedule)
    mean = s.posterior_c1 + s.posterior_c2 * s.a_cum[1:]
    var = s.posterior_c2**2 * s.sigma_cum[1:] ** 2 + s.posterior_var
    np.testing.assert_allclose(mean, s.a_cum[:-1], rtol=1e-5)
    np.testing.assert_allclose(var, s.sigma_cum[:-1] ** 2, rtol=1e-5, atol=1e-12)


@given(schedules())
def test_log_variance_is_clipped(schedule: diffusion.Schedule):
    s = as_float64(schedule)
    clipped = np.log(np.maximum(s.posterior_var, 1e-4))
    np.testing.assert_allclose(s.posterior_log_var, clipped, rtol=1e-5, atol=1e-6)


@given(num_steps, beta_min, beta_max, standardised, standardised, standardised)
def test_posterior_is_bayes_rule(steps, low, high, x0, u, w):
    """c1, c2 and s² against Bayes' rule, integrated on a grid in one dimension."""
    schedule = diffusion.make_schedule(steps, beta_min=low, beta_max=high, max_beta=1.0)
    s = as_float64(schedule)
    tau = 1e-3 + (1 - 1e-3) * np.arange(steps + 1) / steps
    levels = [vp_level(x, low, high) for x in tau]
    for t in range(steps):
        (a_now, s_now), (a_next, _) = levels[t], levels[t + 1]
        a = a_next / a_now
        sigma = np.sqrt(1 - a**2)
        x_next = a * (a_now * x0 + s_now * u) + sigma * w
        x = a_now * x0 + s_now * np.linspace(-14.0, 14.0, 20_001)
        log_joint = stats.norm.logpdf(x, a_now * x0, s_now) + stats.norm.logpdf(
            x_next, a * x, sigma
        )
        mass = np.exp(log_joint - log_joint.max())
        mass /= mass.sum()
        mean = (mass * x).sum()
        var = (mass * (x - mean) ** 2).sum()
        ours = s.posterior_c1[t] * x0 + s.posterior_c2[t] * x_next
        np.testing.assert_allclose(ours, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(s.posterior_var[t], var, rtol=1e-5)


@given(num_steps, st.floats(0.01, 0.5))
def test_kept_scale_is_that_of_larger_data(steps, eps):
    """x_0 is the data plus noise; from there on, levels are those of data / A_0."""
    values = [diffusion.schedule_values(steps, time_eps=eps, keep_scale=False)]
    values += [diffusion.schedule_values(steps, time_eps=eps, keep_scale=True)]
    shrinking, kept = values
    share = shrinking["a_cum"][0]
    assert kept["a_cum"][0] == pytest.approx(1.0) and share < 1.0
    for name, plain in shrinking.items():
        factor = share if name in ("a_cum", "posterior_c1") else 1.0
        np.testing.assert_allclose(kept[name] * factor, plain, rtol=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.4, 0.9])
def test_noise_of_level_0_can_be_chosen(std):
    process = config_lib.base().diffusion
    process.time_eps = diffusion.time_of_noise(std, process)
    found = diffusion.schedule_values(**process)["sigma_cum"][0]
    assert found == pytest.approx(std, rel=1e-3)


# Variances and times.


@given(num_steps, beta_min, beta_max)
def test_vp_variance_integrates_beta(steps, low, high):
    s = as_float64(
        diffusion.make_schedule(steps, beta_min=low, beta_max=high, max_beta=1.0)
    )
    tau = diffusion.diffusion_times(steps)
    levels = np.array([vp_level(x, low, high) for x in tau])
    np.testing.assert_allclose(s.a_cum, levels[:, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(s.sigma_cum, levels[:, 1], rtol=1e-5)


@given(st.floats(1e-3, 0.1), st.floats(0.2, 0.99), st.floats(0.0, 1.0))
def test_geometric_variance_is_linear_in_its_log(low, high, tau):
    v = diffusion.marginal_variance(np.array([0.0, tau, 1.0]), "geometric", low, high)
    line = (1 - tau) * np.log(low) + tau * np.log(high)
    np.testing.assert_allclose(np.log(v), [np.log(low), line, np.log(high)])


def test_cosine_variance():
    tau = np.array([0.0, 0.25, 0.5, 1.0])
    v = diffusion.marginal_variance(tau, "cosine", 0.1, 20.0)
    ratio = [np.cos((x + 0.008) / 1.008 * np.pi / 2) ** 2 for x in tau]
    np.testing.assert_allclose(v, 1 - np.array(ratio) / ratio[0], atol=1e-15)
    np.testing.assert_allclose(v[[0, 3]], [0.0, 1.0], atol=1e-15)
    assert 0.49 < v[2] < 0.52


@given(num_steps, st.floats(1e-5, 0.1))
def test_uniform_times(steps, eps):
    tau = diffusion.diffusion_times(steps, time_eps=eps)
    assert tau.dtype == np.float64 and len(tau) == steps + 1
    np.testing.assert_allclose(tau[[0, -1]], [eps, 1.0])
    np.testing.assert_allclose(np.diff(tau), (1 - eps) / steps)


def test_lsun_times():
    tau = diffusion.diffusion_times(4, "lsun")
    np.testing.assert_allclose(tau * 999, [0, 166, 332, 498, 999])
    tau = diffusion.diffusion_times(2, "lsun")
    np.testing.assert_allclose(tau * 999, [0, 500, 999])


@pytest.mark.parametrize("time", diffusion.SPACINGS)
@pytest.mark.parametrize("variance", diffusion.VARIANCES)
def test_levels_spaced_by_noise_are_their_sources(variance: str, time: str):
    """σ = S/A between the ends of the variance; 80, of Karras et al., at the most."""
    limits = (1e-4, 0.9) if variance == "geometric" else (0.1, 20.0)
    for steps in (1, 2, 4, 7):
        plain, spaced = (
            diffusion.schedule_values(
                steps, variance, *limits, kind, max_beta=1.0 - 1e-9
            )
            for kind in ("uniform", time)
        )
        first, last = (plain["sigma_cum"] / plain["a_cum"])[[0, -1]]
        ends = first, min(last, 80.0)
        if time == "log_snr":
            expected = np.geomspace(*ends, steps + 1)
        else:  # Equation 5, from i = N − 1, the least noise, on; N = T + 1 levels.
            low, high = (end ** (1 / 7) for end in ends)
            share = np.arange(steps, -1, -1) / steps
            expected = (high + share * (low - high)) ** 7
        sigma = spaced["sigma_cum"] / spaced["a_cum"]
        np.testing.assert_allclose(sigma, expected, rtol=1e-7)
        assert (spaced["beta"] > 0).all() and (spaced["beta"] < 1).all()


def test_levels_of_karras_are_those_of_the_paper():
    """σ_min = 0.002, σ_max = 80: the middle of three levels, by hand."""
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    found = levels.noise_levels(2, "karras", 0.002, 80.0)
    np.testing.assert_allclose(found, [0.002, middle, 80.0])
    assert middle == pytest.approx(2.515, abs=1e-3)


def test_lsun_schedule_starts_at_the_data():
    s = diffusion.make_schedule(4, time="lsun", min_posterior_var=1e-4)
    assert float(s.a_cum[0]) == 1.0 and float(s.sigma_cum[0]) == 0.0
    np.testing.assert_allclose(s.posterior_log_var[0], np.log(1e-4), rtol=1e-6)
    assert float(s.posterior_var[0]) == 0.0
    with pytest.raises(ValueError, match="min_posterior_var"):
        diffusion.make_schedule(4, time="lsun")
    with pytest.raises(ValueError, match=r"min_posterior_var is 0\.0"):
        diffusion.make_schedule(4, time="lsun", min_posterior_var=0.0)


def test_reconstruction_weights():
    """w(τ) = 0.6·τ^p with w(½) = 0.2 fixes p."""
    s = diffusion.make_schedule(2, time_eps=0.0, min_posterior_var=1e-4)
    np.testing.assert_allclose(s.recon_weight, [0.0, 0.2, 0.6], rtol=1e-6)


def test_beta_is_clipped():
    free = diffusion.make_schedule(1, max_beta=1.0)
    clipped = diffusion.make_schedule(1)
    assert float(free.beta[1]) > 0.9999
    np.testing.assert_allclose(clipped.beta[1], 0.999, rtol=1e-6)
    np.testing.assert_allclose(clipped.a[1] ** 2, 0.001, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 1, "time": "lsun"}, "at least 2"),
        ({"variance": "linear"}, "linear.*vp, geometric, cosine"),
        ({"time": "log"}, "log.*uniform, lsun, log_snr, karras"),
        ({"time": "karras", "time_eps": 0.0}, "from noise 0 to 80"),
        ({"time": "log_snr", "num_steps": 0}, "num_steps is 0"),
        ({"variance": "geometric"}, "beta_max is 20"),
        ({"beta_min": 0.0}, "beta_min is 0"),
        ({"beta_min": 3.0, "beta_max": 2.0}, "beta_min is 3"),
    ],
)
def test_errors_name_the_field(arguments: dict, named: str):
    with pytest.raises(ValueError, match=named):
        diffusion.make_schedule(**arguments)


RELEASED_NAMES = {
    "sigmas": "sigma",
    "a_s": "a",
    "a_s_cum": "a_cum",
    "sigmas_cum": "sigma_cum",
    "betas": "beta",
    "posterior_variance": "posterior_var",
    "posterior_mean_coef1": "posterior_c1",
    "posterior_mean_coef2": "posterior_c2",
    "posterior_log_variance_clipped": "posterior_log_var",
    "recon_weight": "recon_weight",
}


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("reference_schedule.npz", ""), ("reference_image_step.npz", "sched/")],
)
def test_schedule_of_the_released_code(test_data: Path, file: str, prefix: str):
    """Norm-wise: the authors computed theirs in float32."""
    reference = np.load(test_data / file)
    names = {name for name in reference if name.startswith(prefix)}
    assert names == {prefix + name for name in RELEASED_NAMES}
    s = diffusion.make_schedule(4, "vp", 0.1, 20.0, min_posterior_var=1e-4)
    for name, field in RELEASED_NAMES.items():
        expected = reference[prefix + name]
        gap = np.linalg.norm(np.asarray(getattr(s, field)) - expected)
        assert gap <= 1e-4 * np.linalg.norm(expected), name


# The forward process and its posterior, on batches of any shape.

SHAPES = [(2,), (4, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusion_to_two_successive_levels(shape):
    s = SCHEDULE
    x0, eps, eps_next = (normals(i, 4, *shape) for i in range(3))
    t = jnp.array([3, 0, 1, 2])
    x_t, x_next = diffusion.diffuse_pair(s, x0, t, eps, eps_next)
    np.testing.assert_array_equal(x_t, diffusion.diffuse(s, x0, t, eps))
    for i, k in enumerate([3, 0, 1, 2]):
        expected = s.a_cum[k] * x0[i] + s.sigma_cum[k] * eps[i]
        np.testing.assert_allclose(x_t[i], expected, rtol=1e-6, atol=1e-6)
        expected = s.a[k + 1] * x_t[i] + s.sigma[k + 1] * eps_next[i]
        np.testing.assert_allclose(x_next[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_q_and_its_score(shape):
    x_t, x_next, t = normals(0, 4, *shape), normals(1, 4, *shape), jnp.arange(4)
    log = diffusion.log_q(SCHEDULE, x_next, x_t, t)
    score = diffusion.score_log_q(SCHEDULE, x_next, x_t, t)
    for k in range(4):
        expected = stats.norm.logpdf(
            x_next[k], SCHEDULE.a[k + 1] * x_t[k], SCHEDULE.sigma[k + 1]
        )
        np.testing.assert_allclose(log[k], expected.sum(), rtol=1e-5)
    autodiff = jax.grad(lambda x: diffusion.log_q(SCHEDULE, x_next, x, t).sum())(x_t)
    np.testing.assert_allclose(score, autodiff, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_sample_has_noise_only_above_level_0(shape):
    x0, x_next, eps = (normals(i, 4, *shape) for i in range(3))
    t = jnp.arange(4)
    mean = diffusion.posterior_mean(SCHEDULE, x0, x_next, t)
    x_t = diffusion.sample_posterior(SCHEDULE, x0, x_next, t, eps)
    np.testing.assert_array_equal(x_t[0], mean[0])
    for k in range(4):
        expected = SCHEDULE.posterior_c1[k] * x0[k]
        expected += SCHEDULE.posterior_c2[k] * x_next[k]
        np.testing.assert_allclose(mean[k], expected, rtol=1e-5, atol=1e-6)
        std = 0.0 if k == 0 else np.sqrt(SCHEDULE.posterior_var[k])
        np.testing.assert_allclose(x_t[k] - mean[k], std * eps[k], atol=1e-5)


def test_prior_is_standard_normal():
    x = np.asarray(diffusion.sample_prior(jax.random.key(0), (5000, 2))).ravel()
    assert stats.kstest(x, "norm").pvalue > 0.01


def test_rank_promotion_and_wrong_shapes_raise():
    """The checks that all other tests rely on are on."""
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((3, 2)) + jnp.ones((2,))
    with pytest.raises(TypeError):
        diffusion.diffuse(SCHEDULE, normals(0, 3, 2), jnp.arange(2), normals(0, 3, 2))
