"""A checkpoint gives back exactly what was saved, or an error gives the reason."""

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cli import BAD_CHARACTERS, Result, call
from failing import full_disk, save_and_die, save_and_restore, split_rows, state_of
from helpers import assert_trees_equal
from processes import free_port

from ddaebm_jax import sharding
from ddaebm_jax.training import checkpoints as checkpoints_lib
from ddaebm_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
    SaveError,
)

# Orbax drops what it has begun when a part of it fails, and Python remarks on it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def remarks_belong_to_the_test_that_causes_them() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of steps 1 and 2; not to be changed."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    _save(workdir, 1, 2)
    return workdir


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def _state(step: int, **kwargs: Any):
    return jax.tree.map(jnp.asarray, state_of(step, **kwargs))


def _save(workdir: Path, *steps: int) -> None:
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for step in steps:
            checkpoints.save(_state(step), {"data": [0.1, 1 / 3, step]})
        checkpoints.wait()


def _restore_newest(workdir: Path, read_only: bool = False):
    with contextlib.closing(Checkpoints(workdir, read_only=read_only)) as checkpoints:
        return checkpoints.restore_newest(_state(0))


def _names(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


def _flip(path: Path, place: int, mask: int = 0x5A) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def _spoil(workdir: Path, step: int, folder: str = "checkpoints") -> None:
    """Flips a byte in the largest file, which holds the arrays."""
    files = [p for p in (workdir / folder / str(step)).rglob("*") if p.is_file()]
    path = max(files, key=lambda file: file.stat().st_size)
    _flip(path, path.stat().st_size // 2)


# Saving and restoring.


@pytest.mark.parametrize("name", ["run", *BAD_CHARACTERS], ids=ascii)
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, name: str):
    _save(tmp_path / name, 3)
    found = _restore_newest(tmp_path / name, read_only=True)
    assert found.step == 3 and found.info["data"] == [0.1, 1 / 3, 3]
    assert_trees_equal(found.state, _state(3))
    Checkpoints(tmp_path / name, read_only=True).verify(3)


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff"), "gs:", "a\\b"], ids=ascii)
def test_names_that_orbax_takes_for_others_are_refused(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match="cannot be saved below a name"):
        Checkpoints(tmp_path / name)


def test_a_state_is_restored_into_another_layout(tmp_path: Path):
    mesh, few = sharding.make_mesh(0), sharding.make_mesh(2)
    state = state_of(3)
    layouts = [
        split_rows(mesh, state),
        split_rows(few, state),
        jax.tree.map(lambda _: sharding.replicated(mesh), state),
    ]
    for number, layout in enumerate(layouts):
        workdir = tmp_path / str(number)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            checkpoints.save(sharding.put(state, layout), {})
            for other in layouts:
                shapes = sharding.with_shardings(state, other)
                restored = checkpoints.restore(shapes).state
                assert restored.variables["w"].sharding == other.variables["w"]
                assert_trees_equal(jax.tree.map(np.asarray, restored), state)


def test_a_save_is_not_disturbed_by_donating_its_buffers(tmp_path: Path):
    """Training reuses the state's memory while the save is still being written."""
    state = _state(3)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: (x * 0 + 1).astype(x.dtype), s),
        donate_argnums=0,
    )
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state = overwrite(state)
        assert_trees_equal(checkpoints.restore(_state(0)).state, _state(3))


