"""Faults of a run: signals, numbers that are not finite, full disks, two at once."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli import assert_error, tiny
from helpers import assert_trees_equal, differ
from processes import Started
from runs import final_state, hooked, lines, newest_step, poisoned, small, steps, train

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.evaluation import metrics, pictures
from ddaebm_jax.training.preemption import Stopped
from ddaebm_jax.training.run_directory import LOCK_FILE, check, lock

# --- Signals ----------------------------------------------------------------------


def signal_at(step: int, number: signal.Signals, times: int = 1, visit: int = 1):
    """Signal this process when the steps up to `step` are under way.

    When they are for the n-th time, n being `visit`.
    """
    visits = []

    def after(reached: int) -> None:
        if reached == step:
            visits.append(step)
            for _ in range(times if len(visits) == visit else 0):
                os.kill(os.getpid(), number)

    return hooked(after=after)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_with_everything_saved(
    unbroken: Path, tmp_path: Path, number: signal.Signals, exit_code: int
):
    """Between two checkpoints and two reports; then the run equals an unbroken one."""
    before = signal.getsignal(number)
    with (
        signal_at(12, number),
        pytest.raises(Stopped, match="after step 12 of 24, which is saved") as stopped,
    ):
        train(small(), tmp_path)
    assert stopped.value.exit_code == exit_code
    assert signal.getsignal(number) is before
    assert train(small(), tmp_path)["resumed_from_step"] == 12
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    # The report that spans the resume is the mean of the steps since.
    assert steps(tmp_path) == steps(unbroken)
    assert [line for line in lines(tmp_path) if line["step"] != 16] == [
        line for line in lines(unbroken) if line["step"] != 16
    ]


def test_a_signal_saves_no_state_that_is_not_finite(tmp_path: Path):
    stopped = pytest.raises(Stopped, match="after step 8 of 24")
    with poisoned(8), signal_at(12, signal.SIGTERM), stopped:
        train(small(), tmp_path)
    assert int(final_state(tmp_path).step) == 8


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path):
    with signal_at(12, signal.SIGINT, times=2), pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path)
    # A save under way may still end; it was not waited for.
    end = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "8").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert int(final_state(tmp_path).step) == 8


def test_a_signal_in_an_evaluation_ends_the_run_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And after the next dispatch, whose step is saved."""

    def evaluate(*_: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"figure": 1.0}

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    with pytest.raises(Stopped, match="after step 16 of 24"):
        train(small(train__evaluate_every=12), tmp_path, figures=True)
    assert int(final_state(tmp_path).step) == 16
    assert "evaluation/figure" in lines(tmp_path)[1]


def test_a_signal_in_the_last_evaluation_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def evaluate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it was not left at once")

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path, figures=True)
    assert train(small(), tmp_path)["resumed_from_step"] == 24


def test_the_command_line_ends_with_0_after_sigterm(tmp_path: Path):
    flags = tiny(
        "configs/gaussians25.py", train__num_steps=10**6, train__checkpoint_every=10**6
    )
    file = tmp_path / "run" / "metrics.jsonl"
    with Started(*flags, f"--workdir={tmp_path / 'run'}") as process:
        process.until(lambda: file.exists() and file.read_text() != "")
        process.send_signal(signal.SIGTERM)
        code, _, err = process.ended(60.0)
    assert code == 0, err
    step = int(final_state(tmp_path / "run").step)
    assert f"stopped by SIGTERM after step {step} of 1000000, which is saved" in err
    assert "Traceback" not in err


# --- Numbers that are not finite --------------------------------------------------


