"""The loop: a resumed run equals an unbroken one, bit for bit, whatever stops it."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli import files, succeed, tiny
from helpers import assert_trees_equal
from PIL import Image
from processes import Started
from runs import (
    final_state,
    hooked,
    lines,
    newest_step,
    poisoned,
    small,
    small_images,
    steps,
    train,
)

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import image_quality, metrics, pictures
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoints, dispatch, reports, run_directory
from ddaebm_jax.training.preemption import Stopped

# --- Resumed equals unbroken ------------------------------------------------------


def test_a_resumed_run_is_bit_identical(unbroken: Path, tmp_path: Path):
    for num_steps in (8, 16, 24):
        report = train(small(train__num_steps=num_steps), tmp_path)
    assert report["resumed_from_step"] == 16
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    assert lines(tmp_path) == lines(unbroken)


def test_a_resumed_run_of_weighted_negatives_is_bit_identical(tmp_path: Path):
    """Killed before, and resumed across, the step from which K are played."""
    fields = {"game__num_negatives": 2, "game__negatives_from": 0.5}
    fields |= {"game__defensive": 0.5, "model__confinement": 1.0}
    whole, broken = small(**fields), tmp_path / "broken"
    train(whole, tmp_path / "whole")

    def stop(step: int) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with hooked(after=stop), pytest.raises(Stopped):
        train(whole, broken)
    assert newest_step(broken) == 12
    train(whole, broken)
    assert_trees_equal(final_state(broken), final_state(tmp_path / "whole"))
    shares = [line.get("energy/effective_negatives") for line in lines(broken)]
    assert shares[0] == 1.0 and shares[2] < 1.0


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    unbroken: Path, tmp_path: Path
):
    (tmp_path / "config.json.partial").write_text("{")  # Killed while writing it.
    run_directory.check(tmp_path, small())
    (tmp_path / "config.json").write_text(config_lib.to_json(small()))
    (tmp_path / "checkpoints").mkdir()  # Killed right after making it.
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n{"step": 16, "ener')
    train(small(), tmp_path)
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    assert steps(tmp_path) == steps(unbroken)


def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path: Path):
    """SIGKILL between checkpoints, and while one is being written."""
    flags = tiny(
        "configs/gaussians25.py",
        train__num_steps=600,
        train__steps_per_dispatch=5,
        train__report_every=50,
        train__checkpoint_every=20,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def unfinished() -> bool:
        return any(broken.glob("checkpoints/*tmp*"))

    succeed(*flags, f"--workdir={whole}")
    left_unfinished, wait = 0, random.Random(0)
    for kill in range(3):
        before = newest_step(broken)
        with Started(*flags, f"--workdir={broken}") as process:
            process.until(
                lambda before=before: newest_step(broken) > before, every=0.0005
            )
            if kill % 2:
                time.sleep(wait.uniform(0.0, 0.05))
            else:
                process.until(unfinished, every=0.0005)
            process.send_signal(signal.SIGKILL)
        left_unfinished += unfinished()
    assert left_unfinished >= 1, "no kill came while a checkpoint was being written"
    assert 0 < newest_step(broken) < 600
    succeed(*flags, f"--workdir={broken}")
    assert_trees_equal(final_state(broken), final_state(whole))
    assert not unfinished()
    assert steps(broken) == steps(whole)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images, 13 of them to train on: batches of 8 cross epochs."""
    path = tmp_path / "images"
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 10), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{number:02}.png")
    return path


def test_a_run_on_images_resumes_bit_identical(folder: Path, tmp_path: Path):
    """Killed a step after a checkpoint within an epoch, with batches read ahead.

    A run that goes back gets the same images again; changed ones are refused.
    """
    fields = {
        "train__num_steps": 6,
        "train__report_every": 1,
        "train__checkpoint_every": 3,
    }
    config = small_images(folder, data__on_device=False, **fields)

    def kill(step: int) -> None:
        if step == 5:
            raise RuntimeError("killed")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole)
    with hooked(after=kill), pytest.raises(RuntimeError, match="killed"):
        train(config, broken)
    assert train(config, broken)["resumed_from_step"] == 3
    assert_trees_equal(final_state(broken), final_state(whole))
    assert lines(broken) == lines(whole)

    given: dict[int, list[np.ndarray]] = {}
    with poisoned(4, seen=lambda step, x: given.setdefault(step, []).append(x)):
        assert train(config, tmp_path / "back")["rollbacks"] == 1
    repeated = {step: batches for step, batches in given.items() if len(batches) > 1}
    assert list(repeated) == [3, 4, 5]
    for first, second in repeated.values():
        np.testing.assert_array_equal(first, second)

    before = files(broken)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(folder / "03.png")
    with pytest.raises(InputError, match=r"not those that .* was trained on"):
        train(config, broken)
    assert files(broken) == before


# --- Beginning and end --------------------------------------------------------------


def test_without_a_latent_a_run_works_from_end_to_end(tmp_path: Path):
    config = small(train__num_steps=4, game__latent=False)
    report = train(config, tmp_path, figures=True)
    assert report["parameters"]["posterior"] == 0
    assert 0 < report["figures"]["jensen_shannon"] < 1
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "plane_00000004.png",
        "steps_00000004.png",
    }


# --- The config of a run ------------------------------------------------------------


