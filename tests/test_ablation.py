"""Ablation studies: variations, statistics, resumption, seeds that train at once."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

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
from ddaebm_jax.diagnostics import energy_gaps_by_t
from ddaebm_jax.errors import DivergedError, InputError
from ddaebm_jax.evaluation import ablation, pictures
from ddaebm_jax.models import Players
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


def test_named_studies_change_these_fields():
    assert variations(["paper", "schedule"], recipe("plane")) == {
        "full": {},
        "no latent": {"game.latent": False},
        "no posterior": {"game.posterior": False},
        "reverse KL": {"game.divergence": "reverse_kl"},
        "T = 1": {"diffusion.num_steps": 1},
        "T = 2": {"diffusion.num_steps": 2},
        "T = 8": {"diffusion.num_steps": 8},
        "variance = vp": {"diffusion.variance": "vp"},
        "variance = geometric": {
            "diffusion.variance": "geometric",
            "diffusion.beta_min": 1e-4,
            "diffusion.beta_max": 0.999,
        },
        "time = lsun": {"diffusion.time": "lsun", "diffusion.min_posterior_var": 1e-4},
        "time = log_snr": {"diffusion.time": "log_snr"},
        "time = karras": {"diffusion.time": "karras"},
        "time = equal_cost": {"diffusion.time": "equal_cost"},
        "levels move": {"levels.move_at": (1000, 2000, 3000, 4000, 5000, 6000)},
    }
    coloured = {"full": {}, "coloured noise": {"data.whiten": True}}
    assert variations(["noise"], recipe("table")) == coloured
    config = recipe("table")
    config.data.whiten = True
    white = {"full": {}, "white noise": {"data.whiten": False}}
    assert variations(["noise"], config) == white


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


def test_figures_against_a_number_that_varies():
    steps = {4: 0.0, 8: 1.0, 2: 3.0}
    records = {
        "full" if num == 4 else f"T = {num}": [
            record(seed, a=mean + seed) | {"fields": {"num_steps": num}}
            for seed in (0, 1)
        ]
        for num, mean in steps.items()
    }
    records["full"][0]["fields"] = {}
    # A single value, and one that is no number, are no curve.
    pair = [record(0, a=5.0), record(1, a=6.0)]
    other, kind = {"gamma": 0.1, "num_steps": 3}, {"time": "karras"}
    records["other"] = [one | {"fields": other} for one in pair]
    records["kind"] = [one | {"fields": kind} for one in pair]
    recipe = {"num_steps": 4, "gamma": 0.02, "time": "lsun"}
    figures = ablation.summarize(records)
    ((field, (values, found)),) = ablation.against_fields(
        figures, records, recipe
    ).items()
    assert field == "num_steps" and values == [2, 4, 8]
    np.testing.assert_allclose(found["a"], [[3.5, 0.5], [0.5, 0.5], [1.5, 0.5]])


# --- Runs -----------------------------------------------------------------------


def test_seeds_that_train_at_once_equal_runs_alone():
    """In the plane, with weighted negatives in the second half of the run."""
    game = {"num_negatives": 2, "defensive": 0.5, "negatives_from": 0.5}
    config = small(**{f"game__{k}": v for k, v in game.items()}, train__num_steps=4)
    config.train.steps_per_dispatch = 2
    experiments = [experiment_lib.build(varied(config, {}, seed)) for seed in (3, 5)]
    with quick.compilation():
        together = list(many.train(experiments, together=2))
        assert [line["step"] for line in together[1].metrics] == [2, 4]
        for run, experiment in zip(together, experiments, strict=True):
            dispatcher = dispatch.Dispatcher(experiment)
            state = dispatcher.init()
            for _ in range(2):
                state, metrics, _ = dispatcher(state, 2)
            expected = energy_gaps_by_t(jax.device_get(metrics))
            assert run.metrics[-1].pop("step") == 4
            assert_trees_close(run.metrics[-1], expected, rtol=1e-3, atol=1e-4)
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


def test_runs_on_images_train_one_by_one(tmp_path: Path, monkeypatch):
    """A killed study goes on in the run directory; a run that fails ends alone."""
    calls: list[tuple[int, Path]] = []

    def train(config, folder):
        calls.append((config.seed, folder))
        folder.mkdir(parents=True, exist_ok=True)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if config.seed == 2:
            raise DivergedError("step 3 is NaN")
        metrics = {"step": 5, "energy/loss": 1.0, "energy/gap_t1": 2.0}
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        figures = {"a": 1.0 + config.seed, "where": "cpu", "bad": math.nan}
        resumed = 3 if len(calls) == 3 else 0
        return {"figures": figures, "seconds": 7.0, "resumed_from_step": resumed}

    drawn = {"images": np.zeros((16, 8, 8, 1), np.uint8)}
    of_run = experiment_lib.build(recipe("digits"))
    loaded = SimpleNamespace(experiment=of_run, variables=Players({}, {}, {}))
    monkeypatch.setattr(study, "loop", SimpleNamespace(train=train))
    monkeypatch.setattr(study, "load_run", lambda _: loaded)
    monkeypatch.setattr(pictures, "panel", lambda *_: drawn)
    args = recipe("digits"), {"full": {}}, [0, 1, 2], tmp_path
    with pytest.raises(KeyboardInterrupt):
        study.run(*args)
    found = study.run(*args)
    assert [seed for seed, _ in calls] == [0, 1, 1, 2]
    assert calls[1] == calls[2]
    runs = found["full"]
    assert [one["figures"] for one in runs] == [{"a": 1.0}, {"a": 2.0}, {}]
    # The time of a part of a run is not told.
    assert [one["seconds"] for one in runs] == [7.0, None, None]
    assert [one["fault"] for one in runs] == [None, None, "step 3 is NaN"]
    panel = study.panels(tmp_path, found)["full"]
    assert panel["steps"].tolist() == [5] and panel["gaps"].tolist() == [[2.0]]


def test_a_pilot_without_levels_fails_alone(tmp_path: Path, monkeypatch):
    def with_times(configs, sources):
        if any(config.seed == 1 for config in configs):
            raise DivergedError("no levels")
        return [varied(one, {"diffusion.times": times}, one.seed) for one in configs]

    times = (0.001, 0.1, 0.3, 0.6, 0.99)
    monkeypatch.setattr(study.pilot, "with_times", with_times)
    config = small(train__num_steps=4)
    config.evaluation.num_samples = 100
    with quick.compilation():
        changes = {"time = equal_cost": {"diffusion.time": "equal_cost"}}
        good, bad = study.run(config, changes, [0, 1], tmp_path)["time = equal_cost"]
    assert good["fault"] is None and good["figures"]["jensen_shannon"] > 0
    assert good["times"] == list(times) and good["seconds"] > 0
    assert bad["fault"] == "no levels" and bad["figures"] == {}


def test_the_command_writes_tables_and_pictures(tmp_path: Path):
    folder = tmp_path / "study"
    flags = [*tiny(str(PLANE)), *flags_of({"train.num_steps": 20})]
    flags += ["--mode=ablate", "--vary=game.gamma=0.01,0.1", f"--workdir={folder}"]
    first = succeed(*flags, "--seeds=0,1")
    assert "| game.gamma = 0.01 |" in first.out and "jensen_shannon" in first.out
    kept = {path: path.read_bytes() for path in folder.glob("ablation.*")}
    assert {path.suffix[1:] for path in kept} == {"md", "csv", "json", "jsonl", "png"}
    assert (folder / "ablation-game.gamma.png").exists()
    succeed(*flags, "--seeds=0,1")
    assert {path: path.read_bytes() for path in folder.glob("ablation.*")} == kept