def test_a_run_goes_back_with_fresh_noise(
    unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = small(train__report_every=4)
    with poisoned(16):
        assert train(config, tmp_path / "run")["rollbacks"] == 1
    (message,) = [m for m in caplog.messages if "back to step" in m]
    assert message.startswith("energy/")
    assert "not finite at step 17, t = 1, 2, 3" in message
    assert "back to step 16, with fresh noise (1 of at most 3 times)" in message
    assert steps(tmp_path / "run") == [4, 8, 12, 16, 20, 24, 24]
    state = final_state(tmp_path / "run")
    assert differ(state.variables, final_state(unbroken).variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

    # Resumed, it keeps the fresh noise.
    again = tmp_path / "again"
    with (
        poisoned(16),
        signal_at(20, signal.SIGTERM, visit=2),
        pytest.raises(Stopped, match="after step 20"),
    ):
        train(config, again)
    assert train(config, again)["rollbacks"] == 1
    assert_trees_equal(final_state(again), state)


def test_a_run_goes_back_to_its_beginning_so_often_and_no_more(tmp_path: Path):
    with poisoned(4):
        report = train(small(), tmp_path / "once")
    assert report["rollbacks"] == 1 and report["step"] == 24
    assert steps(tmp_path / "once") == [8, 16, 24, 24]

    with poisoned(4, 12, 12), pytest.raises(TrainingError) as error:
        train(small(recovery__max_rollbacks=2), tmp_path / "often")
    message = str(error.value)
    assert "energy/loss" in message and "not finite at step 13, t = " in message
    assert "recovery.max_rollbacks is 2, and the run has gone back 2 times" in message
    assert "step 8 is kept" in message
    state = final_state(tmp_path / "often")
    assert int(state.step) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# --- Writing that fails -----------------------------------------------------------


def test_pictures_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "evaluate", lambda *_: {})
    (tmp_path / "config.json").write_text(config_lib.to_json(small()))
    (tmp_path / "samples").write_text("not a folder")
    train(small(train__picture_every=16), tmp_path, figures=True)
    messages = [m for m in caplog.messages if "cannot be drawn: " in m]
    assert len(messages) == 4 and "plane_00000016.png" in messages[0]
    assert (tmp_path / "samples").read_text() == "not a folder"


def fail(*_: Any) -> None:
    """Stands for what does not work on some machine."""
    raise RuntimeError("out of luck")


def test_evaluations_and_pictures_that_fail_cost_no_step(
    unbroken: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """On the way they are warned of; at the end the same command evaluates again."""
    config = small(train__evaluate_every=8, train__picture_every=8)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "evaluate", fail)
        patch.setattr(pictures, "draw_pictures", fail)
        with pytest.raises(TrainingError, match=r"out of luck\); step 24 is saved"):
            train(config, tmp_path, figures=True)
    for step in (8, 16):
        assert f"the evaluation of step {step} failed: RuntimeError" in caplog.text
    for step in (8, 16, 24):
        assert f"the pictures of step {step} cannot be drawn: Runtime" in caplog.text
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    assert train(config, tmp_path)["resumed_from_step"] == 24
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize("what", [(metrics, "evaluate"), (pictures, "draw_pictures")])
def test_a_step_is_saved_before_it_is_evaluated_or_drawn(
    what: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed in its midst, a run begins with the same evaluation again."""
    config = small(train__evaluate_every=16, train__picture_every=16)
    nothing = {"evaluate": {}, "draw_pictures": pictures.Pictures({}, {})}

    def kill(*_: Any) -> None:
        assert newest_step(tmp_path) == 16
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module, name in ((metrics, "evaluate"), (pictures, "draw_pictures")):
            patch.setattr(module, name, lambda *_, name=name: nothing[name])
        patch.setattr(*what, kill)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, figures=True)
    with poisoned(20):  # Which goes back to it, and keeps the evaluation.
        assert train(config, tmp_path)["resumed_from_step"] == 16
    assert steps(tmp_path) == [8, 16, 16, 24, 24]


def test_a_report_that_cannot_be_written(unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "report.json").mkdir()
    with pytest.raises(TrainingError, match=r"report\.json cannot be written"):
        train(small(), tmp_path / "run")


def test_a_full_disk_ends_the_run_which_goes_on_with_room(tmp_path: Path):
    workdir = tmp_path / "run"
    flags = tiny(
        "configs/gaussians25.py",
        train__num_steps=10**6,
        train__steps_per_dispatch=100,
        train__report_every=1_000,
        train__checkpoint_every=1_000,
    )
    with Started(*flags, f"--workdir={workdir}") as process:
        process.until(lambda: newest_step(workdir) > 0)
        process.limit_files(10)
        assert_error(process.ended(), "could not be written", "are intact", "repeat")
    intact = newest_step(workdir)
    with Started(*flags, f"--workdir={workdir}") as process:
        process.until(lambda: newest_step(workdir) > intact)


# --- One run a directory ----------------------------------------------------------


def test_a_directory_is_locked_for_one_run(tmp_path: Path):
    with lock(tmp_path / "run"):
        check(tmp_path / "run", small())  # Only locked, it is new.
        with pytest.raises(InputError, match="in use by another run"):
            train(small(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with lock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()


@pytest.mark.parametrize(
    "place", [lambda path: path.symlink_to("/dev/null"), lambda path: path.mkdir()]
)
def test_a_directory_that_cannot_be_locked(place: Any, tmp_path: Path):
    place(tmp_path / LOCK_FILE)
    with pytest.raises(InputError, match="cannot be written"):
        train(small(), tmp_path)
