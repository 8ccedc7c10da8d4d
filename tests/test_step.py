"""One step of the game against a naive one, its invariances and its ablations."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from helpers import (
    DIM,
    GAME,
    NZ,
    SCHEDULE,
    STEPS,
    assert_trees_close,
    assert_trees_equal,
    differ,
    filled_variables,
    mlp_config,
    normals,
    smooth_networks,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddaebm_jax import diagnostics, models
from ddaebm_jax.game import (
    Game,
    Noise,
    Optimizers,
    TrainState,
    draw_noise,
    init_state,
    make_optimizers,
)
from ddaebm_jax.models import Networks, Players
from ddaebm_jax.proposal import Proposal
from ddaebm_jax.step import Step, make_step, mean_over_parts, scan_steps

BATCH = 8
RATE, ENERGY_RATE = 0.05, 0.2

# Plain descent: comparing states compares gradients, without Adam's division.
SGD = Optimizers(energy=optax.sgd(ENERGY_RATE), generator=optax.sgd(RATE))


def rising_gamma(step: jax.Array) -> jax.Array:
    return 0.1 + 0.2 * step


VARIANTS = {
    "nll of posterior z": GAME,
    "mse of prior z": GAME._replace(recon="mse", recon_latent="prior"),
    "weighted nll": GAME._replace(recon="weighted_nll", recon_floor=None, lambda_f=1.0),
    "no latent": GAME._replace(latent=False),
    "no posterior": GAME._replace(posterior=False, recon="mse", energy_l2=0.4),
    "reverse KL": GAME._replace(divergence="reverse_kl", gamma=rising_gamma),
    "no penalty, no entropy bound": GAME._replace(gamma=0.0, lambda_z=0.0),
    "noise at data": GAME._replace(noise_at_data=True),
    "weighted negatives": GAME._replace(
        num_negatives=4, negatives_gamma=0.4, energy_l2=0.4, proposal=Proposal(0.02)
    ),
    "half of them defensive": GAME._replace(
        num_negatives=4, proposal=Proposal(None, 0.5, 1.5)
    ),
    "defensive without a posterior": GAME._replace(
        num_negatives=2,
        posterior=False,
        recon="mse",
        proposal=Proposal(0.02, 0.5, encoder=False),
    ),
    "weighted without a latent": GAME._replace(
        num_negatives=2, latent=False, proposal=Proposal(latent=False, encoder=False)
    ),
}


def start(game: Game = GAME, networks: Networks | None = None, seed: int = 0):
    return init_state(jax.random.key(seed), networks or smooth_networks(), SGD, game)


@partial(jax.jit, static_argnums=(3, 4))
def draw_at(seed, step, index, num_negatives: int, defensive: float) -> Noise:
    shapes = STEPS, (DIM,), NZ, num_negatives, defensive
    return draw_noise(jax.random.key(seed), step, index, *shapes)


def draw(
    step: int = 0, first: int = 0, size: int = BATCH, seed: int = 1, game: Game = GAME
) -> Noise:
    index, negatives = jnp.arange(first, first + size), game.num_negatives
    return draw_at(seed, jnp.int32(step), index, negatives, game.proposal.defensive)


def batch(seed: int = 0) -> jax.Array:
    return normals(seed, BATCH, DIM)


@functools.cache
def compiled(game: Game = GAME, ema_decay: float = 0.9) -> Step:
    """Return a jitted step of the smooth networks, compiled once for all tests."""
    return jax.jit(make_step(game, SCHEDULE, smooth_networks(), SGD, ema_decay))


def scan(pairs: list, state: TrainState | None = None):
    """Return state, mean metrics and fault of one scan over (batch, noise) pairs."""
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    return scan_steps(
        lambda state, pair: compiled()(state, *pair),
        len(pairs),
        state or start(),
        inputs,
    )


def _normal(x: jax.Array, mean: jax.Array | float, var: jax.Array | float):
    density = jnp.exp(-0.5 * (x - mean) ** 2 / var) / jnp.sqrt(2 * jnp.pi * var)
    return density.prod(axis=1)


def naive_weight(
    game: Game,
    networks: Networks,
    players: Players,
    energy: dict,
    x_next: jax.Array,
    noise: Noise,
    k: int,
) -> jax.Array:
    """Return exp f(x)·q(x_{t+1}|x)·q_ψ(z|x, x_{t+1})/g(x, z) of the k-th draws."""
    s, t, settings = SCHEDULE, noise.t, game.proposal
    own, share = jax.tree.map(lambda n: n[:, k], noise.negatives), settings.defensive

    def column(values):
        return values[:, None]

    def posterior(x):
        if not settings.encoder:
            return 0.0, 1.0
        mu, logvar = networks.posterior(players.posterior, x, x_next, t)
        return mu, jnp.exp(logvar)

    def mean(z):
        x0_pred = networks.generator(players.generator, x_next, t, z)
        return column(s.posterior_c1[t]) * x0_pred + column(s.posterior_c2[t]) * x_next

    floor = settings.floor or s.posterior_var[1]
    var = column(jnp.maximum(s.posterior_var[t], floor))
    a, beta = column(s.a[t + 1]), column(s.beta[t + 1])
    v = 1 / (1 / settings.prior_std**2 + a**2 / beta)
    m = v * a * x_next / beta
    z = own.z if settings.latent else 0.0 * own.z
    if k < share * game.num_negatives:
        x = m + jnp.sqrt(v) * own.eps
        mu, z_var = posterior(x)
        z = mu + jnp.sqrt(z_var) * own.z
    else:
        x = mean(z) + jnp.sqrt(var) * own.eps
    q_z, q_next = _normal(z, *posterior(x)), _normal(x_next, a * x, beta)
    g = (1 - share) * _normal(z, 0.0, 1.0) * _normal(x, mean(z), var)
    g = g + share * _normal(x, m, v) * q_z
    return jnp.exp(networks.energy(energy, x, t)) * q_next * q_z / g


def naive_step(
    game: Game,
    networks: Networks,
    ema_decay: float,
    state: TrainState,
    x0: jax.Array,
    noise: Noise,
) -> TrainState:
    """Section 2 of the paper with plain `jax.grad` and a generator pass a player."""
    s, t = SCHEDULE, noise.t
    z = noise.z if game.latent else 0.0 * noise.z
    encoder = game.latent and game.posterior

    def column(values):
        return values[:, None]

    x_t = column(s.a_cum[t]) * x0 + column(s.sigma_cum[t]) * noise.eps_t
    x_next = column(s.a[t + 1]) * x_t + column(s.sigma[t + 1]) * noise.eps_next

    def log_q(x):
        squares = ((x_next - column(s.a[t + 1]) * x) ** 2).sum(axis=1)
        beta = s.beta[t + 1]
        return -0.5 * squares / beta - 0.5 * DIM * jnp.log(2 * jnp.pi * beta)

    def mean(x0_pred):
        return column(s.posterior_c1[t]) * x0_pred + column(s.posterior_c2[t]) * x_next

    def fake(generator, z):
        x0_pred, stats = networks.train_generator(generator, x_next, t, z)
        std = jnp.sqrt(s.posterior_var[t])
        std = std if game.noise_at_data else jnp.where(t == 0, 0.0, std)
        return x0_pred, mean(x0_pred) + column(std) * noise.eps_post, stats

    def with_params(variables, params):
        return {**variables, "params": params}

    def descend(params, gradient, rate):
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    old = state.variables

    def loss_of_energy(params):
        energy = with_params(old.energy, params)
        x_fake = fake(old.generator, z)[1]

        def conditional(x):
            return (networks.energy(energy, x, t) + log_q(x)).sum()

        loss = networks.energy(energy, x_fake, t) - networks.energy(energy, x_t, t)
        gamma = game.gamma(state.step) if callable(game.gamma) else game.gamma
        l2 = game.energy_l2
        if game.num_negatives > 1:
            of = partial(naive_weight, game, networks, old, energy, x_next, noise)
            total = sum(map(of, range(game.num_negatives)))
            normalizer = jnp.log(total / game.num_negatives)
            loss, l2 = normalizer - networks.energy(energy, x_t, t), 0.0
            gamma = gamma if game.negatives_gamma is None else game.negatives_gamma
        score = jax.grad(conditional)(x_t)
        loss = loss + 0.5 * gamma * (score**2).sum(axis=1)
        loss = loss + l2 * networks.energy(energy, x_t, t) ** 2
        return loss.mean()

    energy = descend(
        old.energy["params"],
        jax.grad(loss_of_energy)(old.energy["params"]),
        ENERGY_RATE,
    )
    energy = with_params(old.energy, energy)

    def loss_of_generator(params):
        generator = with_params(old.generator, params[0])
        posterior = with_params(old.posterior, params[1])
        x0_pred, x_fake, generator_stats = fake(generator, z)
        loss = -(networks.energy(energy, x_fake, t) + log_q(x_fake))
        if encoder and game.lambda_z:
            (mu, logvar), stats = networks.train_posterior(posterior, x_fake, x_next, t)
            if stats:
                posterior = {**posterior, "batch_stats": stats}
            squares = (noise.z - mu) ** 2 / (1e-6 + jnp.exp(logvar))
            loss = loss + 0.5 * game.lambda_z * (logvar + squares).sum(axis=1)
        if game.divergence == "jeffreys":
            forward = jnp.zeros_like(loss)
            if encoder:
                (mu, logvar), stats = networks.train_posterior(
                    posterior, x_t, x_next, t
                )
                if stats:
                    posterior = {**posterior, "batch_stats": stats}
                kl = jnp.exp(logvar) + mu**2 - 1 - logvar
                forward = forward + 0.5 * kl.sum(axis=1)
                if game.recon_latent == "posterior":
                    drawn = mu + jnp.sqrt(jnp.exp(logvar)) * noise.eps_z
                    x0_pred = fake(generator, drawn)[0]
            gap = ((x_t - mean(x0_pred)) ** 2).sum(axis=1)
            if game.recon == "mse":
                forward = forward + gap
            else:
                floor = game.recon_floor or s.posterior_var[1]
                var = jnp.maximum(s.posterior_var[t], floor)
                nll = 0.5 * gap / var + 0.5 * DIM * jnp.log(2 * jnp.pi * var)
                weighted = game.recon == "weighted_nll"
                forward = forward + nll * (s.recon_weight[t + 1] if weighted else 1.0)
            loss = loss + game.lambda_f * forward
        stats = (generator_stats, posterior.get("batch_stats", {}))
        return loss.mean(), stats

    params = (old.generator["params"], old.posterior["params"])
    gradient, stats = jax.grad(loss_of_generator, has_aux=True)(params)
    generator, posterior = descend(params, gradient, RATE)
    generator = with_params(old.generator, generator)
    posterior = with_params(old.posterior, posterior)
    if stats[0]:
        generator["batch_stats"] = stats[0]
    if stats[1]:
        posterior["batch_stats"] = stats[1]
    new = Players(energy, generator, posterior)
    return state.replace(
        step=state.step + 1,
        variables=new,
        ema=jax.tree.map(
            lambda a, b: ema_decay * a + (1 - ema_decay) * b, state.ema, new
        ),
    )


@pytest.mark.parametrize(
    ("variant", "running_averages"),
    [*((name, False) for name in VARIANTS), ("nll of posterior z", True)],
)
def test_step_is_the_naive_step(variant: str, running_averages: bool):
    """So it reads only the noise that its variant needs, and the updated energy.

    The generator's running averages are from its first pass, the posterior's from x̃_t,
    then x_t.
    """
    game = VARIANTS[variant]
    networks = smooth_networks(running_averages=running_averages)
    state = start(game, networks).replace(step=jnp.int32(2))
    naive = quick.jit(partial(naive_step, game, networks, 0.9))
    noise = draw(game=game)
    expected = naive(state, batch(), noise)
    if running_averages:
        step = quick.jit(make_step(game, SCHEDULE, networks, SGD, 0.9))
    else:
        step = compiled(game)
    actual, metrics = step(state, batch(), noise)
    assert_trees_close(actual, expected, rtol=1e-4, atol=2e-6)
    # Every network that takes part has moved, so the comparison is of something.
    assert differ(actual.variables.energy, state.variables.energy)
    assert differ(actual.variables.generator, state.variables.generator)
    if game.has_encoder:
        assert differ(actual.variables.posterior, state.variables.posterior)
    if running_averages:
        for player in actual.variables[1:]:
            assert differ(player["batch_stats"], {"seen": jnp.zeros(DIM)})
    assert all(np.isfinite(x).all() for x in metrics.values())


def readable(x: jax.Array) -> jax.Array:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def test_before_their_share_of_the_run_negatives_change_nothing():
    """Nor does their noise change what else is drawn."""
    later = VARIANTS["weighted negatives"]._replace(negatives_from=1, energy_l2=0.0)
    noise = draw(game=later)
    same = jax.tree.map(readable, noise.replace(negatives=None))
    assert_trees_equal(same, jax.tree.map(readable, draw()))
    step = quick.jit(make_step(later, SCHEDULE, smooth_networks(), SGD, 0.9))
    first, metrics = step(start(), batch(), noise)
    expected, _ = compiled()(start(), batch(), draw())
    assert_trees_close(first, expected, 1e-5, 2e-6)
    assert metrics["energy/effective_negatives"] == 1.0
    from_step_1 = start().replace(step=jnp.int32(1))
    actual, metrics = step(from_step_1, batch(), noise)
    assert metrics["energy/effective_negatives"] < 1.0
    weighted = compiled(later._replace(negatives_from=0))
    assert_trees_close(actual, weighted(from_step_1, batch(), noise)[0], 1e-5, 2e-6)


def test_metrics_are_the_losses():
    state = start()
    _, metrics = compiled()(state, batch(), draw())
    m = diagnostics.energy_gaps_by_t(jax.device_get(metrics))
    np.testing.assert_allclose(
        m["energy/loss"],
        m["energy/fake"] - m["energy/real"] + GAME.gamma * m["energy/gradient_penalty"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        m["generator/loss"],
        m["generator/reverse_potential"]
        + GAME.lambda_z * m["generator/latent_log_prob"]
        + GAME.lambda_f * (m["generator/latent_kl"] + m["generator/reconstruction"]),
        rtol=1e-5,
    )
    # Plain descent: an update is the rate times the gradient.
    for player, rate in (("energy", ENERGY_RATE), ("generator", RATE)):
        np.testing.assert_allclose(
            m[f"{player}/update_norm"], rate * m[f"{player}/grad_norm"], rtol=1e-5
        )


def test_gaps_are_the_means_by_t():
    metrics = [compiled()(start(), batch(k), draw(k))[1] for k in range(3)]
    mean = jax.tree.map(lambda *m: np.mean(m, axis=0), *metrics)
    values = diagnostics.energy_gaps_by_t(mean)
    # Weighted by their shares they sum to the whole gap.
    gaps = np.array([values.get(f"energy/gap_t{t}", 0.0) for t in range(4)])
    whole = values["energy/real"] - values["energy/fake"]
    np.testing.assert_allclose(gaps @ mean["energy/share_by_t"], whole, rtol=1e-5)
    np.testing.assert_allclose(mean["energy/share_by_t"].sum(), 1.0, rtol=1e-6)

    # A t without examples is left out.
    only_1 = draw().replace(t=jnp.ones_like(draw().t))
    values = diagnostics.energy_gaps_by_t(
        jax.device_get(compiled()(start(), batch(), only_1)[1])
    )
    assert [name for name in values if "gap_t" in name] == ["energy/gap_t1"]
    np.testing.assert_allclose(
        values["energy/gap_t1"],
        values["energy/real"] - values["energy/fake"],
        rtol=1e-5,
    )


# Ablations.


KL, LOG_PROB, RECONSTRUCTION = (
    f"generator/{term}" for term in ("latent_kl", "latent_log_prob", "reconstruction")
)


@pytest.mark.parametrize(
    ("changes", "absent", "generator", "posterior"),
    [
        ({}, set(), 2, 2),
        ({"recon_latent": "prior"}, set(), 1, 2),
        ({"lambda_z": 0.0}, {LOG_PROB}, 2, 1),
        ({"latent": False}, {KL, LOG_PROB}, 1, 0),
        ({"posterior": False}, {KL, LOG_PROB}, 1, 0),
        ({"divergence": "reverse_kl"}, {KL, RECONSTRUCTION}, 1, 1),
        ({"lambda_f": 0.0}, {KL, RECONSTRUCTION}, 1, 1),
    ],
)
def test_ablations_leave_out_terms_and_passes(
    changes: dict, absent: set[str], generator: int, posterior: int
):
    """The generator's first pass serves both players."""
    game = GAME._replace(**changes)
    networks = smooth_networks()
    calls = dict.fromkeys(("energy", "train_generator", "train_posterior"), 0)

    def counted(name):
        def call(*args, **kwargs):
            calls[name] += 1  # Each call is traced once a step.
            return getattr(networks, name)(*args, **kwargs)

        return call

    spied = networks._replace(**{name: counted(name) for name in calls})
    if not game.has_encoder:
        spied = spied._replace(train_posterior=None, posterior=None)
    step = make_step(game, SCHEDULE, spied, SGD)
    after, metrics = jax.eval_shape(step, start(game), batch(), draw())
    assert {KL, LOG_PROB, RECONSTRUCTION} - set(metrics) == absent
    assert calls == {
        "energy": 3,
        "train_generator": generator,
        "train_posterior": posterior,
    }
    if not game.has_encoder:
        assert after.variables.posterior == {"params": {}}
        assert not any(name.startswith("posterior/") for name in metrics)


