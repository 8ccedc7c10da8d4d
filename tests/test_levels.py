"""Levels of equal cost: closed forms, the pilot run, and moves while training."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
from helpers import SCHEDULE, assert_trees_close, assert_trees_equal
from hypothesis import given
from hypothesis import strategies as st
from runs import final_state, hooked, lines, small, train
from test_likelihood import DIM, NO_VARIABLES, experiment, gaussian_networks

from ddaebm_jax import diffusion, levels
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.config import variations
from ddaebm_jax.config.checks import problems
from ddaebm_jax.data import Source
from ddaebm_jax.errors import DivergedError, InputError
from ddaebm_jax.evaluation import placement
from ddaebm_jax.training import many, pilot, run_directory
from ddaebm_jax.training.preemption import Stopped
from ddaebm_jax.training.trained_run import load_run

PILOT = {"diffusion__time": "equal_cost", "levels__pilot_steps": 4}
MOVES = {"levels__move_at": (8, 12), "levels__move_limit": 0.2}


# --- Mathematics ------------------------------------------------------------------


def information(sigma: np.ndarray) -> np.ndarray:
    """Return I(x_0; x_0 + σε) of a standard normal x_0, nats per dimension."""
    return 0.5 * np.log1p(1.0 / sigma**2)


def test_costs_of_exact_networks_are_the_information_lost():
    exact = experiment(gaussian_networks())._replace(
        source=Source("normal", (DIM,), (), None, table=FakeTable())
    )
    found = placement.step_costs(exact, NO_VARIABLES)
    sigma = np.asarray(SCHEDULE.sigma_cum / SCHEDULE.a_cum, np.float64)
    # Of 4,000 rows, costs are known to about 0.02 nats.
    lost = -DIM * np.diff(information(sigma))
    np.testing.assert_allclose(found, lost, rtol=0.01, atol=0.05)


class FakeTable:
    """Standard normal training rows."""

    train = np.random.default_rng(0).normal(size=(4_000, DIM)).astype(np.float32)


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_equal_costs_of_gaussian_data(num_steps: int):
    sigma = np.geomspace(0.01, 20.0, 200)
    found = levels.equal_cost(sigma, -np.diff(information(sigma)), num_steps)
    assert found[0] == sigma[0] and found[-1] == sigma[-1]
    costs = -np.diff(information(found))
    np.testing.assert_allclose(costs, costs.mean(), rtol=2e-3)


positive = st.floats(0.01, 10.0)


@given(st.lists(positive, min_size=2, max_size=8), st.integers(1, 9), st.data())
def test_levels_rise_and_move_no_further_than_allowed(gaps, num_steps, data):
    sigma = 0.01 * np.exp(np.cumsum(gaps))
    costs = data.draw(
        st.lists(st.floats(-0.1, 5.0), min_size=len(gaps) - 1, max_size=len(gaps) - 1)
    )
    if sum(costs) <= 0:
        with pytest.raises(ValueError, match="positive sum"):
            levels.equal_cost(sigma, np.array(costs), num_steps)
        return
    found = levels.equal_cost(sigma, np.array(costs), num_steps)
    assert len(found) == num_steps + 1 and (np.diff(found) > 0).all()
    wanted = levels.equal_cost(sigma, np.array(costs), len(sigma) - 1)
    moved = levels.moved(sigma, wanted, 0.3)
    assert (np.diff(moved) > 0).all()
    steps = np.abs(np.log(moved / sigma))
    np.testing.assert_array_less(steps, 0.3 + 1e-9)
    near = np.abs(np.log(wanted / sigma)) < 0.3
    np.testing.assert_allclose(moved[near], wanted[near])


@pytest.mark.parametrize("variance", diffusion.VARIANCES)
def test_given_times_are_the_levels(variance: str):
    limits = variance, *((1e-4, 0.9) if variance == "geometric" else (0.1, 20.0))
    plain = diffusion.schedule_values(4, *limits, time="log_snr")
    times = diffusion.level_times(4, *limits, "log_snr", 1e-3, ())
    again = diffusion.schedule_values(4, *limits, time="equal_cost", times=tuple(times))
    for name, values in plain.items():
        np.testing.assert_array_equal(again[name], values)
    noise = diffusion.noise_of_times(times, *limits)
    np.testing.assert_allclose(diffusion.times_of_noise(noise, *limits), times)


# --- Runs -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _compile_quickly():
    with quick.compilation():
        yield


def test_a_pilot_run_places_the_levels_once(tmp_path: Path, monkeypatch):
    """Its times are kept in the run's config, which a resumed run reads."""
    train(small(**PILOT, train__num_steps=8), tmp_path)
    config = run_directory.read_config(tmp_path)
    times = config.diffusion.times
    assert len(times) == 5 and times[0] == 1e-3
    uniform = diffusion.diffusion_times(4)
    assert np.abs(np.array(times) - uniform).max() > 0.01
    monkeypatch.setattr(pilot, "_train", lambda pilots: [None] * len(pilots))
    train(small(**PILOT, train__num_steps=16), tmp_path)
    assert run_directory.read_config(tmp_path).diffusion.times == times
    loaded = load_run(tmp_path).experiment.schedule
    expected = diffusion.make_schedule(**config.diffusion)
    assert_trees_equal(loaded, expected)


