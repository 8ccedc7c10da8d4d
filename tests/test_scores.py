"""Scores of points by energies in closed form, their calibration and explanations."""

import logging as std_logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from helpers import SCHEDULE, STEPS
from scipy import stats
from stubs import experiment
from test_likelihood import NO_VARIABLES, gaussian_networks
from test_likelihood import experiment as gaussian_experiment

from ddaebm_jax import models, objective
from ddaebm_jax.commands import score
from ddaebm_jax.data import Source, images, tabular
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference, scores

# f(x, t) = −½ p_t ‖x − m‖² + c_t.
PRECISION = np.array([2.0, 1.0, 0.5, 0.25])
CONSTANT = np.array([1.0, -3.0, 0.5, 2.0])
VARIABLES = {"p": jnp.asarray(PRECISION, "f"), "c": jnp.asarray(CONSTANT, "f")}
MEAN = 0.25
OF_ENERGY = [name for name in scores.SCORES if name != "generator bound"]


def quadratic(variables, x, t, rngs=None):
    squares = ((x - MEAN) ** 2).reshape(x.shape[0], -1).sum(axis=1)
    return -0.5 * variables["p"][t] * squares + variables["c"][t]


NETWORKS = models.Networks(*[quadratic] * 6, event_shape=(3, 2, 1), nz=1)
PLAYERS = models.Players(VARIABLES, None, None)


def points(rows=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (rows, 3, 2, 1)).astype(np.float32)


def scored(x, seed=0, num_draws=2, num_devices=1, chunk=4):
    made = experiment((3, 2, 1), NETWORKS, num_devices=num_devices, batch_size=chunk)
    fitted = points(9, seed=1)
    return scores.fit_scores(made, PLAYERS, OF_ENERGY, fitted, seed, num_draws)(x)


def distances(x):
    return np.sqrt(((x - MEAN) ** 2).sum(axis=(1, 2, 3)))


def expected_statistics(x, seed, num_draws):
    """By t the mean energy, then by t the mean gradient norm; noise of (draw, t)."""
    found = np.zeros((len(x), 2, STEPS))
    for draw, t in np.ndindex(num_draws, STEPS):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw), t)
        eps = np.asarray(jax.random.normal(key, x.shape[1:]))
        scales = float(SCHEDULE.a_cum[t]), float(SCHEDULE.sigma_cum[t])
        far = distances(scales[0] * x + scales[1] * eps)
        found[:, 0, t] += -0.5 * PRECISION[t] * far**2 + CONSTANT[t]
        found[:, 1, t] += PRECISION[t] * far
    return found.reshape(len(x), -1) / num_draws


def test_scores_are_closed_forms():
    x, seed, num_draws = points(), 3, 2
    found = scored(x, seed, num_draws)
    energy = -0.5 * PRECISION[0] * distances(x) ** 2 + CONSTANT[0]
    np.testing.assert_allclose(found["energy"], energy, rtol=1e-5)
    norm = -PRECISION[0] * distances(x)
    np.testing.assert_allclose(found["gradient norm"], norm, rtol=1e-5)
    statistics = expected_statistics(x, seed, num_draws)
    over_t = statistics[:, :STEPS].sum(axis=1)
    np.testing.assert_allclose(found["energy over t"], over_t, rtol=1e-5)
    fitted = scores.fit_gaussian(expected_statistics(points(9, 1), seed, num_draws))
    np.testing.assert_allclose(found["multiscale"], fitted(statistics), rtol=1e-2)
    other = scored(x, seed + 1, num_draws)["energy over t"]
    assert (other != found["energy over t"]).all()


BYTES = np.random.default_rng(0).integers(0, 256, (7, 3, 2, 1), np.uint8)