def test_only_the_newest_are_kept_and_the_first_of_a_step(tmp_path: Path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(_state(step), {})
        checkpoints.save(_state(3).replace(opt_generator=jnp.ones(2)), {})
    assert _names(tmp_path / "checkpoints")[0] == "2"
    assert checkpoints.steps() == [2, 3]
    assert_trees_equal(_restore_newest(tmp_path).state, _state(3))


def test_unfit_and_missing_checkpoints_are_refused(run: Path, tmp_path: Path):
    checkpoints = Checkpoints(run, read_only=True)
    for restore in (checkpoints.restore, checkpoints.restore_newest):
        with pytest.raises(
            CheckpointError, match=r"does not hold .*variables/w is"
        ) as e:
            restore(_state(0, width=301))
        assert not isinstance(e.value, DamagedCheckpointError)
    assert_trees_equal(checkpoints.restore(_state(0), 1).state, _state(1))
    with pytest.raises(CheckpointError, match="holds no best checkpoint"):
        checkpoints.restore(_state(0), best=True)
    nothing = Checkpoints(tmp_path / "new", read_only=True)
    assert nothing.restore_newest(_state(0)) is None and nothing.steps() == []
    with pytest.raises(CheckpointError, match="train first"):
        nothing.restore(_state(0))
    assert not (tmp_path / "new").exists()


# Damage.


def test_any_damage_is_noticed_or_harmless(run: Path, saved: Path):
    """Of every file: bytes here and there, its end, all of it."""
    newest, rng, noticed = saved / "checkpoints/2", random.Random(0), 0
    checkpoints = Checkpoints(run, read_only=True)
    for source in sorted(path for path in newest.rglob("*") if path.is_file()):
        path = run / source.relative_to(saved)
        content = source.read_bytes()
        flips = [rng.randrange(len(content)) for _ in range(4)]
        for place in ("gone", 0, rng.randrange(len(content)), *flips):
            if place == "gone":
                path.unlink()
            elif place in flips:
                _flip(path, place, 1 << rng.randrange(8))
            else:
                os.truncate(path, place)
            found = checkpoints.restore_newest(_state(0))
            assert_trees_equal(found.state, _state(found.step))
            noticed += found.step == 1
            path.write_bytes(content)
    assert noticed > 40


def test_a_changed_array_or_info_is_noticed(run: Path):
    """Orbax restores it without an error."""
    checkpoints = Checkpoints(run, read_only=True)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0)
    )
    _spoil(run, 2)
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        path = checkpoints.path(2) / "state"
        restored = handler.restore(path, args=ocp.args.StandardRestore(like))
    assert np.any(restored.variables["w"] != _state(2).variables["w"])
    with pytest.raises(DamagedCheckpointError, match=r"2 is damaged: .*variables/w is"):
        checkpoints.restore(like)
    path = run / "checkpoints/1/info/metadata"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info, indent=1))  # The same values.
    assert checkpoints.info(1) == info
    for other in ({**info, "data": 0}, {k: info[k] for k in info if k != "sha256"}):
        path.write_text(json.dumps(other))
        with pytest.raises(DamagedCheckpointError, match="checksum"):
            checkpoints.verify(1)


def test_damaged_ones_are_set_aside_and_their_steps_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _save(tmp_path, 1, 2, 3)
    _spoil(tmp_path, 3)
    (tmp_path / "checkpoints/2/info/metadata").write_text("{")
    before = _names(tmp_path)
    assert _restore_newest(tmp_path, read_only=True).step == 1
    assert _names(tmp_path) == before
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        found = checkpoints.restore_newest(_state(0))
        assert found.step == 1 and checkpoints.steps() == [1]
        assert f"{tmp_path}/checkpoints/3 is damaged" in caplog.text
        for step in (2, 3):
            checkpoints.save(_state(step), {})
    damaged = tmp_path / "damaged"
    assert len(list(damaged.glob("checkpoints-[23]-*"))) == 2
    assert_trees_equal(_restore_newest(tmp_path).state, _state(3))
    _spoil(tmp_path, 3)
    assert _restore_newest(tmp_path).step == 2
    assert len(list(damaged.glob("checkpoints-3-*"))) == 2


def test_if_none_is_intact_all_are_named_and_left(run: Path):
    for step in (1, 2):
        _spoil(run, step)
    before = _names(run)
    with pytest.raises(CheckpointError, match=r"points/2 .*points/1 ") as error:
        _restore_newest(run)
    assert "\n" not in str(error.value) and _names(run) == before