def test_lazy_penalty_is_applied_every_nth_step_unscaled():
    lazy = GAME._replace(lazy_reg=3)
    for number in range(5):
        state = start().replace(step=jnp.int32(number))
        actual, metrics = compiled(lazy)(state, batch(), draw())
        applied = number % 3 == 0
        game = GAME if applied else GAME._replace(gamma=0.0)
        expected, _ = compiled(game)(state, batch(), draw())
        assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7)
        assert (float(metrics["energy/gradient_penalty"]) > 0) == applied


# Noise.


def test_noise_of_an_example_depends_on_key_step_and_place_only():
    game = VARIANTS["half of them defensive"]
    whole = jax.tree.map(readable, draw(game=game))
    for places in ([0, 1, 2], [5, 6, 7], [6, 0, 3]):
        index = jnp.array(places)
        part = draw_at(1, jnp.int32(0), index, 4, 0.5)
        expected = jax.tree.map(lambda x, index=index: x[index], whole)
        assert_trees_equal(jax.tree.map(readable, part), expected)
    plain = jax.tree.map(readable, draw())
    for other in (draw(step=1), draw(seed=2), draw(first=BATCH)):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            assert differ(readable(a), b)


def test_noise_is_uniform_in_t_and_standard_normal():
    noise = draw(size=4000)
    share = np.bincount(noise.t, minlength=STEPS) / 4000
    assert len(share) == STEPS and np.abs(share - 1 / STEPS).max() < 0.03
    columns = np.concatenate(
        [noise.eps_t, noise.eps_next, noise.z, noise.eps_post, noise.eps_z], axis=1
    )
    covariance = np.cov(columns.T)
    assert np.abs(columns.mean(axis=0)).max() < 0.07
    assert np.abs(covariance - np.eye(len(covariance))).max() < 0.12


