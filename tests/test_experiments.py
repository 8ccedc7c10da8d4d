"""What a config describes: rates and weights that decay over a run."""

import numpy as np
import pytest
from runs import small as _config

from ddaebm_jax import experiment as experiments


@pytest.mark.parametrize(
    ("schedule", "halfway"),
    [("constant", 1e-2), ("cosine", (1e-2 + 1e-4) / 2), ("exponential", 1e-3)],
)
def test_rates_decay_over_the_run(schedule: str, halfway: float):
    optimizer = _config(
        optimizer__schedule=schedule, optimizer__final_learning_rate=1e-4
    ).optimizer
    rate = experiments.learning_rate(optimizer, 1e-2, 100)
    at = rate if callable(rate) else lambda step: rate
    end = 1e-2 if schedule == "constant" else 1e-4
    np.testing.assert_allclose(
        [at(0), at(50), at(100)], [1e-2, halfway, end], rtol=1e-5
    )


def test_gamma_decays_geometrically_over_the_run():
    config = _config(game__gamma=0.1)
    config.game.gamma_final = 1e-3
    game = experiments.build_game(config.game, 100)
    np.testing.assert_allclose(
        [game.gamma(step) for step in (0, 50, 100)], [0.1, 0.01, 0.001], rtol=1e-6
    )