def test_unreadable_checkpoints_are_not_taken_for_damaged(run: Path):
    """Here for want of file descriptors, as for want of rights or a bad disk."""
    _restore_newest(run)  # What is imported late is imported now.
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"be read .*open files") as error:
            Checkpoints(run, read_only=True).verify(2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not isinstance(error.value, DamagedCheckpointError)
    assert _restore_newest(run).step == 2


def test_sizes_beyond_the_files_are_not_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints = Checkpoints(run, read_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_lib, "_ALLOWANCE", 0)
        patch.setattr(checkpoints_lib, "_MOST_COMPRESSION", 0)
        with pytest.raises(DamagedCheckpointError, match="cannot hold"):
            checkpoints.verify(2)
    os.truncate(run / "checkpoints/2/info/metadata", 2**40)  # A sparse file.
    with pytest.raises(CheckpointError):
        checkpoints.verify(2)


# Saves that fail, or do not end.


def test_a_killed_save_leaves_the_one_before(tmp_path: Path):
    unfinished = 0
    for number in range(6):
        workdir = tmp_path / str(number)
        (result,) = call(save_and_die, [str(workdir), 0.004 * number])
        assert result.code == -9, result.err
        left = [path.name for path in (workdir / "checkpoints").iterdir()]
        unfinished += any(not name.isdecimal() for name in left)
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            steps = checkpoints.steps()
            for step in steps:
                checkpoints.verify(step)
            # Unfinished ones are deleted by the next save at the latest.
            checkpoints.save(_state(5), {})
        left = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        assert left == [str(step) for step in (*steps, 5)] and steps[0] == 1
    assert unfinished


def test_a_save_on_a_full_disk_fails(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1), {})
    checkpoints.wait()
    start = time.monotonic()
    with full_disk(), pytest.raises(SaveError, match=r"too large.*are intact \(1\)"):
        checkpoints.save(_state(2), {})
        while checkpoints.pending and time.monotonic() < start + 60:
            checkpoints.poll()
    checkpoints.verify(1)
    checkpoints.save_whole(_state(5), {})
    checkpoints.close()
    assert_trees_equal(_restore_newest(tmp_path).state, _state(5))
    names = os.listdir(tmp_path / "checkpoints")
    assert {"1", "5"} <= set(names) and "".join(names).isdecimal()


def test_a_damaged_last_checkpoint_is_written_again(run: Path):
    _spoil(run, 2)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        checkpoints.save_whole(_state(2), {})
        checkpoints.verify(2)
    assert len(list((run / "damaged").glob("checkpoints-2-*"))) == 1


def test_a_save_with_missing_files_has_failed(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    wait = ocp.CheckpointManager.wait_until_finished
    checkpoints = Checkpoints(run)
    for part in ("", "info", "state/manifest.ocdbt", "state/_METADATA"):

        def lose(manager: ocp.CheckpointManager, part: str = part) -> None:
            wait(manager)
            lost = run / "checkpoints/3" / part
            shutil.rmtree(lost) if lost.is_dir() else lost.unlink(missing_ok=True)

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "wait_until_finished", lose)
            checkpoints.save(_state(3), {})
            with pytest.raises(SaveError, match=r"3 could not be written .*\(1, 2\)"):
                while checkpoints.pending:
                    checkpoints.poll()
        shutil.rmtree(run / "checkpoints/3", ignore_errors=True)
    checkpoints.save(_state(4), {})
    checkpoints.close()
    assert_trees_equal(_restore_newest(run).state, _state(4))


# The best.


def test_the_lowest_fid_is_kept(tmp_path: Path):
    def offer(step: int, fid: float) -> tuple[int, float]:
        checkpoints.save_best(_state(step), {}, fid)
        checkpoints.wait()
        (kept,) = checkpoints.steps(best=True)
        assert_trees_equal(
            checkpoints.restore(_state(0), best=True).state, _state(kept)
        )
        return kept, checkpoints.info(kept, best=True)["fid"]

    checkpoints = Checkpoints(tmp_path)
    assert not (tmp_path / "best").exists()
    assert offer(5, 3.0) == (5, 3.0)
    assert offer(6, float("nan")) == (5, 3.0)
    assert offer(6, 4.0) == (5, 3.0)
    assert offer(7, 2.0) == (7, 2.0)
    assert offer(7, 1.5) == (7, 2.0)  # A step that is there is left alone.
    assert offer(6, 1.0) == (6, 1.0)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert offer(9, 1.5) == (6, 1.0)
    assert offer(4, 0.5) == (4, 0.5)
    (tmp_path / "best/4/info/metadata").write_text("{")
    assert offer(10, 50.0) == (10, 50.0)
    assert len(list((tmp_path / "damaged").glob("best-4-*"))) == 1
    checkpoints.close()


# Several processes.


def test_two_processes_save_restore_and_fail_together(tmp_path: Path):
    def both(fails: bool) -> list[Result]:
        port = free_port()
        calls = [[n, port, str(tmp_path), fails and n == 1] for n in range(2)]
        return call(save_and_restore, *calls, seconds=100.0)

    start = time.monotonic()
    other, failed = both(fails=True)
    assert failed.code == 2, failed.err
    assert "4 could not be written" in failed.out
    assert other.code not in (0, -9), other.err  # It fails by itself, too.
    assert time.monotonic() - start < 90
    for result in both(fails=False):
        assert result.code == 0, result.err
        assert json.loads(result.out.splitlines()[-1]) == {"step": 3, "same": True}
    assert_trees_equal(_restore_newest(tmp_path).state, _state(3))