def test_each_call_has_its_own_dropout():
    """One mask per call; f(x_t) and its gradient, which are one call, share one."""
    given, networks = [], smooth_networks()

    def recorded(name):
        function = getattr(networks, name)

        def call(*args, rngs=None):
            given.append(rngs)
            return function(*args, rngs=rngs)

        return call

    spied = networks._replace(
        energy=recorded("energy"), train_generator=recorded("train_generator")
    )
    step = make_step(GAME, SCHEDULE, spied, SGD)

    @jax.jit
    def keys_of_calls(*inputs):
        step(*inputs)
        return jnp.concatenate([readable(keys) for keys in given])

    rows = keys_of_calls(start(), batch(), draw())
    assert len(np.unique(rows, axis=0)) == len(rows) == 5 * BATCH


# Several steps, several devices.


def test_steps_in_one_scan_are_single_steps():
    pairs = [(batch(k), draw(k)) for k in range(3)]
    state, singles = start(), []
    for pair in pairs:
        state, metrics = compiled()(state, *pair)
        singles.append(metrics)
    scanned, mean, _ = scan(pairs)
    assert_trees_close(scanned, state, rtol=1e-5, atol=1e-6)
    expected = {k: np.mean([m[k] for m in singles], axis=0) for k in singles[0]}
    assert_trees_close(mean, expected, rtol=1e-4, atol=1e-6)
    assert_trees_equal(scan(pairs[:1])[0], compiled()(start(), *pairs[0])[0])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("lazy_reg", [1, 2])
