"""Ablation studies: variations, statistics, resumption, seeds that train at once."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
from cli import ROOT, flags_of, succeed, tiny
from helpers import assert_trees_close
from runs import load_recipe, small

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.config.variations import variations, varied
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import ablation
from ddaebm_jax.training import dispatch, many, study

PLANE = ROOT / "configs" / "plane.py"


def recipe(name: str):
    config = load_recipe(ROOT / "configs" / f"{name}.py")
    config.data.path = "rows.csv" if name == "table" else ""
    return config


# --- Variations -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["plane", "table", "lsun_church128"])
def test_variations_change_what_they_name_and_nothing_else(name: str):
    config = recipe(name)
    found = variations(["paper", "schedule", "model.nz=3,4"], config)
    assert next(iter(found.items())) == ("full", {})
    for changed in found.values():
        other = varied(config, changed, seed=7)
        assert config_lib.problems(other) == []
        differing = config_lib.differences(config, other)
        assert differing.pop("seed") == (0, 7)
        assert {field: new for field, (_, new) in differing.items()} == changed
    assert found["no latent"] == {"game.latent": False}
    assert found["model.nz = 3"] == {"model.nz": 3}
    assert ("reverse KL" in found) == (name != "table")  # Its own divergence.
    assert ("T = 1" in found) == (name != "lsun_church128")  # Its times need two.
    assert "T = 4" not in found and "time = karras" in found


def test_parts_of_the_density_game_are_left_out():
    found = variations(["density"], recipe("plane"))
    assert list(found) == ["full", "K = 1", "δ = 0", "κ = 0"]
    assert found["K = 1"] == {"game.num_negatives": 1, "game.defensive": 0.0}
    with pytest.raises(InputError, match="no variation differs"):
        variations(["density"], recipe("cifar10"))


def test_one_step_gets_the_floors_that_it_needs():
    config = recipe("plane")
    config.game.recon_floor = None
    found = variations(["paper"], config)
    assert found["T = 1"] == {"diffusion.num_steps": 1, "game.recon_floor": 1e-2}


def test_values_of_a_field_are_read_by_its_type():
    found = variations(["model.mlp.hidden=(8,9),(7,)"], recipe("plane"))
    assert [one.get("model.mlp.hidden") for one in found.values()][1:] == [(8, 9), (7,)]
    found = variations(["game.gamma_final=none,1e-4"], recipe("plane"))
    values = [one.get("game.gamma_final") for one in found.values()]
    assert values == [None, None, 1e-4]


@pytest.mark.parametrize(
    ("study", "told"),
    [
        ("colours", "allowed: paper, schedule, noise, density, or section.field"),
        ("game.gama=1", r"did you mean game\.gamma\?"),
        ("game.gamma=x", "is 'x'; a finite number is needed"),
        ("game.gamma=-1", r"is -1\.0; it must be at least 0"),
        ("game.gamma=0.002", "no variation differs from the recipe"),
        ("seed=1", "--seeds gives the seeds"),
        ("data.path=b.csv", "a path is not varied"),
    ],
)
def test_bad_variations_are_told(study: str, told: str):
    with pytest.raises(InputError, match=told):
        variations([study], recipe("plane"))


# --- Statistics -----------------------------------------------------------------


def test_means_and_differences_by_hand():
    """Differences are of pairs: 1, 0, 2 have mean 1 and error 1/√3."""
    found = ablation.compare(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0]))
    error = 1 / math.sqrt(3)
    np.testing.assert_allclose(found, (3, 2.0, error, 3, 1.0, error))
    assert not found.stands_out
    # A seed without a figure has no pair; 2.0 and 2.2 have error 0.1.
    found = ablation.compare(np.array([3.0, np.nan, 5.2]), np.array([1.0, 7.0, 3.0]))
    np.testing.assert_allclose(found, (2, 4.1, 1.1, 2, 2.1, 0.1))
    assert found.stands_out
    found = ablation.compare(np.array([3.0]), np.array([1.0]))
    assert math.isnan(found.error) and not found.stands_out


def record(seed: int, seconds: float | None = 1.0, fault: str = "", **figures: float):
    fields: dict = {}
    return {"seed": seed, "seconds": seconds, "fault": fault or None} | {
        "figures": figures,
        "fields": fields,
    }


def test_tables_tell_what_they_leave_out():
    records = {
        "full": [record(0, a=1.0, of_data=2.0), record(1, a=3.0, of_data=4.0)],
        "other": [record(0, a=2.0, of_data=2.0), record(1, None, "step 3 is NaN")],
    }
    records["other"][1]["figures"] = {"of_data": 4.0}
    figures = ablation.summarize(records)
    text = ablation.to_markdown(figures, records, "plane: paper")
    assert "| full | 2.0 ± 1.0 | 1 |" in text
    assert "| other | 2 | 1 |" in text and "| other | +1 |\n" in text
    assert "The same in every variation: of_data 3." in text
    assert "seed 1 failed: step 3 is NaN" in text
    lines = ablation.to_csv(figures).splitlines()
    assert lines[1] == "full,a,2,2.0,1.0,2,0.0,0.0,0"
    assert lines[4] == "other,a,1,2.0,,1,1.0,,0"
    found = json.loads(json.dumps(ablation.to_json(figures, records), allow_nan=False))
    assert found["other"]["figures"]["a"]["error"] is None
    alone = {"full": records["full"][:1]}
    text = ablation.to_markdown(ablation.summarize(alone), alone, "alone")
    assert "One seed gives no error" in text


# --- Runs -----------------------------------------------------------------------


def test_seeds_that_train_at_once_equal_runs_alone():
    """In the plane, with weighted negatives in the second half of the run."""
    game = {"num_negatives": 2, "defensive": 0.5, "negatives_from": 0.5}
    config = small(**{f"game__{k}": v for k, v in game.items()}, train__num_steps=4)
    config.train.steps_per_dispatch = 2
    experiments = [experiment_lib.build(varied(config, {}, seed)) for seed in (3, 5)]
    with quick.compilation():
        together = list(many.train(experiments, together=2))
        for run, experiment in zip(together, experiments, strict=True):
            dispatcher = dispatch.Dispatcher(experiment)
            state = dispatcher.init()
            for _ in range(2):
                state, _, _ = dispatcher(state, 2)
            assert run.fault is None
            assert_trees_close(run.state, jax.device_get(state), rtol=2e-4, atol=2e-6)


def test_a_killed_study_goes_on(tmp_path: Path, monkeypatch):
    """It trains what has no record, and ends with what an unbroken one has."""
    trained = []

    def train(due, workdir, name):
        if len(trained) == 2 and name == "b":
            trained.append(None)
            raise KeyboardInterrupt
        trained.extend((name, config.seed) for config in due.values())
        made = [record(c.seed, a=c.game.gamma + c.seed) for c in due.values()]
        yield [one | {"key": key} for key, one in zip(due, made, strict=True)]

    monkeypatch.setattr(study, "_train_together", train)
    config, changes = small(), {"full": {}, "b": {"game.gamma": 0.5}}
    with pytest.raises(KeyboardInterrupt):
        study.run(config, changes, [0, 1], tmp_path)
    found = study.run(config, changes, [0, 1], tmp_path)
    assert trained == [("full", 0), ("full", 1), None, ("b", 0), ("b", 1)]
    assert [one["figures"]["a"] for one in found["b"]] == [0.5, 1.5]
    # Another seed is added, other paths change nothing, another recipe is another run.
    config.data.path = str(tmp_path / "elsewhere")
    assert study.run(config, changes, [1, 0], tmp_path)["b"] == found["b"][::-1]
    study.run(config, changes, [0, 1, 2], tmp_path)
    config.train.num_steps += 1
    study.run(config, {"full": {}}, [0], tmp_path)
    assert trained[5:] == [("full", 2), ("b", 2), ("full", 0)]

    records = tmp_path / study.RECORDS_FILE
    records.write_text(records.read_text() + "{\n")
    with pytest.raises(InputError, match="line 8 is no record"):
        study.run(config, changes, [0], tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a study"):
        study.run(config, changes, [0], tmp_path / "other")


def test_the_command_writes_tables_and_a_picture(tmp_path: Path):
    folder = tmp_path / "study"
    flags = [*tiny(str(PLANE)), *flags_of({"train.num_steps": 20})]
    flags += ["--mode=ablate", "--vary=game.gamma=0.01", f"--workdir={folder}"]
    first = succeed(*flags, "--seeds=0,1")
    assert "| game.gamma = 0.01 |" in first.out and "jensen_shannon" in first.out
    kept = {path: path.read_bytes() for path in folder.glob("ablation.*")}
    assert {path.suffix[1:] for path in kept} == {"md", "csv", "json", "jsonl", "png"}
    succeed(*flags, "--seeds=0,1")
    assert {path: path.read_bytes() for path in folder.glob("ablation.*")} == kept
