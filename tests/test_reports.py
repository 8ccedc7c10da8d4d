"""Metrics survive a resume without gaps or duplicates."""

import builtins
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ddaebm_jax import files
from ddaebm_jax.evaluation import plots
from ddaebm_jax.training import reports


def test_a_resume_drops_what_will_be_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = reports.MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.write(step, {"loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a crash
    second = reports.MetricsFile(path, 20)
    second.write(30, {"loss": -1.0})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (10, 10.0),
        (20, 20.0),
        (30, -1.0),
    ]


class _Disk:
    """A disk that may be full: of each line it then takes a part."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full, write = False, reports._write_all

        def write_all(file, data):
            write(file, data[:5] if self.full else data)
            self.check()

        patch.setattr(reports, "_write_all", write_all)
        patch.setattr(reports, "write_text_atomically", lambda *args: self.check())

    def check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> _Disk:
    return _Disk(monkeypatch)


def _steps(path: Path) -> list[int]:
    """The steps of a file's lines, every one of which must be whole."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_lines_that_wait_are_written_when_there_is_room(tmp_path: Path, disk: _Disk):
    path = tmp_path / "metrics.jsonl"
    metrics = reports.MetricsFile(path, 0)
    disk.full = True
    metrics.write(10, {"loss": 1.0})
    assert metrics.flush() == [{"step": 10, "loss": 1.0}] and _steps(path) == []
    disk.full = False
    assert metrics.flush() == [] and _steps(path) == [10]
    disk.full = True
    metrics.write(20, {"loss": 1.0})
    disk.full = False
    metrics.close()
    assert _steps(path) == [10, 20]


def test_writers_can_be_flushed(tmp_path: Path, disk: _Disk):
    output = reports.Writers(tmp_path, 0, 10, tensorboard=False)
    disk.full = True
    output.scalars(5, {"loss": 1.0})
    disk.full = False
    output.flush()
    assert _steps(tmp_path / "metrics.jsonl") == [5]
    output.close()
    reports.Silent().flush()


@pytest.mark.parametrize("target", [0, 10, 20, 30, 40, 50])
def test_going_back_on_a_full_disk_keeps_and_drops_lines(
    target: int, tmp_path: Path, disk: _Disk
):
    """Whether lines are on the disk or wait: those up to the target are kept."""
    output = reports.Writers(tmp_path, 0, 50, tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 20, 30):
        output.scalars(step, {"loss": 1.0})
    disk.full = True
    for step in (40, 40, 50):
        output.scalars(step, {"loss": 1.0})
    output.scalars(50, {"final/loss": 1.0})
    output.rewind(target)
    kept = [step for step in (10, 20, 20, 30, 40, 40, 50) if step <= target]
    assert _steps(path) == [step for step in kept if step <= 30]
    output.scalars(60, {"loss": 1.0})
    disk.full = False
    output.close()
    assert _steps(path) == [*kept, 60]


def test_a_resume_on_a_full_disk_cuts_the_file(tmp_path: Path, disk: _Disk):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 10, "a": 1.0}\n{"step": 20, "a": NaN}\n'
    path.write_text(whole + '{"step": 20, "final/a": 1.0}\n{"step": 30, "a"')
    disk.full = True
    reports.MetricsFile(path, 20).close()
    assert path.read_text() == whole


@pytest.mark.parametrize("written_since", [0, 1, 2, 3])
@pytest.mark.parametrize("still_full", [False, True])
def test_lines_that_waited_at_a_checkpoint_survive_a_kill(
    written_since: int, still_full: bool, tmp_path: Path, disk: _Disk
):
    """However many of them were written between the checkpoint and the kill."""
    path = tmp_path / "metrics.jsonl"
    first = reports.MetricsFile(path, 0)
    first.write(10, {"loss": 1.0})
    disk.full = True
    for step in (20, 30):
        first.write(step, {"loss": float("nan"), "name": "ü"})
    waiting = json.loads(json.dumps(first.flush()))  # As a checkpoint keeps it.
    first.write(40, {"loss": 1.0})
    assert [line["step"] for line in waiting] == [20, 30]
    whole = path.read_bytes()
    disk.full = False
    first.close()  # Stands for having had room for a moment; the kill cuts it off.
    later = path.read_bytes()[len(whole) :].splitlines(keepends=True)
    path.write_bytes(whole + b"".join(later[:written_since]))
    disk.full = still_full
    second = reports.MetricsFile(path, 30, waiting)
    second.write(40, {"loss": 2.0})
    disk.full = False
    second.close()
    assert _steps(path) == [10, 20, 30, 40]