def test_a_batch_in_parts_is_the_whole_batch(parts: int, lazy_reg: int):
    """Two steps, so that both sides of `lazy_reg` run."""
    game = GAME._replace(lazy_reg=lazy_reg, energy_l2=0.1)
    in_parts = jax.jit(
        make_step(game, SCHEDULE, smooth_networks(), SGD, 0.9, accumulate=parts)
    )
    expected, state = start(), start()
    for k in range(2):
        expected, expected_metrics = compiled(game)(expected, batch(k), draw(k))
        state, metrics = in_parts(state, batch(k), draw(k))
        assert_trees_close(metrics, expected_metrics, rtol=2e-5, atol=1e-6)
    assert_trees_close(state, expected, rtol=2e-5, atol=1e-6)


def test_parts_keep_groups_together():
    mean = mean_over_parts(lambda part: part[:5], jnp.arange(24.0), 3, group=4)
    # Parts start at 0, 4, 8 and go on, after four, 12 further.
    np.testing.assert_allclose(mean, [4.0, 5.0, 6.0, 7.0, 16.0])


@pytest.mark.parametrize("number", [1, 4])
def test_faults_name_step_term_and_t(number: int):
    pairs = [(batch(k), draw(k)) for k in range(number)]
    assert int(scan(pairs)[2].step) == 0

    x0, noise = pairs[-1]
    bad = noise.replace(t=noise.t.at[0].set(2), eps_t=noise.eps_t.at[0, 0].set(jnp.nan))
    fault = jax.device_get(scan([*pairs[:-1], (x0, bad)])[2])
    assert int(fault.step) == number
    message = fault.describe()
    assert f"not finite at step {number}, t = 2" in message
    assert "energy/loss" in message
    assert "by_t" not in message and "generator" not in message


