"""Validation names every field at fault, and a config survives being saved."""

import importlib.util
from pathlib import Path

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax import config as config_lib

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def _load(path: Path) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _changed(**fields: object) -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"gaussians25", "released_gaussians25"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_json(path: Path):
    config = _load(path)
    if config.data.name == "table":
        config.data.path = "rows.csv"  # the one field that is the user's to give
    config_lib.validate(config)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == {}


def test_the_released_recipe_is_the_design_table():
    config = _load(Path(__file__).parent.parent / "configs/released_gaussians25.py")
    process, game, adam = config.diffusion, config.game, config.optimizer
    assert (process.num_steps, process.beta_min, process.beta_max) == (4, 0.01, 0.1)
    assert (process.variance, process.time) == ("vp", "uniform")
    assert (config.data.batch_size, config.train.num_steps) == (200, 100_000)
    assert (adam.learning_rate, adam.schedule) == (1e-4, "constant")
    assert (adam.beta1, adam.beta2, adam.ema_decay) == (0.0, 0.9, 0.0)
    assert (game.gamma, game.lambda_z, game.lambda_f) == (0.02, 0.1, 1.0)
    assert (game.recon, game.recon_latent, game.recon_floor) == (
        "nll",
        "posterior",
        0.01,
    )
    assert (config.model.nz, config.model.mlp.norm) == (2, "batch")
    assert tuple(config.model.mlp.hidden) == (300, 300)


@pytest.mark.parametrize("field", sorted(config_lib._RANGES))
def test_every_range_is_checked_on_both_sides(field: str):
    least, greatest, closed = config_lib._RANGES[field]
    whole = isinstance(dict(config_lib._leaves(config_lib.base()))[field], int)
    step = 1 if whole else 0.5
    outside = [least - step if closed else least]
    if greatest != float("inf"):
        outside.append(greatest + step)
    for value in outside:
        value = int(value) if whole else float(value)
        (problem,) = config_lib.problems(_changed(**{field: value}))
        assert problem.startswith(f"{field} is {value};")


@pytest.mark.parametrize("field", sorted(config_lib._CHOICES))
def test_every_choice_is_checked_with_a_suggestion(field: str):
    allowed = config_lib._CHOICES[field]
    (problem,) = config_lib.problems(_changed(**{field: allowed[0] + "x"}))
    assert field in problem
    assert all(name in problem for name in allowed)
    assert f"did you mean '{allowed[0]}'" in problem


def test_all_problems_are_told_at_once():
    config = _changed(seed=-1, game__recon="nil", data__batch_size=0)
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.validate(config)
    for field in ("seed", "game.recon", "data.batch_size"):
        assert field in str(error.value)


def test_an_unknown_field_in_a_recipe_is_refused_with_a_suggestion():
    config = config_lib.base()
    config.optimizer.learning_rte = 1e-3
    (problem,) = config_lib.problems(config)
    assert "optimizer.learning_rte is not a field" in problem
    assert "optimizer.learning_rate" in problem


def test_a_missing_field_is_refused():
    config = config_lib.base()
    del config.game["gamma"]
    (problem,) = config_lib.problems(config)
    assert "game.gamma is missing" in problem


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"diffusion.beta_min": 20.0, "diffusion.beta_max": 0.1}, "beta_min is 20.0"),
        ({"diffusion.variance": "geometric"}, "below 1"),
        ({"diffusion.time": "lsun", "diffusion.num_steps": 1}, "at least 2"),
        ({"diffusion.time": "lsun"}, "min_posterior_var"),
        ({"diffusion.time_eps": 1e-300}, "min_posterior_var"),
        ({"diffusion.beta_max": 4000.0}, "every step needs"),
        ({"diffusion.time_eps": 0.0}, "min_posterior_var"),
        ({"game.recon_floor": None, "diffusion.num_steps": 1}, "recon_floor is None"),
        ({"model.mlp.t_embed_dim": 15}, "even"),
        ({"optimizer.schedule": "cosine", "optimizer.learning_rate": 1e-6}, "decays"),
        (
            {"optimizer.schedule": "exponential", "optimizer.final_learning_rate": 0.0},
            "positive",
        ),
        ({"game.gamma": 0.0, "game.gamma_final": 1e-3}, "gamma_final"),
        ({"data.name": "table"}, "data.path is empty"),
        ({"data.path": "rows.csv"}, "would ignore"),
        ({"data.label_column": "y"}, "would ignore"),
    ],
)
def test_combinations_are_checked(fields: dict, expected: str):
    config = config_lib.base()
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        node = config
        for part in section.split("."):
            node = node[part]
        # Past the recipe's own type checks: JSON files and code can hold anything.
        node[field] = value
    assert any(expected in problem for problem in config_lib.problems(config))


_ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(),
    st.integers(),
    st.lists(st.integers(), max_size=2),
)


@given(
    st.sampled_from(sorted(dict(config_lib._leaves(config_lib.base())))), _ODD_VALUES
)
def test_no_value_of_any_field_escapes_with_another_error(field: str, value: object):
    """A value is accepted, or refused with the field's name; nothing else happens."""
    config = ml_collections.ConfigDict(config_lib.base().to_dict())
    section, _, name = field.rpartition(".")
    node = config
    for part in filter(None, section.split(".")):
        node = node[part]
    with node.ignore_type():
        node[name] = value
    for problem in config_lib.problems(config):
        assert field in problem or field.split(".")[-1] in problem


def test_differences_name_fields_and_both_values():
    changed = config_lib.differences(_changed(), _changed(game__gamma=0.5))
    assert changed == {"game.gamma": (0.02, 0.5)}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"seed": 1}'])
def test_a_damaged_config_file_is_a_config_error(text: str):
    with pytest.raises(config_lib.ConfigError):
        config_lib.from_json(text)
