"""--config and --config.section.field=value on the command line."""

from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags
from test_config import CONFIGS, recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax.config import flags


@pytest.fixture
def parse(monkeypatch):
    """Parses a command; returns its config and what is left over."""
    values = absl_flags.FlagValues()
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    holder = flags.define_config_flag(values=values)
    absl_flags.DEFINE_integer("seed", 0, "Another flag.", flag_values=values)

    def parsed(*argv: str) -> tuple[Any, list[str]]:
        remaining = flags.parse(["main.py", *argv])
        return holder.value, remaining[1:]

    return parsed


@pytest.fixture
def problem(parse):
    """Parses a command that is wrong; returns its error message as one line."""

    def message(*argv: str) -> str:
        with pytest.raises(config_lib.ConfigError) as error:
            parse(*argv)
        return " ".join(str(error.value).split())

    return message


def test_fields_are_changed_in_every_way_of_writing_a_flag(parse, tmp_path: Path):
    (tmp_path / "flags").write_text("--config.data.held_out_classes=(1,2)\n")
    config, rest = parse(
        f"--config={CONFIGS / 'celeba64.py'}",
        *("--config.game.gamma", "1", "-config.data.name=moons", "--seed=3"),
        *("--noconfig.train.tensorboard", "--config.data.on_device"),
        *("--config.game.recon_floor=1e-3", "--config.game.gamma_final=1e-3"),
        *("--config.optimizer.max_grad_norm=none", "--config.data.crop=None"),
        *("--config.model.unet.ch_mult=(3,4)", "--config.model.mlp.hidden=16"),
        *("--config.data.path=none", f"--flagfile={tmp_path / 'flags'}", "left"),
    )
    changed = config_lib.differences(recipe("celeba64"), config)
    assert {field: new for field, (_, new) in changed.items()} == {
        "game.gamma": 1.0,
        "data.name": "moons",
        "train.tensorboard": False,
        "data.on_device": True,
        "game.recon_floor": 1e-3,
        "game.gamma_final": 1e-3,
        "data.crop": None,
        "model.unet.ch_mult": (3, 4),
        "model.mlp.hidden": (16,),
        "data.path": "none",
        "data.held_out_classes": (1, 2),
    }
    assert (rest, flags.recipe_name()) == (["left"], "celeba64")


@pytest.mark.parametrize("words", [["--config=digits"], ["--config", "digits"]])
def test_recipes_are_found_by_name(parse, words, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # A folder is no recipe.
    config, _ = parse(*words, "--config.game.gamma=1")
    assert set(config_lib.differences(recipe("digits"), config)) == {"game.gamma"}


def test_every_problem_of_a_command_is_reported_at_once(problem):
    message = problem(
        f"--config={CONFIGS / 'gaussians25.py'}",
        *("--config.game.gama=1", "--config.gaem.lambda_z=1", "--config.seed=x"),
        *("--config.recovery=3", "--config.data.flip=maybe"),
        *("--config.model.mlp.hidden=(8,", "--config.optimizer.beta1=5"),
    )
    assert message.startswith(
        "--config.game.gama is not a field of the config; did you mean game.gamma?; "
        "--config.gaem.lambda_z is not a field of the config; did you mean "
        "game.lambda_z?; seed is 'x'; a whole number is needed; "
        "--config.recovery is a section of the config; set its fields: recovery."
    )
    assert "data.flip is 'maybe'; True or False is needed" in message
    assert "model.mlp.hidden is '(8,'; a tuple of one or more whole numbers" in message
    assert "optimizer.beta1 is 5.0; it must be at least 0" in message


# Bodies of get_config(), and the reason in the error.
BAD_RECIPES = {
    "k.train.num_steps = 'ten'": "TypeError: Could not override field 'num_steps'",
    "k.gaem.gamma = 1.0": "AttributeError: 'gaem' Did you mean \"game\"",
    "raise KeyError('my key')": "KeyError: my key",
    "assert k.seed == 1": "AssertionError",
    "k.seed = = 1": "SyntaxError: invalid syntax",
    "open('nosuch')": "FileNotFoundError: [Errno 2] No such file",
}


@pytest.mark.parametrize("body", BAD_RECIPES)
def test_an_error_in_a_recipe_names_file_line_and_reason(problem, tmp_path, body: str):
    path = tmp_path / "bad.py"
    path.write_text(
        "from ddaebm_jax import config\n\n\ndef get_config():\n"
        f"    k = config.base()\n    {body}\n    return k\n"
    )
    message = problem(f"--config={path}", "--config.game.gama=1")
    assert "did you mean game.gamma?" in message
    assert f"--config={path}, line 6 (`{body}`): {BAD_RECIPES[body]}" in message


@pytest.mark.parametrize("text", ["", "get_config = 3\n", "def get_config(): pass\n"])
def test_a_file_that_makes_no_config_is_no_recipe(problem, tmp_path: Path, text: str):
    (tmp_path / "empty.py").write_text(text)
    for name in ("empty.py", "nosuch.py"):
        flag = f"--config={tmp_path / name}"
        assert problem(flag).startswith(f"{flag}:")


def test_a_recipe_may_take_an_argument(parse, tmp_path: Path):
    (tmp_path / "recipe.py").write_text(
        "from ddaebm_jax import config\n\n\ndef get_config(name='moons'):\n"
        "    c = config.base()\n    c.data.name = name\n    return c\n"
    )
    config, _ = parse(f"--config={tmp_path / 'recipe.py'}:rings")
    assert config.data.name == "rings"


def test_a_command_without_a_recipe(parse, problem):
    assert parse() == (None, [])
    assert "seed=1 changes a field of a recipe" in problem("--config.seed=1")
    with pytest.raises(absl_flags.Error, match="nosuch"):
        parse("--nosuch=1")
