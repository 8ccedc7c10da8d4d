"""What a config describes: decaying rates and weights, and where dispatches end."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import small
from stepping import plane

from ddaebm_jax import experiment
from ddaebm_jax.experiment import build_game, learning_rate
from ddaebm_jax.training.dispatch import Dispatcher, next_stop


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [
        ("constant", 1e-2, 1e-2),
        ("cosine", (1e-2 + 1e-4) / 2, 1e-4),
        ("exponential", 1e-3, 1e-4),
    ],
)
def test_rates_decay_over_the_run(schedule: str, halfway: float, end: float):
    config = small(optimizer__schedule=schedule, optimizer__final_learning_rate=1e-4)
    rate = learning_rate(config.optimizer, 1e-2, 100)
    found = [rate(step) if callable(rate) else rate for step in (0, 50, 100)]
    np.testing.assert_allclose(found, [1e-2, halfway, end], rtol=1e-5)


def test_gamma_decays_geometrically_over_the_run():
    config = small(game__gamma=0.1)
    config.game.gamma_final = 1e-3
    game = build_game(config.game, 100)
    found = [game.gamma(step) for step in (0, 50, 100)]
    np.testing.assert_allclose(found, [0.1, 0.01, 0.001], rtol=1e-6)


def test_one_program_serves_all_seeds():
    """So that a second seed finds it in the compilation cache."""

    def text(seed: int) -> str:
        dispatcher = Dispatcher(experiment.build(plane(seed=seed)))
        inputs = dispatcher.inputs()
        return dispatcher.steps.program(1).lower(dispatcher.init(), *inputs).as_text()

    assert text(0) == text(7)


@pytest.mark.parametrize("seed", [0, 3, 2**31 + 5, 2**40 + 7, -1])
def test_the_seed_as_an_argument_has_the_same_keys(seed: int):
    whole = experiment.run_keys(seed)
    passed = jax.jit(experiment.run_keys)(experiment.seed_argument(seed))
    for one, other in zip(whole, passed, strict=True):
        np.testing.assert_array_equal(*map(jax.random.key_data, (one, other)))


@given(
    st.integers(0, 200),
    st.integers(1, 50),
    st.integers(1, 300),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_dispatches_stop_at_every_interval_whatever_the_start(
    start: int, per_dispatch: int, total: int, intervals: list[int]
):
    """A run resumed at a stop of the unbroken one has the stops that follow it."""

    def stops(step: int) -> list[int]:
        found = []
        while step < total:
            step = next_stop(step, per_dispatch, total, intervals)
            found.append(step)
        return found

    unbroken = stops(0)
    assert unbroken[-1] == total
    assert np.diff([0, *unbroken]).max() <= per_dispatch
    for every in filter(None, intervals):
        assert set(range(every, total + 1, every)) <= set(unbroken)
    if start in unbroken:
        assert stops(start) == unbroken[unbroken.index(start) + 1 :]