def test_faults_of_the_posterior_name_its_t():
    state = start()
    params = state.variables.posterior["params"]
    posterior = {"params": {**params, "c": params["c"].at[2, NZ:].set(200.0)}}
    state = state.replace(variables=state.variables._replace(posterior=posterior))
    message = jax.device_get(scan([(batch(0), draw(0))], state)[2]).describe()
    assert message.startswith("generator/") and message.endswith("step 1, t = 2")


@pytest.fixture(scope="module")
def one_device() -> tuple[TrainState, diagnostics.Metrics]:
    return compiled()(start(), batch(), draw())


def test_split_by_pmap(one_device):
    """Each device has its own examples and their noise; gradients are averaged."""
    devices, axis = 4, "batch"
    step = make_step(GAME, SCHEDULE, smooth_networks(), SGD, 0.9, axis_name=axis)
    x0, noise = jax.tree.map(
        lambda x: x.reshape(devices, -1, *x.shape[1:]), (batch(), draw())
    )
    state, metrics = jax.pmap(
        step, axis_name=axis, in_axes=(None, 0, 0), devices=jax.devices()[:devices]
    )(start(), x0, noise)
    for i in range(devices):
        mine = jax.tree.map(lambda x, i=i: x[i], (state, metrics))
        assert_trees_close(mine, one_device, rtol=1e-4, atol=1e-6)


