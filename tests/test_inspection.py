"""The inspection of a run shows its state and changes nothing."""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import pytest
from cli import files
from failing import state_of
from runs import small

from ddaebm_jax.commands import inspect as inspection
from ddaebm_jax.errors import InputError
from ddaebm_jax.training import run_directory
from ddaebm_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of 16 steps leaves, with a smaller state."""
    workdir = tmp_path_factory.mktemp("inspected") / "released_gaussians25" / "run"
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for step in (8, 16):
            checkpoints.save(jax.tree.map(jnp.asarray, state_of(step)), {})
    run_directory.write_config(workdir, small(train__num_steps=16))
    run_directory.write_report(workdir, {"step": 16, "figures": {"fid": 1.5}})
    (workdir / "metrics.jsonl").write_text('{"step": 8}\n{"step": 16, "loss": 0.5}\n')
    return workdir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def _inspect(workdir: Path, intact: bool = True) -> str:
    before = files(workdir)
    found = inspection.inspect(workdir)
    assert found.intact == intact, found.text
    assert files(workdir) == before
    return found.text + "\n"


def test_an_inspection_shows_config_checkpoints_and_metrics(trained: Path):
    text = _inspect(trained)
    assert re.search(r"steps +16 of 16\n", text)
    assert re.search(r"checkpoints/8 +[\d.]+ MiB  20\d\d-.*intact\n", text)
    assert re.search(r"checkpoints/16 .* intact\n", text)
    assert re.search(r"\nlast metrics\n  step +16\n", text)
    assert re.search(r"\nreport\.json\n  step +16\n  fid +1\.5\n", text)
    assert re.search(r"process +none\n", text)


def test_damage_is_shown_beside_the_rest(copy: Path):
    (copy / "checkpoints/16/info/metadata").write_text("{}}")
    shutil.copytree(
        copy / "checkpoints/8", copy / "checkpoints/10.orbax-checkpoint-tmp"
    )
    shutil.copytree(copy / "checkpoints/8", copy / "best/8")
    (copy / "damaged/checkpoints-7").mkdir(parents=True)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "a\\u001b[31m": 1.5}\n{"step": 60, "cut')
    (copy / "report-1.json").write_text("[1]")
    text = _inspect(copy, intact=False)
    assert re.search(r"checkpoints/16 .*DAMAGED: ", text)
    assert re.search(r"checkpoints/8 .* intact\n", text)
    assert re.search(r"best/8 .* intact\n", text)
    assert re.search(r"checkpoints/10.orbax-checkpoint-tmp .* unfinished\n", text)
    assert re.search(r"damaged/checkpoints-7 .* set aside\n", text)
    assert re.search(r"steps +50 of 16\n", text)
    assert "\x1b" not in text and "[31m" in text and "unusable" in text


def test_an_unusable_config_does_not_hide_the_rest(copy: Path):
    (copy / "config.json").write_text("{}")
    text = _inspect(copy)
    assert re.search(r"config +unusable", text)
    assert re.search(r"checkpoints/16 .* intact\n", text)


def test_a_running_process_is_shown_and_not_disturbed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it deletes meanwhile is neither shown nor damage."""
    verify = Checkpoints.verify

    def deleted(checkpoints: Checkpoints, step: int, best: bool) -> None:
        if step == 8:
            shutil.rmtree(copy / "checkpoints/8")
        verify(checkpoints, step, best)

    held = filelock.FileLock(copy / inspection.LOCK_FILE)
    with held, monkeypatch.context() as patch:
        assert re.search(r"process +running\n", _inspect(copy))
        patch.setattr(Checkpoints, "verify", deleted)
        found = inspection.inspect(copy)
    assert found.intact and "checkpoints/8 " not in found.text
    assert re.search(r"process +none\n", _inspect(copy))


def test_pipes_are_not_waited_for(copy: Path):
    for name in ("metrics.jsonl", "lock", "report.json"):
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
    signal.alarm(60)
    text = _inspect(copy)
    signal.alarm(0)
    assert re.search(r"unusable +.*not a regular file", text)


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"holds no config\.json"):
            inspection.inspect(path)