def test_costs_that_are_not_finite_end_the_run(tmp_path: Path, monkeypatch):
    nothing = lambda *_: np.array([1.0, np.nan, 2.0, 3.0])  # noqa: E731
    monkeypatch.setattr(placement, "step_costs", nothing)
    with pytest.raises(DivergedError, match="levels of equal cost cannot be found"):
        train(small(**PILOT), tmp_path / "pilot")
    with pytest.raises(DivergedError, match="or leave the levels where they are"):
        train(small(**MOVES), tmp_path / "moves")


def test_a_resumed_run_whose_levels_move_is_bit_identical(tmp_path: Path):
    """Stopped between two moves, whose levels are in the checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = small(**MOVES)
    train(config, whole)

    def stop(step: int) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with hooked(after=stop), pytest.raises(Stopped):
        train(config, broken)
    between = load_run(broken).experiment.config.diffusion.times
    train(config, broken)
    assert_trees_equal(final_state(broken), final_state(whole))
    path = [line for line in lines(whole) if "levels/noise_1" in line]
    assert [line["step"] for line in path] == [0, 8, 12]
    assert path == [line for line in lines(broken) if "levels/noise_1" in line]
    noise = np.array([[line[f"levels/noise_{k}"] for k in range(5)] for line in path])
    assert np.abs(np.diff(np.log(noise), axis=0)).max() <= 0.2 + 1e-4
    found = load_run(whole).experiment
    np.testing.assert_allclose(placement.noise_levels(found), noise[-1])
    assert found.config.diffusion.times == between  # The last move is before the stop.
    assert json.loads((whole / "config.json").read_text())["diffusion"]["times"] == []


def test_stacked_runs_move_their_levels_as_runs_alone(tmp_path: Path):
    config = small(levels__move_at=(8,), levels__move_limit=9.0)
    configs = [variations.varied(config, {}, seed) for seed in (3, 5)]
    together = list(many.train(list(map(experiment_lib.build, configs)), together=2))
    for run, own in zip(together, configs, strict=True):
        train(own, tmp_path / str(own.seed))
        alone = load_run(tmp_path / str(own.seed)).experiment
        times = run.experiment.config.diffusion.times
        np.testing.assert_allclose(times, alone.config.diffusion.times, rtol=1e-3)
        state = jax.device_get(final_state(tmp_path / str(own.seed)))
        assert_trees_close(run.state, state, rtol=2e-3, atol=2e-5)
    first, second = (run.experiment.config.diffusion.times for run in together)
    assert first != second


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"diffusion__time": "equal_cost", "diffusion__times": (0.1, 0.5)}, "T \\+ 1"),
        ({"levels__move_at": (12, 8)}, "moves come in order"),
        ({"levels__move_at": (24,)}, "before the end"),
        ({"levels__pilot_steps": 7}, "read only with equal_cost"),
        ({"diffusion__times": (0.0, 2.0)}, "numbers from 0 to 1"),
    ],
)
def test_bad_settings_are_told(fields: dict, told: str):
    config = small()
    with pytest.raises((InputError, TypeError), match=told):
        config.update_from_flattened_dict(
            {k.replace("__", "."): v for k, v in fields.items()}
        )
        raise InputError("; ".join(problems(config)))
