"""What --mode=inspect tells of a run, and that it changes nothing."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import CommandLine, tiny

from ddaebm_jax.commands import inspect as inspection
from ddaebm_jax.training import checkpoint_files

RECIPE = "configs/released_gaussians25.py"


@pytest.fixture(scope="module")
def run() -> Iterator[CommandLine]:
    command_line = CommandLine()
    yield command_line
    command_line.close()


@pytest.fixture(scope="module")
def trained(run: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("inspected") / "released_gaussians25" / "run"
    flags = tiny(RECIPE, train__picture_every=20)
    result = run(*flags, f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir


def _everything(path: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in path.rglob("*")}


def _inspect(run: CommandLine, workdir: Path, code: int = 0) -> str:
    before = _everything(workdir)
    result = run("--mode=inspect", f"--workdir={workdir}")
    assert result.code == code, result.err
    assert _everything(workdir) == before
    return result.out


def test_a_run_is_told(run: CommandLine, trained: Path):
    text = _inspect(run, trained)
    assert re.search(r"recipe +released_gaussians25, by the folder's name", text)
    assert re.search(r"data\.batch_size +\d+ → 8\n", text)
    assert re.search(r"steps +40 of 40\n", text)
    assert re.search(r"checkpoints/20 +[\d.]+ KiB  20\d\d-.*intact\n", text)
    assert re.search(r"checkpoints/40 .* intact\n", text)
    assert re.search(r"\nlast metrics\n  step +40\n", text)
    assert "\nreport.json\n" in text and re.search(r"samples +\d+, the last", text)
    assert re.search(r"process +none\n", text)
    assert not any(line.startswith("Traceback") for line in text.splitlines())


def test_a_damaged_checkpoint_is_told_and_the_rest_too(
    run: CommandLine, trained: Path, tmp_path: Path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "checkpoints/40/info/metadata").write_text("{}}")
    shutil.copytree(
        workdir / "checkpoints/20", workdir / "checkpoints/30.orbax-checkpoint-tmp"
    )
    (workdir / "damaged/best-7").mkdir(parents=True)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "a\\u001b[31m": 1.5}\n{"step": 60, "cut')
    (workdir / "report-1.json").write_text("[1]")
    text = _inspect(run, workdir, code=1)
    assert re.search(r"checkpoints/40 .*DAMAGED: ", text)
    assert re.search(r"checkpoints/20 .* intact\n", text)
    assert re.search(r"checkpoints/30.orbax-checkpoint-tmp .* unfinished\n", text)
    assert re.search(r"damaged/best-7 .* set aside\n", text)
    assert re.search(r"steps +50 of 40\n", text)
    assert "\x1b" not in text and "a?[31m" in text
    assert "of no use" in text
    assert "is the most similar" in text


def test_a_config_of_no_use_does_not_hide_the_rest(
    run: CommandLine, trained: Path, tmp_path: Path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "config.json").write_text("{}")
    text = _inspect(run, workdir)
    assert re.search(r"config +of no use", text)
    assert re.search(r"checkpoints/40 .* intact\n", text)


def test_a_running_process_is_told_and_not_disturbed(
    run: CommandLine, trained: Path, tmp_path: Path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    lock = {"host": "there", "pid": 123, "started": "today"}
    (workdir / "lock.json").write_text(json.dumps(lock))
    assert re.search(r"process +none\n", _inspect(run, workdir))
    file = os.open(workdir / "lock.json", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert re.search(r"process +123 on there, since today\n", _inspect(run, workdir))
    os.close(file)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it waits for something")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_pipes_are_not_waited_for(tmp_path: Path):
    for name in ("metrics.jsonl", "lock.json", "report.json", "config.json"):
        os.mkfifo(tmp_path / name)
    with _within(20):
        assert inspection.running_process(tmp_path) is None
        assert inspection._reached(tmp_path) == 0
        ((_, said),) = inspection._report(tmp_path / "report.json")
        assert "not a regular file" in said
        assert "not a regular file" in inspection._config(tmp_path)[1]


def test_a_lock_of_brackets_is_told(tmp_path: Path):
    (tmp_path / "lock.json").write_text("[" * 5000)
    file = os.open(tmp_path / "lock.json", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert "does not say which" in inspection.running_process(tmp_path)
    os.close(file)


def test_what_is_not_damaged_is_not_called_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = shutil.copytree(trained, tmp_path / "run")

    def told() -> dict[str, str]:
        rows, intact = inspection._checkpoints(workdir, False)
        assert not intact and "intact" in dict(rows)["checkpoints/20"]
        return dict(rows)["checkpoints/40"]

    path = workdir / "checkpoints/40/info/metadata"
    text = path.read_text()
    info = {k: v for k, v in json.loads(text).items() if k != "sha256"}
    path.write_text(json.dumps(checkpoint_files.sealed({**info, "format": 99})))
    assert "OF ANOTHER FORMAT: " in told() and "DAMAGED" not in told()
    path.write_text(text)

    declared = checkpoint_files.declared

    def unreadable(path: Path) -> Any:
        if path.name == "40":
            raise OSError(errno.EIO, "Input/output error")
        return declared(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "declared", unreadable)
        assert "NOT READ: " in told() and "DAMAGED" not in told()
    path.write_text(text.replace("sha256", "sha255"))
    assert "DAMAGED: " in told()


def test_folders_that_are_none_or_cannot_be_read_are_told(
    run: CommandLine, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    assert inspection._checkpoints(workdir, False) == ([], True)  # None yet.
    (workdir / "checkpoints").write_text("")
    text = _inspect(run, workdir, code=1)
    assert re.search(r"checkpoints +DAMAGED: not a folder\n", text)
    (workdir / "checkpoints").unlink()
    (workdir / "checkpoints").mkdir()

    def refused(directory: Path) -> list[int]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_files, "steps_in", refused)
    rows, intact = inspection._checkpoints(workdir, False)
    assert not intact and dict(rows)["checkpoints"] == "NOT READ: Permission denied"
    assert inspection._reached(workdir) == 40
    assert list(inspection._leftovers(workdir, False)) == []


@pytest.mark.parametrize("kind", ["missing", "empty", "none", "flag"])
def test_a_wrong_directory_is_one_line(run: CommandLine, tmp_path: Path, kind: str):
    given = {
        "missing": (f"--workdir={tmp_path / 'nothing'}",),
        "empty": (f"--workdir={tmp_path}",),
        "none": (),
        "flag": (f"--workdir={tmp_path}", "--checkpoint=best"),
    }[kind]
    result = run("--mode=inspect", *given)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.strip().splitlines()
    assert line.startswith("error: ")
    assert ("--checkpoint" if kind == "flag" else "--workdir") in line


def test_one_that_is_deleted_meanwhile_is_gone_not_damaged(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    original = checkpoint_files.verify

    def verify(workdir, folder, step):
        if step == 20:
            (workdir / folder / "20/info/metadata").unlink()
        return original(workdir, folder, step)

    monkeypatch.setattr(checkpoint_files, "verify", verify)
    rows, intact = inspection._checkpoints(workdir, True)
    assert intact and "partly deleted" in dict(rows)["checkpoints/20"]
    shutil.rmtree(workdir / "checkpoints/20")
    rows, intact = inspection._checkpoints(workdir, True)
    assert intact and [name for name, _ in rows] == ["checkpoints/40"]
    (workdir / "checkpoints/40/_CHECKPOINT_METADATA").unlink()
    rows, intact = inspection._checkpoints(workdir, False)
    assert not intact and "lacks a part" in dict(rows)["checkpoints/40"]
