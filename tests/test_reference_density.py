"""The reference density: Bayes' rule, draws, its fit, and the energy on it."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs as small_runs
from helpers import smooth_networks
from hypothesis import strategies as st

from ddaebm_jax import diffusion, experiment, reference
from ddaebm_jax.data import reference_fit
from ddaebm_jax.data.tabular import Standardizer
from ddaebm_jax.proposal import Proposal, ProposalNoise, draw

SCHEDULE = diffusion.make_schedule(time_eps=0.1)
AXIS = np.linspace(-9.0, 9.0, 121)
GRID = jnp.asarray(np.stack(np.meshgrid(AXIS, AXIS), -1).reshape(-1, 2), jnp.float32)
CELL = float(AXIS[1] - AXIS[0]) ** 2
NUM = 8


def rows(num=60, dim=2, seed=0):
    """Two clusters, one of them long and narrow."""
    rng = np.random.default_rng(seed)
    narrow = rng.standard_normal((num, dim)) * 0.3 + rng.standard_normal((num, 1))
    return np.where(rng.random((num, 1)) < 0.3, narrow - 2.0, narrow)


@pytest.fixture(scope="module")
def fitted() -> reference.Reference:
    return reference_fit.fit(rows(), SCHEDULE, NUM)


@pytest.mark.parametrize("t", [0, 3])
def test_condition_is_bayes_rule_and_draws_follow_it(fitted, t):
    times = jnp.full(len(GRID), t)
    x_next = jnp.broadcast_to(jnp.array([0.3, -0.9]), GRID.shape)
    marginal = jnp.exp(
        reference.log_density(reference.at_level(fitted, SCHEDULE, times), GRID)
    )
    np.testing.assert_allclose(marginal.sum() * CELL, 1.0, rtol=1e-4)
    expected = marginal * jnp.exp(diffusion.log_q(SCHEDULE, x_next, GRID, times))
    expected = expected / (expected.sum() * CELL)
    given = reference.given_next(fitted, SCHEDULE, x_next, times)
    found = jnp.exp(reference.log_density(given, GRID))
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.max()))

    keys = jax.random.split(jax.random.key(0))
    drawn = reference.draw(
        given,
        jax.random.uniform(keys[0], (len(GRID),)),
        jax.random.normal(keys[1], GRID.shape),
    )
    mean = (expected[:, None] * GRID).sum(axis=0) * CELL
    spread = (expected[:, None] * (GRID - mean[None]) ** 2).sum(axis=0) * CELL
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.04)
    np.testing.assert_allclose(drawn.var(axis=0), spread, rtol=0.06)


def test_weights_of_draws_estimate_the_normalizer(fitted):
    """E_g[exp(f(x, t) + b)] = ∫ exp f(x, t) q(x_{t+1}|x) dx, whatever the networks."""
    networks = reference.with_reference(smooth_networks(dim=2), SCHEDULE, NUM, 2.0)
    variables = reference.with_fitted(networks.init(jax.random.key(1)), fitted)
    num, t = 40_000, 1
    x_next = jnp.array([[0.3, -0.9]])
    on_grid = jnp.full(len(GRID), t)
    log_p = networks.energy(variables.energy, GRID, on_grid) + diffusion.log_q(
        SCHEDULE, jnp.broadcast_to(x_next, GRID.shape), GRID, on_grid
    )
    expected = jax.nn.logsumexp(log_p) + np.log(CELL)

    keys = jax.random.split(jax.random.key(2), 3)
    noise = ProposalNoise(
        is_defensive=jnp.arange(num) < num // 2,
        z=jax.random.normal(keys[0], (num, networks.nz)),
        eps=jax.random.normal(keys[1], (num, 2)),
        uniform=jax.random.uniform(keys[2], (num,)),
    )
    times = jnp.full(num, t)
    drawn = draw(
        Proposal(floor=1.0, defensive=0.5),
        *(SCHEDULE, networks, variables),
        *(jnp.broadcast_to(x_next, (num, 2)), times, noise),
    )
    log_weights = networks.energy(variables.energy, drawn.x, times) + drawn.log_ratio
    found = jax.nn.logsumexp(log_weights) - np.log(num)
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("has_reference", [True, False])
def test_draws_for_one_condition_are_those_of_as_many_conditions(fitted, has_reference):
    networks = smooth_networks(dim=2)
    if has_reference:
        networks = reference.with_reference(networks, SCHEDULE, NUM, 2.0)
    variables = networks.init(jax.random.key(1))
    if has_reference:
        variables = reference.with_fitted(variables, fitted)
    keys = jax.random.split(jax.random.key(2), 3)
    noise = ProposalNoise(
        is_defensive=jnp.arange(12) % 4 < 2,
        z=jax.random.normal(keys[0], (12, networks.nz)),
        eps=jax.random.normal(keys[1], (12, 2)),
        uniform=jax.random.uniform(keys[2], (12,)),
    )
    x_next, t = GRID[::5_000], jnp.array([0, 3, 1])
    how = Proposal(floor=0.1, defensive=0.5), SCHEDULE, networks, variables
    together = draw(*how, x_next, t, noise)
    alone = draw(*how, jnp.repeat(x_next, 4, axis=0), jnp.repeat(t, 4), noise)
    np.testing.assert_allclose(together.x, alone.x, rtol=1e-5)
    np.testing.assert_allclose(together.log_ratio, alone.log_ratio, rtol=1e-4)


def test_density_is_half_gaussians_and_half_a_window(fitted):
    x = GRID[::500]
    at_0 = reference.at_level(fitted, SCHEDULE, jnp.zeros(len(x), jnp.int32))
    a, s = float(SCHEDULE.a_cum[0]), float(SCHEDULE.sigma_cum[0])
    moved = x[:, None] - np.asarray(a * rows(), np.float32)[None]
    distances = (moved**2).sum(axis=2)
    window = jnp.exp(-distances / (2 * s**2)).mean(axis=1) / (2 * np.pi * s**2)
    of_gaussians = 0.0
    gaussians = fitted.gaussians
    for w, mean, variances, axes in zip(*gaussians, strict=True):
        covariance = a**2 * axes @ np.diag(variances) @ axes.T + s**2 * np.eye(2)
        centred = np.asarray(x, np.float64) - a * mean
        squares = (centred @ np.linalg.inv(covariance) * centred).sum(axis=1)
        scale = 2 * np.pi * np.sqrt(np.linalg.det(covariance))
        of_gaussians += np.exp(w) * np.exp(-squares / 2) / scale
    np.testing.assert_allclose(
        jnp.exp(reference.log_density(at_0, x)),
        0.5 * window + of_gaussians,
        rtol=1e-3,
        atol=1e-8,
    )


@pytest.mark.parametrize(("num", "dim"), [(1, 3), (5, 1), (3, 70), (40, 2)])
def test_any_table_has_a_finite_reference(num, dim):
    """Few rows, wide rows, and constant columns beside others."""
    table = rows(num, dim)
    table[:, 0] = 0.0
    found = reference_fit.fit(table, SCHEDULE, NUM)
    empty = smooth_networks(dim=dim).init(jax.random.key(0))
    kept = reference.read(reference.with_fitted(empty, found).energy)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    x, t = jnp.asarray(table, jnp.float32), jnp.zeros(num, jnp.int32)
    at_0 = reference.at_level(kept, SCHEDULE, t)
    assert np.isfinite(reference.log_density(at_0, 1e3 * x)).all()
    for half in (found.gaussians, found):
        np.testing.assert_allclose(np.exp(half.log_weights).sum(), 0.5, rtol=1e-5)
    assert 0.0 < reference_fit.bandwidth(table) <= 1.0


def test_more_gaussians_are_taken_where_there_are_more_clusters():
    rng = np.random.default_rng(1)
    centres = 3.0 * rng.integers(-1, 2, (400, 2))
    clustered = reference_fit.fit(
        centres + 0.1 * rng.standard_normal((400, 2)), SCHEDULE, 32
    )
    plain = reference_fit.fit(rng.standard_normal((400, 2)), SCHEDULE, 32)
    used = [int((f.gaussians.log_weights > -100).sum()) for f in (clustered, plain)]
    assert used[0] >= 8 and used[1] <= 4


@hypothesis.given(seed=st.integers(0, 100), copies=st.integers(1, 3))
def test_bandwidth_heeds_neither_order_nor_copies_of_rows(seed, copies):
    table = rows(seed=seed)
    rng = np.random.default_rng(seed)
    changed = rng.permutation(np.repeat(table, copies, axis=0))
    assert reference_fit.bandwidth(changed) == pytest.approx(
        reference_fit.bandwidth(table)
    )


@pytest.mark.parametrize(
    "change", ["units", "columns", "rows", "copies", "constant columns"]
)
def test_settings_of_a_table_follow_from_what_its_rows_say(change):
    """Units change nothing; orders and copies what is drawn, hardly the density."""
    rng = np.random.default_rng(0)
    table, new = rows(200, 3, seed=1), rows(50, 3, seed=2)
    changed = {
        "units": lambda x: x * [1e-3, 1.0, 40.0] + [5.0, -2.0, 1e3],
        "columns": lambda x: x[:, [2, 0, 1]],
        "rows": lambda x: rng.permutation(x) if x is table else x,
        "copies": lambda x: np.repeat(x, 2, axis=0) if x is table else x,
        "constant columns": lambda x: np.column_stack([x, np.full((len(x), 9), 3.0)]),
    }[change]

    def derived(table, new):
        standardizer = Standardizer.fit(table)
        known, x = (standardizer.transform(part) for part in (table, new))
        noise = reference_fit.bandwidth(known)
        schedule = diffusion.make_schedule(time_eps=noise**2)
        found = reference_fit.fit(known, schedule, NUM)
        at_0 = reference.at_level(found, schedule, jnp.zeros(len(x), jnp.int32))
        return noise, np.asarray(reference.log_density(at_0, jnp.asarray(x)))

    noise, density = derived(table, new)
    other_noise, other = derived(changed(table), changed(new))
    assert other_noise == pytest.approx(noise, rel=1e-4)
    if change != "constant columns":  # They have a density of their own.
        atol = 0.01 if change == "units" else 1.0
        np.testing.assert_allclose(other, density, atol=atol)
    assert np.corrcoef(other, density)[0, 1] > 0.98


@pytest.mark.parametrize("columns", [3, 80])
def test_constant_columns_have_little_variance_but_some(columns: int):
    """Of full and of diagonal covariances: known cells are divided by it."""
    table = np.column_stack([rows(60, columns), np.zeros(60)])
    found = reference.in_use(reference_fit.fit(table, SCHEDULE, 2).gaussians)
    assert (found.variances > 0).all() and found.variances.min() < 1e-3


def test_all_small_images_are_fitted():
    images = np.random.default_rng(0).uniform(-1, 1, (6_000, 1, 2, 1))
    found = reference.in_use(reference_fit.fit(images, SCHEDULE, 1).gaussians)
    np.testing.assert_allclose(found.means[0], images.mean(axis=0).ravel(), atol=1e-6)


def test_energy_departs_from_the_reference_by_the_limit_at_most(fitted):
    plain = smooth_networks(dim=2)
    networks = reference.with_reference(plain, SCHEDULE, NUM, limit=2.0)
    variables = reference.with_fitted(networks.init(jax.random.key(0)), fitted)
    for factor in (1.0, 1e3):
        x, t = factor * GRID[::400], jnp.zeros(len(GRID[::400]), jnp.int32)
        at_0 = reference.at_level(fitted, SCHEDULE, t)
        residual = plain.energy({"params": variables.energy["params"]}, x, t)
        departs = networks.energy(variables.energy, x, t)
        departs = departs - reference.log_density(at_0, x)
        bound = 2.0 * np.tanh(residual / 2.0)
        scale = float(jnp.abs(reference.log_density(at_0, x)).max())
        np.testing.assert_allclose(departs, bound, atol=2e-6 * scale + 1e-5)


def test_training_leaves_the_reference_and_penalises_what_is_learnt(tmp_path):
    path = tmp_path / "rows.csv"
    np.savetxt(path, rows(num=80, dim=3), delimiter=",")
    fields = {"data__name": "table", "data__path": str(path), "model__reference": NUM}
    fields |= {"diffusion__time_eps": None, "game__noise_at_data": True}
    fields |= {"game__num_negatives": 4, "game__defensive": 0.5}
    config = small_runs.small(**fields)
    built = experiment.build(config)
    assert built.config.diffusion.time_eps > 0.01
    before = experiment.init_state(built)
    step = jax.jit(experiment.make_steps(built), static_argnums=0)
    index = jnp.arange(config.data.batch_size)
    constants = built.source.arrays, built.schedule, jnp.uint32(0), jnp.int32(0)
    after, metrics, _ = step(1, before, None, index, constants)
    for state in (before, after):
        held = reference.read(state.variables.energy)
        fitted = reference_fit.fit(built.source.table.train, built.schedule, NUM)
        jax.tree.map(np.testing.assert_array_equal, held, fitted)
    assert not np.array_equal(
        *(jax.tree.leaves(s.variables.energy["params"])[0] for s in (before, after))
    )
    # The network has hardly learnt anything: its own gradients are small, while those
    # of the reference are not.
    assert 0.0 < float(metrics["energy/gradient_penalty"]) < 0.5


def test_windows_around_images_are_as_wide_as_held_out_ones_need(tmp_path):
    rng = np.random.default_rng(0)
    centres, std = rng.uniform(-1, 1, (40, 8, 8, 1)), 0.1
    images = centres.repeat(10, axis=0) + std * rng.standard_normal((400, 8, 8, 1))
    found = reference_fit.fit(images, SCHEDULE, 500, "windows")
    # Around another of the same centre: twice the variance of each.
    assert std**2 < found.variance < 3 * std**2
    assert (found.log_weights > -10).sum() == 400
    networks = reference.with_reference(
        smooth_networks(dim=64)._replace(event_shape=(8, 8, 1)),
        *(SCHEDULE, 500, None, "windows"),
    )
    empty = networks.init(jax.random.key(0))
    kept = reference.read(reference.with_fitted(empty, found).energy)
    assert kept.variance == found.variance

    x, t = (
        jnp.asarray(images[:5].reshape(5, -1), jnp.float32),
        jnp.array([0, 1, 2, 3, 0]),
    )
    density = reference.at_level(kept, SCHEDULE, t)
    a, s = (np.asarray(v)[t] for v in (SCHEDULE.a_cum, SCHEDULE.sigma_cum))
    variance = a**2 * float(found.variance) + s**2
    squares = np.asarray(x)[:, None] - a[:, None, None] * images.reshape(1, 400, -1)
    logs = -(squares**2).sum(axis=2) / (2 * variance[:, None])
    expected = np.logaddexp.reduce(logs, axis=1) - np.log(400)
    expected = expected - 32 * np.log(2 * np.pi * variance)
    np.testing.assert_allclose(
        reference.log_density(density, x), expected, rtol=1e-3, atol=0.05
    )


def test_images_have_a_mixture_under_an_unbounded_network(tmp_path):
    """And the defensive part of their proposal draws from it."""
    rng = np.random.default_rng(0)
    shape, num = (2, 2, 1), 200
    data = (0.3 * rng.standard_normal((num, *shape)) + 0.2).astype(np.float32)
    found = reference_fit.fit(data, SCHEDULE, NUM)
    flat = reference_fit.fit(data.reshape(num, -1), SCHEDULE, NUM)
    assert (found.log_weights < -1e20).all()
    weights = np.exp(found.gaussians.log_weights), np.exp(flat.gaussians.log_weights)
    np.testing.assert_allclose(weights[0], 2.0 * weights[1], rtol=1e-5)
    np.testing.assert_array_equal(found.gaussians.means, flat.gaussians.means)

    plain = smooth_networks(dim=4)
    plain = plain._replace(
        event_shape=shape,
        energy=lambda v, x, *rest: (
            50.0 * smooth_networks(dim=4).energy(v, x.reshape(len(x), -1), *rest)
        ),
        generator=lambda v, x, t, z: x,
    )
    networks = reference.with_reference(plain, SCHEDULE, NUM, limit=None)
    variables = reference.with_fitted(networks.init(jax.random.key(0)), found)
    x, t = jnp.asarray(data[:5]), jnp.zeros(5, jnp.int32)
    learnt = plain.energy({"params": variables.energy["params"]}, x, t)
    at_0 = reference.at_level(found, SCHEDULE, t)
    expected = learnt + reference.log_density(at_0, x.reshape(5, -1))
    np.testing.assert_allclose(networks.energy(variables.energy, x, t), expected, 1e-5)

    many = 4_000
    noise = ProposalNoise(
        is_defensive=jnp.ones(many, bool),
        z=jnp.zeros((many, plain.nz)),
        eps=jax.random.normal(jax.random.key(1), (many, *shape)),
        uniform=jax.random.uniform(jax.random.key(2), (many,)),
    )
    settings = Proposal(floor=1e-3, defensive=0.5, encoder=False)
    x_next = jnp.full((1, *shape), 0.1)
    drawn = draw(settings, SCHEDULE, networks, variables, x_next, t[:1] + 3, noise)
    assert drawn.x.shape == (many, *shape)
    given = reference.given_next(found, SCHEDULE, x_next.reshape(1, 4), t[:1] + 3)
    shares = np.exp(given.gaussians.log_weights[0])
    mean = shares @ np.asarray(given.gaussians.means[0])
    np.testing.assert_allclose(drawn.x.mean(axis=0).ravel(), mean, atol=0.06)