def test_changes_of_the_config_are_reported_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(small(train__num_steps=8), tmp_path)
    caplog.set_level("INFO")
    train(small(train__num_steps=16, train__report_every=4), tmp_path)
    assert [m for m in caplog.messages if m.startswith("resuming with")] == [
        "resuming with train.num_steps = 16 (was 8)",
        "resuming with train.report_every = 4 (was 8)",
    ]
    assert run_directory.read_config(tmp_path).train.num_steps == 16
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"game\.gamma \(was 0\.02, is 0\.5\)"):
        train(small(game__gamma=0.5), tmp_path)
    with pytest.raises(InputError, match=r"at step 16, beyond train\.num_steps 10"):
        train(small(train__num_steps=10), tmp_path)
    assert files(tmp_path) == before


def test_a_run_whose_rates_decay_cannot_change_its_length(tmp_path: Path):
    decays = {"optimizer__schedule": "cosine"}
    config = small(train__num_steps=4, **decays)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    before = files(tmp_path)
    message = rf"train\.num_steps \(was 4, is 8\).*--init_from={tmp_path} "
    with pytest.raises(InputError, match=message):
        train(small(train__num_steps=8, **decays), tmp_path)
    assert files(tmp_path) == before


def test_a_new_run_starts_from_the_averages_of_another(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under other rates and on other data; the other run is not needed for long."""
    origin = tmp_path / "origin"
    shutil.copytree(unbroken, origin)
    monkeypatch.chdir(tmp_path)
    others = {"optimizer__learning_rate": 1e-5, "data__name": "moons", "seed": 5}
    config = small(train__init_from="origin", train__num_steps=8, **others)
    seen = []

    def look(state: TrainState, batches: Any) -> TrainState:
        seen.append(jax.device_get(state))
        return state

    with hooked(before=look):
        train(config, tmp_path / "run")
    start, expected = seen[0], final_state(unbroken)
    kept = run_directory.read_config(tmp_path / "run").train.init_from
    assert start.step == 0 and kept == str(origin)
    assert_trees_equal(start.variables, expected.ema)
    assert_trees_equal(start.ema, expected.ema)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(start.opt_energy))
    shutil.rmtree(origin)
    config.train.num_steps = 16
    assert train(config, tmp_path / "run")["resumed_from_step"] == 8
    before = files(tmp_path)
    for changed, message in (
        (small(train__num_steps=16, **others), r"train\.init_from \(was '/.*, is ''\)"),
        (config, r"train\.init_from, .*origin: .*config\.json cannot be read"),
    ):
        workdir = tmp_path / ("new" if changed is config else "run")
        with pytest.raises(InputError, match=message):
            train(changed, workdir)
    assert files(tmp_path) == before and not (tmp_path / "new").exists()


def test_other_networks_do_not_start_from_a_run(unbroken: Path, tmp_path: Path):
    config = small(train__init_from=str(unbroken), model__mlp__hidden=(8, 9))
    message = r"init_from, .*: energy/params/\S+ is float32\[8.*\] there and float32\[9"
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "samples"])
def test_a_run_does_not_write_through_links_out_of_its_directory(
    name: str, tmp_path: Path
):
    workdir, outside = tmp_path / "run", tmp_path / "precious"
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(small()))
    outside.write_text("lines\n")
    (workdir / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{name} is a link out of the run directory"):
        train(small(), workdir)
    assert outside.read_text() == "lines\n"
    (workdir / name).unlink()
    (workdir / "mine").write_text("")
    (workdir / name).symlink_to(workdir / "mine")  # Within it: the user's own affair.
    run_directory.check(workdir, small())


# --- Reports ------------------------------------------------------------------------


def test_reports_come_while_the_next_steps_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Metrics are fetched one dispatch late, except around a state that is kept.

    And before a compilation; or seconds would count as those of other steps.
    """
    happened: list[str] = []
    add = reports.Reports.add

    def added(self, step, length, metrics):
        happened.append(f"metrics {step}")
        add(self, step, length, metrics)

    monkeypatch.setattr(reports.Reports, "add", added)
    with hooked(after=lambda step: happened.append(f"steps {step}")):
        config = small(train__num_steps=21, train__checkpoint_every=12)
        compiles = lambda _, length: length == 1  # noqa: E731
        monkeypatch.setattr(dispatch.Dispatcher, "compiles", compiles)
        train(config, tmp_path)
    assert happened == [
        *("steps 4", "steps 8", "metrics 4", "metrics 8", "steps 12", "metrics 12"),
        *("steps 16", "steps 20", "metrics 16", "metrics 20", "steps 21", "metrics 21"),
    ]


def test_the_state_of_the_lowest_fid_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of those that were evaluated during training, and of the last one."""
    meter = image_quality.Meter(None, None, {"preprocessing": "tf"}, 0)
    monkeypatch.setattr(image_quality, "open_meter", lambda _: meter)
    nothing = pictures.Pictures({}, {})
    monkeypatch.setattr(pictures, "draw_pictures", lambda *_: nothing)
    fids = iter([3.0, 1.0, 2.0, 0.5])
    about = {"num_images": 10, "num_reference": 20, "preprocessing": "tf"}
    monkeypatch.setattr(metrics, "evaluate", lambda *_: {"fid": next(fids), **about})

    def best(num_steps: int) -> tuple[int, float]:
        config = small(train__num_steps=num_steps, train__evaluate_every=8)
        train(config, tmp_path, figures=True)
        saved = checkpoints.Checkpoints(tmp_path, read_only=True)
        (step,) = saved.steps(best=True)
        fid = saved.info(step, best=True)["fid"]
        saved.close()
        return step, fid

    assert best(24) == (16, 1.0)