def test_split_by_sharding(one_device):
    """One program, its batch split over eight devices."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(start(), whole)
    result = compiled()(state, *jax.device_put((batch(), draw()), split))
    assert_trees_close(result, one_device, rtol=1e-4, atol=1e-6)


# State, averages and optimisers.


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_average_starts_at_the_weights_and_follows_them(decay: float):
    state = start()
    assert_trees_equal(state.ema, state.variables)
    average = state.ema
    for k in range(3):
        state, _ = compiled(GAME, decay)(state, batch(k), draw(k))
        average = jax.tree.map(
            lambda a, b: decay * a + (1 - decay) * b, average, state.variables
        )
    assert_trees_close(state.ema, average, rtol=1e-5, atol=1e-6)
    assert differ(state.ema, state.variables) == (decay > 0)
    assert int(state.step) == 3


@pytest.mark.parametrize("limit", [None, 0.5])
def test_optimizers_are_adam_by_player(limit: float | None):
    """Against Adam written out, with the gradient clipped first."""
    beta1, beta2, steps = 0.5, 0.9, 4
    gradients = np.random.default_rng(0).normal(size=(steps, 3))
    optimizers = make_optimizers(
        lambda count: 0.1 / (1.0 + count), 0.02, beta1, beta2, limit
    )
    rates = {
        "energy": [0.02] * steps,
        "generator": [0.1 / (1 + k) for k in range(steps)],
    }
    for player, rate in rates.items():
        optimizer = getattr(optimizers, player)
        params = {"w": jnp.zeros(3)}
        state = optimizer.init(params)
        expected, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
        for k, gradient in enumerate(gradients):
            norm = np.linalg.norm(gradient)
            g = gradient if limit is None else gradient * min(1.0, limit / norm)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1 ** (k + 1)), v / (1 - beta2 ** (k + 1))
            expected = expected - rate[k] * m_hat / (np.sqrt(v_hat) + 1e-8)
            updates, state = optimizer.update(
                {"w": jnp.asarray(gradient, "f")}, state, params
            )
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-4)


def test_step_moves_every_part_of_perceptrons_with_batch_norm():
    networks = models.build(mlp_config(norm="batch", hidden=(8,)), (DIM,))
    variables = filled_variables(networks)
    networks = networks._replace(init=lambda _: variables)
    adam = make_optimizers(1e-3, 1e-3, 0.5, 0.9)
    before = init_state(jax.random.key(0), networks, adam, GAME)
    step = quick.jit(make_step(GAME, SCHEDULE, networks, adam, 0.9))
    after, metrics = step(before, batch(), draw())
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (before, after)]
    assert shapes[0] == shapes[1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, metrics)))
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before.variables, after.variables
    )
    for path, leaf in jax.tree.leaves_with_path(moved):
        if path[-1].key in ("kernel", "slope", "mean", "var"):
            assert leaf, jax.tree_util.keystr(path)