@pytest.mark.parametrize(
    ("x", "how"),
    [
        (points()[::-1], {"chunk": 1}),
        (points(), {"chunk": 50, "num_devices": 3}),
        (BYTES, {}),
    ],
)
def test_scores_depend_on_the_point_only(x, how):
    """Not on its number, chunks, devices, or whether images are bytes."""
    whole = np.asarray(images.to_float(BYTES)) if x is BYTES else x
    expected = scored(whole[::-1].copy())
    for name, values in scored(x, **how).items():
        np.testing.assert_allclose(values[::-1], expected[name], rtol=1e-3)


def test_bound_of_an_exact_generator_is_the_log_density():
    rng = np.random.default_rng(0)
    fitted, x = (rng.normal(size=(n, 2)).astype(np.float32) for n in (5_000, 20))
    model = gaussian_experiment(gaussian_networks()), NO_VARIABLES
    name = "generator bound"
    found = scores.fit_scores(*model, [name], fitted, num_draws=2)(x)[name]
    expected = objective.log_standard_normal(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_the_fitted_gaussian_is_that_of_the_rows():
    """In any unit of a column, with a constant one, and for points of any size."""
    rng = np.random.default_rng(0)
    mixing = np.array([[1.0, 0.0], [0.8, 0.5]])
    rows, x = (rng.normal(size=(n, 2)) @ mixing.T + 3.0 for n in (20_000, 9))
    found = scores.fit_gaussian(rows)(x)
    truth = stats.multivariate_normal([3.0, 3.0], mixing @ mixing.T).logpdf(x)
    np.testing.assert_allclose(found, truth, atol=0.1)
    scaled = scores.fit_gaussian(rows * [1.0, 1e4])(x * [1.0, 1e4])
    np.testing.assert_allclose(scaled, found - np.log(1e4), rtol=1e-6)
    constant = scores.fit_gaussian(np.c_[rows, np.full(len(rows), 0.1)])
    same = constant(np.c_[x, np.full(len(x), 0.1)])
    np.testing.assert_allclose(np.diff(same - found), 0.0, atol=5e-3)
    assert np.isfinite(constant(np.array([[np.inf, -1e300, 0.1]]))).all()
    rows[5, 1] = np.nan
    with pytest.raises(InputError, match=r"1 of 20000 inliers .*not finite"):
        scores.fit_gaussian(rows)


@pytest.mark.parametrize(("num", "size"), [(0, 0), (59, 0), (60, 30), (5_000, 500)])
def test_held_out_inliers_are_fitted_to_or_judged_by(num, size):
    fitted, unseen = scores.fitted_places(num), scores.unseen_places(num)
    assert len(fitted) == size
    np.testing.assert_array_equal(np.sort(np.r_[fitted, unseen]), np.arange(num))


def test_rows_of_a_table_are_fitted_to_or_calibrate():
    def source(num):
        test = np.arange(num, dtype=np.float32)[:, None]
        train, affine = test - 1_000, tabular.Standardizer(np.zeros(1), np.ones(1))
        table = tabular.Table(("a",), train, test, np.arange(num) % 2, affine)
        return Source("table", (1,), None, None, table=table)

    large, small = source(200), source(20)
    fitted = set(scores.fit_rows(large).ravel())
    rest = set(scores.calibration_rows(large, 99, "multiscale").ravel())
    assert len(fitted) == len(rest) == 50 and not fitted & rest
    assert fitted | rest == set(range(0, 200, 2))  # Inliers alone.
    assert len(scores.calibration_rows(large, 99, "energy")) == 99
    assert scores.fit_rows(small).max() < 0  # Of training.
    assert len(scores.calibration_rows(small, 99, "multiscale")) == 10


@pytest.mark.parametrize("whiten", [False, True])
def test_explanations_point_at_the_column_that_was_spoilt(whiten):
    """By f = log N of whitened rows: the gradient is −C⁻¹x, C of standardised rows."""
    rng = np.random.default_rng(0)
    mixing = np.eye(6) + 0.3 * rng.normal(size=(6, 6))
    rows = rng.normal(size=(500, 6)) @ mixing * [1, 10, 1e-3, 5, 1e4, 1] + 50
    affine = tabular.Standardizer.fit(rows, whiten)
    names = tuple("abcdef")
    table = tabular.Table(names, affine.transform(rows), rows[:0], None, affine)
    made = gaussian_experiment(gaussian_networks())
    made = made._replace(source=Source("t", (6,), None, None, table=table))
    spoilt = rows[:6] + 8 * np.diag(rows.std(axis=0))
    x = affine.transform(spoilt)
    found = scores.leading_columns(made, NO_VARIABLES, x)
    assert [line.split(";")[0] for line in found] == list(names)
    gradient = inference.gradients(made, NO_VARIABLES, x)
    np.testing.assert_allclose(gradient, -x, rtol=1e-5)
    scaled = (spoilt - affine.mean) / affine.std
    inverse = np.eye(6) if not whiten else affine.whitening @ affine.whitening.T
    order = np.argsort(-np.abs(scaled @ inverse), axis=1)[:, :3]
    assert found == [";".join(names[j] for j in row) for row in order]
    # Rows whose squares are beyond float32.
    far = affine.transform(rows[:6] + 1e25 * np.diag(rows.std(axis=0)))
    found = scores.leading_columns(made, NO_VARIABLES, far)
    assert [line.split(";")[0] for line in found] == list(names)


def correlated(num, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, 3)) @ [[10, 5, 0], [0, 10, 5], [0, 0, 10]] + 100


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    rows = correlated(800, 0)
    np.savetxt(folder / "rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    config = runs.small(
        data__name="table",
        data__path=str(folder / "rows.csv"),
        data__test_fraction=0.5,
        model__mlp__activation="silu",  # Gradients of pieces of planes are tied.
    )
    runs.train(config, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("by", scores.SCORES)
def test_p_values_of_new_inliers_are_uniform(table_run, tmp_path, by):
    np.savez(tmp_path / "new.npz", x=correlated(600, 1))
    output = tmp_path / "scores.npz"
    score.score(table_run, tmp_path / "new.npz", output, by=by)
    found = np.load(output)
    values = found["energy" if by == "energy" else "score"]
    assert (np.diff(found["p_value"][np.argsort(values)]) >= 0).all()
    num = 200 if by in scores.FITTED else 400
    for share in (0.1, 0.3, 0.7):
        error = np.sqrt(share * (1 - share) * (1 / num + 1 / 600))
        assert abs((found["p_value"] <= share).mean() - share) < 3.5 * error
    assert found["p_value"].min() >= 1 / (num + 1)


def test_outliers_are_flagged_and_few_calibration_rows_are_said(
    table_run, tmp_path, caplog
):
    rows = correlated(60, 2)
    rows[:30, 1] += 1_000
    np.savez(tmp_path / "new.npz", x=rows)
    inputs = table_run, tmp_path / "new.npz"
    score.score(*inputs, tmp_path / "a.npz", by="multiscale", fdr=0.2)
    found = np.load(tmp_path / "a.npz")
    assert found["flagged"][:30].all() and found["flagged"][30:].sum() < 15
    assert {"energy", "score", "rank", "columns"} < set(found)
    with caplog.at_level(std_logging.INFO, "absl"):
        score.score(*inputs, tmp_path / "b.csv", calibration=9, fdr=0.1)
    assert (
        "only 9 held-out inliers: the smallest possible p-value is 0.1" in caplog.text
    )
    header, *lines = (tmp_path / "b.csv").read_text().splitlines()
    assert header == "row,energy,rank,p_value,flagged,columns"
    assert all(len(line.split(",")[-1].split(";")) == 3 for line in lines)
    score.score(*inputs, tmp_path / "c.npz", calibration=0)
    assert "p_value" not in np.load(tmp_path / "c.npz")
    with pytest.raises(InputError, match="--fdr needs p-values"):
        score.score(*inputs, fdr=0.1, calibration=0)
