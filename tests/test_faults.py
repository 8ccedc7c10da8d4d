"""Faults of a run: signals, numbers not finite, saves that fail, two at once."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from cli import MAIN, ROOT, environment, tiny
from ddaebm_jax.training.locking import LOCK_FILE, lock
from helpers import assert_trees_equal, differ
from processes import Started
from stepping import digits
from test_train import _config, _final_state

from ddaebm_jax import experiment as experiments
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.training import (
    checkpoint_files,
    dispatching,
    measuring,
    recovery,
    reports,
    run_directory,
)
from ddaebm_jax.training import (
    loop as train,
)
from ddaebm_jax.training.preemption import Interrupted


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its rates, which are never the same."""
    text = (workdir / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    rates = ("steps_per_second", "images_per_second")
    return [{k: v for k, v in line.items() if k not in rates} for line in found]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train.train(_config(), workdir)
    return workdir


# --- Signals ----------------------------------------------------------------------


def stop_at(
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
    times: int = 1,
    visit: int = 1,
) -> None:
    """Makes the process signal itself when it has started the steps up to `step`.

    When it comes there for the n-th time, n being `visit`.
    """
    dispatch, visits = dispatching.Dispatcher.__call__, []

    def signalling(self, state, length, batches=None):
        result = dispatch(self, state, length, batches)
        if int(result[0].step) == step:
            visits.append(step)
            if len(visits) == visit:
                for _ in range(times):
                    os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(dispatching.Dispatcher, "__call__", signalling)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_with_all_saved(
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    exit_code: int,
):
    """Between two checkpoints and two reports; then the run goes on as if unbroken."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, number, 12)
        with pytest.raises(Interrupted, match="after step 12 of 24, which is") as error:
            train.train(_config(), tmp_path / "run")
    assert error.value.exit_code == exit_code
    assert signal.getsignal(number) is before
    assert int(_final_state(tmp_path / "run").step) == 12
    report = train.train(_config(), tmp_path / "run")
    assert report["resumed_from_step"] == 12
    assert_trees_equal(_final_state(tmp_path / "run"), _final_state(unbroken))
    assert lines(tmp_path / "run") == lines(unbroken)


def test_a_second_ctrl_c_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGINT, 12, times=2)
        with pytest.raises(KeyboardInterrupt):
            train.train(_config(), tmp_path / "run")
    # What was being saved may go on; it was not waited for.
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "8").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert int(_final_state(tmp_path / "run").step) == 8


@pytest.mark.parametrize("as_an_error", [False, True])
def test_a_signal_after_the_last_step_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_an_error: bool
):
    """Nothing is lost then: figures and pictures are made by the next start."""

    def signalled(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            if as_an_error:
                raise ValueError("something was raised") from error
            raise

    with monkeypatch.context() as patch:
        patch.setattr(figures, "evaluate", signalled)
        with pytest.raises(Interrupted, match="after step 24 of 24"):
            train.train(_config(), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()
    train.train(_config(), tmp_path / "run")
    assert (tmp_path / "run" / "report.json").exists()


def test_a_signal_in_the_last_steps_ends_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 24)
        with pytest.raises(Interrupted, match="after step 24 of 24"):
            train.train(_config(), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("when", "as_an_error"),
    [
        ("before", False),
        ("while evaluating", False),
        ("while evaluating", True),
        ("while drawing", False),
    ],
)
def test_what_a_signal_kept_from_being_done_is_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, as_an_error: bool
):
    """Evaluation and pictures may take longer than a preempted process has."""
    config = _config(train__evaluate_every=12, train__picture_every=12)
    train.train(config, tmp_path / "whole")

    def signalled(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            if as_an_error:  # As JAX does in some of its callbacks.
                raise ValueError("something was raised") from error
            raise
        raise AssertionError("it was not left at once")

    with monkeypatch.context() as patch:
        if when == "before":
            stop_at(patch, signal.SIGTERM, 12)
        else:
            name = "evaluate" if when == "while evaluating" else "draw_pictures"
            patch.setattr(figures, name, signalled)
        with pytest.raises(Interrupted, match="after step 12 of 24"):
            train.train(config, tmp_path / "run")
    before = [line["step"] for line in lines(tmp_path / "run")]
    assert before == ([8, 12] if when == "while drawing" else [8])
    train.train(config, tmp_path / "run")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    pictures = [
        sorted(path.name for path in (tmp_path / name / "samples").iterdir())
        for name in ("run", "whole")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4


def test_the_command_line_ends_with_0_after_sigterm(tmp_path: Path):
    flags = tiny(
        "configs/gaussians25.py", train__num_steps=10**6, train__checkpoint_every=10**6
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    with Started(*flags, f"--workdir={tmp_path / 'run'}") as process:
        process.until(lambda: metrics.exists() and metrics.read_text() != "")
        process.send_signal(signal.SIGTERM)
        code, _, err = process.ended(60.0)
    assert code == 0, err
    step = int(_final_state(tmp_path / "run").step)
    assert f"stopped by SIGTERM after step {step} of 1000000, which is saved" in err
    assert "Traceback" not in err


# --- Numbers that are not finite --------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Puts a NaN into the energy's weights before these steps, once each."""
    dispatch, left = dispatching.Dispatcher.__call__, list(steps)

    def poisoned(self, state, length, batches=None):
        if left and int(state.step) == left[0]:
            left.pop(0)
            energy = jax.tree.map(lambda x: x * jnp.nan, state.variables.energy)
            state = state.replace(variables=state.variables._replace(energy=energy))
        return dispatch(self, state, length, batches)

    monkeypatch.setattr(dispatching.Dispatcher, "__call__", poisoned)


def test_a_run_goes_back_with_fresh_noise(
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    fields = {"train__report_every": 4}
    with monkeypatch.context() as patch:
        poison(patch, [16])
        report = train.train(_config(**fields), tmp_path / "run")
    assert report["rollbacks"] == 1
    (said,) = [m for m in caplog.messages if "back to step" in m]
    assert said.startswith("energy/") and "not finite at step 17, t = 1, 2, 3" in said
    assert "back to step 16, with fresh noise (1 of at most 3 times)" in said
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert steps == [4, 8, 12, 16, 20, 24, 24]
    whole, state = _final_state(unbroken), _final_state(tmp_path / "run")
    assert differ(state.variables, whole.variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

    # Resumed, it keeps the fresh noise.
    with monkeypatch.context() as patch:
        poison(patch, [16])
        stop_at(patch, signal.SIGTERM, 20, visit=2)
        with pytest.raises(Interrupted, match="after step 20"):
            train.train(_config(**fields), tmp_path / "again")
    assert train.train(_config(**fields), tmp_path / "again")["rollbacks"] == 1
    assert_trees_equal(_final_state(tmp_path / "again"), state)


def test_a_run_goes_back_to_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        poison(patch, [4])
        report = train.train(_config(), tmp_path / "run")
    assert report["rollbacks"] == 1 and report["step"] == 24
    assert [line["step"] for line in lines(tmp_path / "run")] == [8, 16, 24, 24]


def test_a_run_that_goes_back_gets_the_same_images_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = digits(
        train__num_steps=6,
        train__steps_per_dispatch=1,
        train__checkpoint_every=2,
        train__report_every=2,
        train__picture_every=0,
        train__evaluate_every=0,
        train__tensorboard=False,
        parallel__num_devices=1,
    )
    given: dict[int, list[np.ndarray]] = {}
    dispatch, left = dispatching.Dispatcher.__call__, [3]

    def poisoned(self, state, length, batches=None):
        step = int(state.step)
        given.setdefault(step, []).append(batches)
        if 1 not in self._compiled:  # With little effort: it runs a few times.
            inputs = (state, *self._inputs, self._trial)
            inputs = (*inputs, self._layout.place_batches(batches))
            lowered = self._jitted.lower(*inputs, 1)
            self._compiled[1] = lowered.compile(compiler_options=quick._options())
        if left and step == left[0]:
            left.pop()
            energy = jax.tree.map(lambda x: x * jnp.nan, state.variables.energy)
            state = state.replace(variables=state.variables._replace(energy=energy))
        return dispatch(self, state, length, batches)

    monkeypatch.setattr(dispatching.Dispatcher, "__call__", poisoned)
    monkeypatch.setattr(figures, "evaluate", lambda *args: {})
    monkeypatch.setattr(measuring, "_draw", lambda *args: None)
    report = train.train(config, tmp_path / "run")
    assert report["rollbacks"] == 1
    assert sorted(given) == list(range(6))
    again = {step: batches for step, batches in given.items() if len(batches) > 1}
    assert list(again) == [2, 3]
    for first, second in again.values():
        np.testing.assert_array_equal(first, second)


def test_a_run_goes_back_so_often_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = _config(recovery__max_rollbacks=2)
    with monkeypatch.context() as patch:
        poison(patch, [12, 12, 12])
        with pytest.raises(TrainingError) as error:
            train.train(config, tmp_path / "run")
    said = str(error.value)
    assert "at step 13, t = " in said and "energy/loss" in said
    assert "recovery.max_rollbacks is 2, and the run has gone back 2 times" in said
    assert "step 8 is kept" in said
    state = _final_state(tmp_path / "run")
    assert int(state.step) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_energies_that_run_away_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fields = {"recovery__max_energy": 1e-9, "recovery__max_gap": 1e-9}
    train.train(_config(**fields), tmp_path / "run")
    said = [m for m in caplog.messages if "may be diverging" in m]
    assert len(said) == 3  # Once each, while it stays beyond.
    assert "step 8: energy/real is " in said[0]
    assert "beyond recovery.max_energy 1e-09" in said[0]
    caplog.clear()
    train.train(
        _config(recovery__max_energy=None, recovery__max_gap=None), tmp_path / "b"
    )
    assert not [m for m in caplog.messages if "diverging" in m]


def test_a_threshold_that_is_passed_again_is_warned_of_again():
    watch = recovery.EnergyWatch(10.0, None)

    def warnings(real: float) -> int:
        return len(watch.warnings({"energy/real": real, "energy/fake": 0.0}))

    assert [warnings(x) for x in (9.0, -11.0, 12.0, 3.0, 11.0)] == [0, 1, 0, 0, 1]


# --- Writing that fails -----------------------------------------------------------


def test_metrics_of_a_full_disk_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    metrics = reports.MetricsFile.__new__(reports.MetricsFile)
    metrics._path, metrics._waiting = full, []
    metrics._file = full.open("ab", buffering=0)
    metrics.write(1, {"a": 1.0})
    metrics.write(2, {"a": 2.0})
    assert len([m for m in caplog.messages if "cannot be written" in m]) == 1
    metrics._file.close()
    metrics._file = (tmp_path / "room.jsonl").open("ab", buffering=0)
    metrics.write(3, {"a": 3.0})
    metrics.close()
    found = reports.read_metrics(tmp_path / "room.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    assert "is whole again" in caplog.text


def test_a_run_killed_while_its_metrics_wait_leaves_no_gap(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
):
    """They wait when a checkpoint is taken, and memory is all that holds them."""

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def killed(self, state, length, batches=None):
        if int(state.step) >= 16:
            raise RuntimeError("killed")
        return dispatch(self, state, length, batches)

    dispatch = dispatching.Dispatcher.__call__
    with monkeypatch.context() as patch:
        patch.setattr(reports, "_write_all", full)
        patch.setattr(dispatching.Dispatcher, "__call__", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train.train(_config(), tmp_path / "run")
    assert lines(tmp_path / "run") == []
    report = train.train(_config(), tmp_path / "run")
    assert report["resumed_from_step"] == 16
    assert lines(tmp_path / "run") == lines(unbroken)


def test_pictures_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = _config(train__picture_every=8)
    train.train(_config(train__num_steps=8), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "samples")
    (tmp_path / "run" / "samples").write_text("not a folder")
    train.train(config, tmp_path / "run")
    said = [m for m in caplog.messages if "cannot be written" in m]
    assert len(said) == 2 and "pictures of step 16" in said[0]
    assert (tmp_path / "run" / "samples").read_text() == "not a folder"


class _Failing:
    """Stands for checkpoints; so many writes fail before one does not."""

    def __init__(self, failures: int) -> None:
        self.left, self.saved, self.waited = failures, [], 0

    def save(self, state: Any, info: dict) -> None:
        if self.left:
            self.left -= 1
            raise checkpoint_files.CheckpointWriteError("no space left")
        self.saved.append(state)

    def wait(self) -> None:
        self.waited += 1

    def check(self) -> None:
        pass

    def latest_step(self) -> int | None:
        return None


def test_a_save_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(recovery.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        recovery.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    checkpoints = _Failing(3)
    saver = recovery.Saver(checkpoints, 100.0)
    saver.save("a", {})
    assert saver.failing and not saver.due()
    now[0] = 1.5
    assert saver.due()
    saver.finish("b", {}, wait=False)
    assert saver.failing and not saver.due()
    saver.finish("c", {}, wait=True)
    assert checkpoints.saved == ["c"] and not saver.failing

    saver = recovery.Saver(_Failing(10**6), 100.0)
    with pytest.raises(TrainingError, match=r"for 1.. s .*no space left.*none yet"):
        saver.finish("a", {}, wait=True)
    with pytest.raises(TrainingError, match=r"for 0 s .recovery\.save_patience 0"):
        recovery.Saver(_Failing(1), 0).save("a", {})


def _in_small_room(script: str, kibibytes: int, tmp_path: Path) -> list[str]:
    """Returns a command that runs a script where `room` is a small file system."""
    room = tmp_path / "room"
    room.mkdir()
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs {room}"
    tried = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip("no file systems can be mounted here")
    return ["unshare", "-rm", "sh", "-c", f"cd {ROOT} && {mount} && {script}"]


@pytest.fixture(scope="module")
def small_run() -> Iterator[str]:
    flags = tiny(
        "configs/gaussians25.py",
        train__num_steps=100_000,
        train__checkpoint_every=20,
        train__keep_checkpoints=2,
        recovery__save_patience=20,
    )
    yield " ".join([sys.executable, str(MAIN), *(f"'{flag}'" for flag in flags)])


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, small_run: str):
    """Checkpoints fail, training goes on; with room again they are written."""
    script = textwrap.dedent(f"""
        {small_run} --workdir={{room}}/run 2>{{log}} &
        pid=$!
        until [ -d {{room}}/run/checkpoints/40 ] || ! kill -0 $pid; do sleep 0.2; done
        cat /dev/zero > {{room}}/filler 2>/dev/null
        until grep -q 'training goes on' {{log}} || ! kill -0 $pid; do sleep 0.2; done
        ls {{room}}/run/checkpoints > {{kept}}
        rm {{room}}/filler
        until grep -q 'written at last' {{log}} || ! kill -0 $pid; do sleep 0.2; done
        kill -TERM $pid
        wait $pid
        code=$?
        cp -r {{room}}/run {{copy}}
        exit $code
    """)
    log, kept, copy = tmp_path / "log", tmp_path / "kept", tmp_path / "copy"
    room = tmp_path / "room"
    script = script.format(room=room, log=log, kept=kept, copy=copy)
    command = _in_small_room(script, 3_000, tmp_path)
    result = subprocess.run(
        command, env=environment(), timeout=300, check=False, capture_output=True
    )
    said = log.read_text()
    assert result.returncode == 0, said
    assert "a checkpoint cannot be written" in said and "is intact" in said
    assert "a checkpoint is written at last" in said
    assert "Traceback" not in said
    assert any(name.isdigit() for name in kept.read_text().split())
    step = int(_final_state(copy).step)
    assert f"after step {step} of 100000, which is saved" in said
    reported = [line["step"] for line in lines(copy)]
    assert reported == list(range(10, step + 1, 10))


def test_a_disk_that_stays_full_ends_the_run(tmp_path: Path, small_run: str):
    script = textwrap.dedent(f"""
        {small_run} --config.recovery.save_patience=3 --workdir={{room}}/run 2>{{log}} &
        pid=$!
        until [ -d {{room}}/run/checkpoints/40 ] || ! kill -0 $pid; do sleep 0.2; done
        cat /dev/zero > {{room}}/filler 2>/dev/null
        wait $pid
        code=$?
        cp -r {{room}}/run {{copy}}
        exit $code
    """)
    log, copy, room = tmp_path / "log", tmp_path / "copy", tmp_path / "room"
    script = script.format(room=room, log=log, copy=copy)
    result = subprocess.run(
        _in_small_room(script, 3_000, tmp_path),
        env=environment(),
        timeout=300,
        check=False,
        capture_output=True,
    )
    said = log.read_text()
    assert result.returncode == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    error = errors[0]
    assert "no checkpoint could be written for " in error
    assert "recovery.save_patience 3" in error
    assert "Traceback" not in said  # Orbax's and TensorStore's are left out.
    assert int(_final_state(copy).step) >= 40


# --- Two runs in one directory ----------------------------------------------------


def test_a_second_run_in_one_directory_is_refused(tmp_path: Path):
    flags = tiny("configs/gaussians25.py", train__num_steps=10**6)
    flags.append(f"--workdir={tmp_path / 'run'}")
    with Started(*flags) as process:
        process.until((tmp_path / "run" / "checkpoints").exists)
        with Started(*flags) as second:
            result = second.ended()
        holder = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
    assert holder["pid"] == process.pid
    assert result.code == 2
    (error,) = [li for li in result.err.splitlines() if li.startswith("error: ")]
    assert f"is in use by process {process.pid} on {holder['host']}, since" in error
    # The killed one holds nothing any more.
    with lock(tmp_path / "run"):
        pass


def test_a_run_made_by_another_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both found no directory; the other was quicker."""
    build, held = experiments.build, contextlib.ExitStack()

    def building(config, *args):
        (tmp_path / "run").mkdir()
        held.enter_context(lock(tmp_path / "run"))
        return build(config, *args)

    monkeypatch.setattr(experiments, "build", building)
    with held, pytest.raises(InputError, match="is in use by process"):
        train.train(_config(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(InputError, match=r"cannot be written .*directory"):
        with lock(tmp_path):
            pass


def test_a_report_that_cannot_be_written(tmp_path: Path):
    train.train(_config(train__num_steps=8), tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "report.json").mkdir()
    with pytest.raises(TrainingError, match=r"report\.json cannot be written"):
        train.train(_config(), tmp_path / "run")
    assert int(_final_state(tmp_path / "run").step) == 24


def test_a_lock_is_let_go(tmp_path: Path):
    with lock(tmp_path):
        with pytest.raises(InputError, match="is in use by process"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_directory_that_is_only_locked_is_new(tmp_path: Path):
    """As left behind where data could not be opened."""
    with lock(tmp_path):
        run_directory.open_workdir(tmp_path, _config())


def test_reports_come_while_the_next_steps_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Metrics are fetched one dispatch late, but for what is about to be kept."""
    happened: list[tuple[str, int]] = []
    dispatch, report = dispatching.Dispatcher.__call__, reports.Writers.report

    def noted_dispatch(self, state, length, batches=None):
        result = dispatch(self, state, length, batches)
        happened.append(("steps", int(result[0].step)))
        return result

    def reporting(self, step, values):
        happened.append(("report", step))
        return report(self, step, values)

    monkeypatch.setattr(dispatching.Dispatcher, "__call__", noted_dispatch)
    monkeypatch.setattr(reports.Writers, "report", reporting)
    train.train(
        _config(train__num_steps=16, train__report_every=4, train__checkpoint_every=12),
        tmp_path / "run",
    )
    steps = ("steps", "steps", "report", "steps", "report", "report", "steps", "report")
    assert [kind for kind, _ in happened] == list(steps)


# --- An edited config -------------------------------------------------------------


def test_what_was_edited_is_told_when_a_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train.train(_config(train__num_steps=8), tmp_path / "run")
    caplog.set_level("INFO")
    train.train(_config(train__num_steps=16, train__report_every=4), tmp_path / "run")
    told = [m for m in caplog.messages if m.startswith("resuming with")]
    assert told == [
        "resuming with train.num_steps = 16 (was 8)",
        "resuming with train.report_every = 4 (was 8)",
    ]
    assert run_directory.read_config(tmp_path / "run").train.num_steps == 16
    with pytest.raises(InputError, match=r"game\.gamma \(was 0\.02, is 0\.5\)"):
        train.train(_config(game__gamma=0.5), tmp_path / "run")
    assert run_directory.read_config(tmp_path / "run").game.gamma == 0.02
