"""One of several processes fails: all come to one verdict, and soon."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cli import Result
from failing import STEPS, state_of
from helpers import assert_trees_equal
from processes import Forked

from ddaebm_jax import minimax
from ddaebm_jax.training import checkpoint_files
from ddaebm_jax.training import checkpoints as checkpointing

# More than a failure needs to become known, and less than any barrier waits.
SOON = 120.0


@pytest.fixture(scope="module")
def together() -> Iterator[Forked]:
    forked = Forked("failing")
    yield forked
    forked.close()


def _final(workdir: Path) -> minimax.TrainState:
    """Returns the newest state, verified, and asserts that all others are intact."""
    folder = workdir / "checkpoints"
    assert sorted(checkpoint_files.steps_in(folder)) == sorted(
        int(path.name) for path in folder.iterdir()
    )
    for step in checkpoint_files.steps_in(folder):
        assert checkpoint_files.verify(workdir, "checkpoints", step) is None
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    like = jax.tree.map(jnp.asarray, state_of(0))
    return checkpoints.restore_newest(like).state


def _last(result: Result) -> dict[str, Any]:
    lines = [line for line in result.out.splitlines() if line.startswith("{")]
    assert lines, result.out
    return json.loads(lines[-1])


# --- Saves that fail in one process -----------------------------------------------


@pytest.mark.parametrize(
    ("process", "fault", "fsdp"),
    [(1, "room", True), (0, "room", False), (0, "folders", False)],
)
def test_a_save_that_fails_for_a_while(
    together: Forked, tmp_path: Path, process: int, fault: str, fsdp: bool
):
    of_each = [[str(tmp_path), None, True, 600, fsdp] for _ in range(2)]
    of_each[process][1] = fault
    results = together("run", *of_each, seconds=SOON)
    for result in results:
        assert result.code == 0, result.out
        assert "a checkpoint cannot be written" in result.out
        assert "training goes on and tries again" in result.out
        assert "of earlier ones, step 2 is intact" in result.out
        assert "a checkpoint is written at last" in result.out
        noticed = _last(result)["noticed"]
        assert 2 < noticed["at"] < STEPS
        assert noticed["steps"] == [1, 2] and noticed["verified"] is None
    assert_trees_equal(_final(tmp_path), state_of(STEPS))
    assert not (tmp_path / "damaged").exists()


def test_a_failed_save_is_noticed_before_the_next(together: Forked, tmp_path: Path):
    """By all, when they next look together."""
    results = together(
        "notice", [str(tmp_path), None], [str(tmp_path), "room"], seconds=SOON
    )
    for result in results:
        assert result.code == 0, result.out
        assert "training goes on and tries again" in result.out
    looks = [_last(result)["looks"] for result in results]
    assert looks[0] == looks[1] > 0
    assert_trees_equal(_final(tmp_path), state_of(2))


@pytest.mark.parametrize(("process", "fault"), [(1, "room"), (0, "folders")])
def test_a_save_that_fails_for_ever(
    together: Forked, tmp_path: Path, process: int, fault: str
):
    of_each = [[str(tmp_path), None, False, 2] for _ in range(2)]
    of_each[process][1] = fault
    results = together("run", *of_each, seconds=SOON)
    for result in results:
        assert result.code == 2, result.out
        error = _last(result)["error"]
        assert "no checkpoint could be written for " in error
        assert "recovery.save_patience 2" in error and "step 2 is intact" in error
        seconds = float(error.split("written for ")[1].split(" s")[0])
        assert 2 <= seconds < SOON
    reason = {"room": "File too large", "folders": "Read-only file system"}[fault]
    own, other = (_last(results[n])["error"] for n in (process, 1 - process))
    assert reason in own and reason not in other
    assert_trees_equal(_final(tmp_path), state_of(2))
    for result in together("run", [str(tmp_path)], [str(tmp_path)], seconds=SOON):
        assert result.code == 0, result.out
        assert _last(result) == {"first": 2, "noticed": {}}
    assert_trees_equal(_final(tmp_path), state_of(STEPS))


def test_a_process_that_cannot_begin_to_save_ends_all(together: Forked, tmp_path: Path):
    of_each = [str(tmp_path), None], [str(tmp_path), "memory"]
    results = together("run", *of_each, seconds=SOON)
    assert [result.code for result in results] == [2, 2], results
    assert "could not begin to save (no memory is left)" in _last(results[1])["error"]
    assert _last(results[1])["kind"] == "OutOfStepError"
    assert "the checkpoints before it are intact (1, 2)" in _last(results[1])["error"]
    assert _last(results[0])["kind"] == "LostProcessError"
    assert "the other processes cannot be reached" in _last(results[0])["error"]
    assert int(_final_of_the_finished(tmp_path).step) == 2


def _final_of_the_finished(workdir: Path) -> minimax.TrainState:
    for path in checkpoint_files.unfinished_in(workdir / "checkpoints"):
        shutil.rmtree(path)
    return _final(workdir)


# --- Damage that one process finds ------------------------------------------------


def _largest(workdir: Path, step: int, part: str) -> Path:
    """Returns a file of a checkpoint, or the largest one of a folder."""
    path = workdir / "checkpoints" / str(step) / part
    if path.is_dir():
        path = max(path.iterdir(), key=lambda file: file.stat().st_size)
    return path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x5A
    path.write_bytes(content)


_INFO, _OF_0, _OF_1 = (
    "info/metadata",
    "state/ocdbt.process_0/d",
    "state/ocdbt.process_1/d",
)


def test_damage_that_one_process_finds(together: Forked, tmp_path: Path):
    """All go on from the one before; if there is none, nothing is moved."""
    for result in together("save", *[[str(tmp_path / "saved")]] * 2, seconds=SOON):
        assert result.code == 0, result.out

    def views(name: str, apart: bool = False) -> list[Path]:
        """A run directory as the two processes see it; it may be another for each."""
        found = [
            tmp_path / f"{name}, {n}" if apart else tmp_path / name for n in (0, 1)
        ]
        for view in set(found):
            shutil.copytree(tmp_path / "saved", view)
        return found

    seen = {
        # Only process 1 has its shard there; they add up their checksums, though.
        "flipped": views("flipped"),
        "cut": views("cut"),
        "info of 0": views("info of 0", apart=True),
        "info of 1": views("info of 1", apart=True),
        "whole": views("whole", apart=True),
        "none is good": views("none is good", apart=True),
        "unreadable": views("unreadable"),
    }
    _flip(_largest(seen["flipped"][0], 2, _OF_1))
    os.truncate(_largest(seen["cut"][0], 2, _OF_1), 10)
    _flip(_largest(seen["info of 0"][0], 2, _INFO))
    _flip(_largest(seen["info of 1"][1], 2, _INFO))
    _flip(_largest(seen["whole"][1], 2, _OF_0))
    for step in (1, 2):
        os.truncate(_largest(seen["none is good"][1], step, _OF_1), 10)
    of_each = [[{name: str(two[n]) for name, two in seen.items()}] for n in (0, 1)]
    told: list[dict[str, Any]] = []
    for result in together("restore", *of_each, seconds=SOON):
        assert result.code == 0, result.out
        lines = [line for line in result.out.splitlines() if line.startswith("{")]
        told.append({found["name"]: found for found in map(json.loads, lines)})

    for name in ("flipped", "cut", "info of 0", "info of 1", "whole"):
        for one in told:
            assert (one[name]["step"], one[name]["same"]) == (1, True), told
        assert (seen[name][0] / "damaged" / "checkpoints-2").is_dir()
        assert checkpoint_files.steps_in(seen[name][0] / "checkpoints") == [1]
        if seen[name][1] != seen[name][0]:  # The first process moves, no other.
            assert checkpoint_files.steps_in(seen[name][1] / "checkpoints") == [1, 2]
    alone = {"cut": 1, "info of 0": 0, "info of 1": 1, "whole": 1, "none is good": 1}
    for name, process in alone.items():
        for number, one in enumerate(told):
            is_told = any("another process" in said for said in one[name]["said"])
            assert is_told == (number != process), told
    for name in ("none is good", "unreadable"):
        assert checkpoint_files.steps_in(seen[name][0] / "checkpoints") == [1, 2]
        assert not (seen[name][0] / "damaged").exists()
    for one in told:
        assert one["none is good"]["kind"] == "CheckpointError"
        assert "no checkpoint in" in one["none is good"]["error"]
        assert one["unreadable"]["kind"] == "CheckpointReadError"
    assert "Too many open files" in told[1]["unreadable"]["error"]