def test_what_a_checkpoint_from_elsewhere_says_waits_is_looked_at(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    waiting = [1, "text", {"no": 1}, {"step": 5}, {"step": 5, "final/x": 1}]
    metrics = reports.MetricsFile(path, 10, [*waiting, {"step": 20}])
    metrics.close()
    assert path.read_text() == '{"step": 5}\n'


def test_so_many_lines_and_no_more_travel_with_a_checkpoint(
    tmp_path: Path, disk: _Disk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reports, "_MOST_WAITING", 2)
    metrics = reports.MetricsFile(tmp_path / "metrics.jsonl", 0)
    disk.full = True
    for step in (10, 20, 30):
        metrics.write(step, {})
    assert metrics.flush() == [{"step": 10}, {"step": 20}]
    metrics.close()


@pytest.mark.parametrize("full", [False, True])
def test_a_damaged_file_is_mended_though_the_disk_is_full(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"st\xff\n{"step": 30}\n{"step": 20}')
    with monkeypatch.context() as patch:
        _Disk(patch).full = full
        if not full:
            patch.setattr(reports, "write_text_atomically", files.write_text_atomically)
        metrics = reports.MetricsFile(path, 20)
        assert _steps(path) == [10] if full else [10, 20]
    metrics.write(30, {})
    metrics.close()
    assert _steps(path) == [10, 20, 30]


def test_going_back_never_ends_the_run(tmp_path: Path, caplog):
    metrics = reports.MetricsFile(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    metrics.rewind(0)
    assert "cannot be dropped" in caplog.text
    metrics.close()


def _picture(path: Path) -> None:
    plots.save_image(path, np.zeros((4, 4, 1), np.uint8))


WRITERS = {
    "text": lambda path: files.write_text_atomically(path, "text"),
    "picture": _picture,
    "plot": lambda path: plots.plot_samples(path, np.zeros((3, 2)), 1.0, "t"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        done.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_replace(self, target):
        done.append(("rename", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    path = tmp_path / "file"
    write(path)
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("sync", file), ("rename", file), ("sync", folder)]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_finds_no_room_leaves_the_old_one(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_what_lies_in_the_way_of_a_file_is_not_written_to(tmp_path: Path):
    """A directory from elsewhere may hold a link out of it, or a pipe."""
    outside, path = tmp_path / "outside", tmp_path / "run" / "file"
    outside.write_text("mine")
    path.parent.mkdir()
    partial = path.with_name("file.partial")
    partial.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        files.write_text_atomically(path, "text")
    os.mkfifo(partial)
    with pytest.raises(OSError):
        files.write_text_atomically(path, "text")
    files.write_text_atomically(path, "text")  # What was in the way is gone.
    assert outside.read_text() == "mine" and path.read_text() == "text"


def test_without_tensorflow_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real_import = builtins.__import__

    def no_tensorflow(name, *args, **kwargs):
        if name.split(".")[0] == "tensorflow":
            raise ImportError("no module named tensorflow")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tensorflow)
    output = reports.Writers(tmp_path, 0, 10, tensorboard=True)
    output.report(5, {"energy/loss": 1.0, "generator/loss": 2.0})
    output.picture(5, "none", tmp_path / "none.png")
    output.close()
    (line,) = reports.read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 5
    assert line["steps_per_second"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (60.0, "1m 00s"),
        (754.0, "12m 34s"),
        (11_100.0, "3h 05m"),
    ],
)
def test_durations_are_readable(seconds: float, text: str):
    assert reports.format_seconds(seconds) == text


def test_a_report_is_a_table():
    text = reports.format_report({"step": 3, "figures": {"auroc": 0.98765}})
    assert text.splitlines() == ["step           3", "figures/auroc  0.9877"]
