"""A checkpoint gives back exactly what was saved, or says why it cannot."""

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import ROOT, environment
from helpers import GAME, assert_trees_equal, smooth_networks
from orbax.checkpoint._src.checkpointers import async_checkpointer

from ddaebm_jax import files, minimax
from ddaebm_jax.training import (
    best_checkpoint,
    checkpoint_files,
    checksums,
    measuring,
    runs,
)
from ddaebm_jax.training import (
    checkpoints as checkpointing,
)

# Orbax drops what it has begun when a part of it fails, and Python remarks on it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

OPTIMIZERS = minimax.make_optimizers(1e-3, 1e-3, 0.5, 0.9)


@pytest.fixture(autouse=True)
def remarks_belong_to_the_test_that_causes_them() -> Iterator[None]:
    yield
    gc.collect()


def _state(seed: int = 0, step: int = 3, dim: int = 2) -> minimax.TrainState:
    networks = smooth_networks(dim=dim)
    state = minimax.init_state(jax.random.key(seed), networks, OPTIMIZERS, GAME)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def test_a_state_comes_back_bit_for_bit(tmp_path: Path):
    state = _state()
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(state, {"data": {"mean": [0.1, 1 / 3]}})
    checkpoints.close()
    again = checkpointing.Checkpoints(tmp_path, read_only=True)
    assert_trees_equal(again.restore(_state(seed=1)), state)
    assert again.info(3)["data"] == {"mean": [0.1, 1 / 3]}
    again.close()


def test_a_save_is_not_disturbed_by_donating_its_buffers(tmp_path: Path):
    """Training reuses the state's memory while the save is still being written."""
    state = _state()
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0
    )
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(state, {})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.wait()
    assert_trees_equal(checkpoints.restore(_state()), expected)
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path: Path):
    checkpoints = checkpointing.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(_state(step=step), {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 4
    checkpoints.close()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["3", "4"]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_state(seed=0), {})
    checkpoints.save(_state(seed=1), {})
    checkpoints.wait()
    assert_trees_equal(checkpoints.restore(_state(seed=2)), _state(seed=0))
    checkpoints.close()


def test_no_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path):
    with pytest.raises(checkpoint_files.CheckpointError, match="train first"):
        checkpointing.Checkpoints(tmp_path, read_only=True)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    with pytest.raises(checkpoint_files.CheckpointError, match="train first"):
        checkpoints.restore(_state())
    checkpoints.close()


def test_a_state_of_other_shapes_is_refused(tmp_path: Path):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_state(dim=2), {})
    checkpoints.wait()
    with pytest.raises(
        checkpoint_files.CheckpointError, match="does not hold the state"
    ):
        checkpoints.restore(_state(dim=3))
    checkpoints.close()


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 99)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_state(), {})
    checkpoints.wait()
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 1)
    with pytest.raises(checkpoint_files.CheckpointError, match="format 99"):
        checkpoints.info(3)
    checkpoints.close()


def test_an_atomic_write_replaces_or_leaves(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_json_atomically(path, {"x": 1})
    with pytest.raises(TypeError):
        files.write_json_atomically(path, {"x": object()})
    assert path.read_text() == '{\n  "x": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


# Damage.


def _numbered(step: int, width: int = 300) -> minimax.TrainState:
    """Returns a small state that is a function of its step."""
    rng = np.random.default_rng(step)
    return minimax.TrainState(
        step=jnp.asarray(step, jnp.int32),
        variables={"w": jnp.asarray(rng.normal(size=(width, 3)), jnp.float32)},
        ema={"w": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
        opt_energy=(jnp.asarray(rng.random(9) < 0.5), ()),
        opt_generator=None,
    )


def _save(workdir: Path, *steps: int) -> None:
    checkpoints = checkpointing.Checkpoints(workdir)
    for step in steps:
        checkpoints.save(_numbered(step), {"data": None})
    checkpoints.close()


def _restore_newest(workdir: Path, read_only: bool = False):
    checkpoints = checkpointing.Checkpoints(workdir, read_only=read_only)
    try:
        return checkpoints.restore_newest(_numbered(0))
    finally:
        checkpoints.close()


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def _flip(path: Path, place: int, mask: int = 0x5A) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def _spoil(workdir: Path, step: int, folder: str = "checkpoints") -> None:
    """Flips a byte in the largest file of a checkpoint, which holds the arrays."""
    path = max(
        _files_of(workdir / folder / str(step)), key=lambda file: file.stat().st_size
    )
    _flip(path, path.stat().st_size // 2)


def _without_checksums(info: dict) -> dict:
    return {name: value for name, value in info.items() if name != "checksums"}


def _tree_of(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_the_newest_intact_checkpoint_is_restored(tmp_path: Path):
    assert _restore_newest(tmp_path) is None
    _save(tmp_path, 1, 2, 3)
    found = _restore_newest(tmp_path)
    assert found.step == 3 and found.info["data"] is None
    assert_trees_equal(found.state, _numbered(3))
    assert found.info["checksums"] == checksums.of_tree(_numbered(3))
    assert not (tmp_path / "damaged").exists()


def test_damaged_ones_are_set_aside_and_their_steps_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _save(tmp_path, 1, 2, 3)
    _spoil(tmp_path, 3)
    (tmp_path / "checkpoints/2/info/metadata").write_text("{")
    before = _tree_of(tmp_path)
    assert _restore_newest(tmp_path, read_only=True).step == 1
    assert _tree_of(tmp_path) == before
    checkpoints = checkpointing.Checkpoints(tmp_path)
    found = checkpoints.restore_newest(_numbered(0))
    assert found.step == 1 and checkpoints.steps() == [1]
    assert_trees_equal(found.state, _numbered(1))
    assert str(tmp_path / "checkpoints/3") in caplog.text
    damaged = tmp_path / "damaged"
    assert sorted(p.name for p in damaged.iterdir()) == [
        "checkpoints-2",
        "checkpoints-3",
    ]
    for step in (2, 3):
        checkpoints.save(_numbered(step), {})
    checkpoints.close()
    assert_trees_equal(_restore_newest(tmp_path).state, _numbered(3))
    _spoil(tmp_path, 3)
    assert _restore_newest(tmp_path).step == 2
    assert (damaged / "checkpoints-3-1").is_dir()


def test_if_none_is_intact_all_are_named_and_left(tmp_path: Path):
    _save(tmp_path, 1, 2)
    for step in (1, 2):
        _spoil(tmp_path, step)
    before = _tree_of(tmp_path)
    with pytest.raises(checkpoint_files.CheckpointError) as caught:
        _restore_newest(tmp_path)
    assert all(str(tmp_path / f"checkpoints/{n}") in str(caught.value) for n in (1, 2))
    assert "\n" not in str(caught.value)
    assert _tree_of(tmp_path) == before


def test_one_that_is_asked_for_is_verified_too(tmp_path: Path):
    _save(tmp_path, 1, 2)
    _spoil(tmp_path, 2)
    checkpoints = checkpointing.Checkpoints(tmp_path, read_only=True)
    with pytest.raises(checkpoint_files.DamagedCheckpointError, match="2 is damaged"):
        checkpoints.restore(_numbered(0))
    assert_trees_equal(checkpoints.restore(_numbered(0), 1), _numbered(1))


@pytest.mark.parametrize("old", [False, True])
def test_another_shape_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
):
    if old:
        monkeypatch.setattr(checkpoint_files, "sealed", _without_checksums)
    _save(tmp_path, 1, 2)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    with pytest.raises(
        checkpoint_files.CheckpointError,
        match=r"does not hold the state.*variables/w is float32\[300,3\]",
    ) as caught:
        checkpoints.restore_newest(_numbered(0, width=301))
    assert not isinstance(caught.value, checkpoint_files.DamagedCheckpointError)
    checkpoints.close()
    assert checkpoint_files.steps_in(tmp_path / "checkpoints") == [1, 2]


def test_one_without_checksums_is_restored_with_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(checkpoint_files, "sealed", _without_checksums)
    _save(tmp_path, 1, 2)
    assert_trees_equal(_restore_newest(tmp_path).state, _numbered(2))
    assert "cannot be verified" in caplog.text
    assert checkpoint_files.verify(tmp_path, "checkpoints", 2) is None
    (tmp_path / "checkpoints/2/state/manifest.ocdbt").write_bytes(b"")
    assert _restore_newest(tmp_path).step == 1
    assert (tmp_path / "damaged/checkpoints-2").is_dir()


def test_the_info_cannot_be_changed(tmp_path: Path):
    _save(tmp_path, 1)
    path = tmp_path / "checkpoints/1/info/metadata"
    info = json.loads(path.read_text())
    checkpoints = checkpointing.Checkpoints(tmp_path, read_only=True)
    path.write_text(json.dumps(info, indent=1))  # The same values.
    assert checkpoints.info(1) == info
    others = ({**info, "data": {}}, {k: v for k, v in info.items() if k != "sha256"})
    for other in others:
        path.write_text(json.dumps(other))
        with pytest.raises(checkpoint_files.DamagedCheckpointError, match="checksum"):
            checkpoints.info(1)


def test_verify_needs_no_config(tmp_path: Path):
    _save(tmp_path, 1, 2)
    assert checkpoint_files.verify(tmp_path, "checkpoints", 1) is None
    _spoil(tmp_path, 2)
    problem = checkpoint_files.verify(tmp_path, "checkpoints", 2)
    assert isinstance(problem, checkpoint_files.DamagedCheckpointError)
    assert str(tmp_path) in str(problem)
    assert "lacks a part" in str(checkpoint_files.verify(tmp_path, "checkpoints", 7))


def test_a_state_under_another_step_is_refused(tmp_path: Path):
    _save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "1").rename(folder / "5")
    with pytest.raises(
        checkpoint_files.CheckpointError, match="holds the state of step"
    ):
        _restore_newest(tmp_path)


def test_links_pipes_and_giants_are_refused(tmp_path: Path):
    _save(tmp_path, 1)
    steps = tmp_path / "run" / "checkpoints"
    steps.mkdir(parents=True)
    (steps / "1").symlink_to(tmp_path / "checkpoints/1")
    link = checkpoint_files.verify(tmp_path / "run", "checkpoints", 1)
    assert "is a link out of" in str(link)
    with pytest.raises(checkpoint_files.CheckpointError, match="is a link out of"):
        _restore_newest(tmp_path / "run", read_only=True)
    (steps / "1").unlink()

    copy = shutil.copytree(tmp_path / "checkpoints/1", steps / "1")
    os.mkfifo(copy / "state/d/pipe")
    assert "neither" in str(checkpoint_files.verify(tmp_path / "run", "checkpoints", 1))
    (copy / "state/d/pipe").unlink()
    assert checkpoint_files.verify(tmp_path / "run", "checkpoints", 1) is None
    with (copy / "info/metadata").open("r+b") as file:
        file.truncate(2**40)  # A sparse file.
    assert "at most" in str(checkpoint_files.verify(tmp_path / "run", "checkpoints", 1))


def test_arrays_that_cannot_fit_into_their_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files, "_ALLOWANCE", 0)
    monkeypatch.setattr(checkpoint_files, "_LARGEST_COMPRESSION", 0)
    assert "does not fit" in str(checkpoint_files.verify(tmp_path, "checkpoints", 1))


def test_any_flipped_byte_is_found_or_harmless(tmp_path: Path):
    """Of every file of a checkpoint: bytes here and there, its end, all of it."""
    _save(tmp_path / "good", 1, 2)
    newest = tmp_path / "good/checkpoints/2"
    rng = random.Random(0)
    found_out = 0
    for file in _files_of(newest):
        size = file.stat().st_size
        places = sorted({0, size - 1, *(rng.randrange(size) for _ in range(4))})
        kinds = [("flip", place) for place in places]
        kinds += [("cut", rng.randrange(size)), ("cut", 0), ("gone", 0)]
        for kind, place in kinds:
            run = shutil.copytree(tmp_path / "good", tmp_path / "run")
            path = run / file.relative_to(tmp_path / "good")
            if kind == "flip":
                _flip(path, place, 1 << rng.randrange(8))
            elif kind == "cut":
                os.truncate(path, place)
            else:
                path.unlink()
            restored = _restore_newest(run)
            assert_trees_equal(restored.state, _numbered(restored.step))
            assert restored.step in (1, 2)
            found_out += restored.step == 1
            shutil.rmtree(run)
    assert found_out > 40


# Unfinished ones.


def test_unfinished_ones_are_never_restored_and_only_the_newest_is_kept(
    tmp_path: Path,
):
    _save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for age, name in (
        (3, "7.orbax-checkpoint-tmp"),
        (2, "4"),
        (1, "9.orbax-checkpoint-tmp"),
    ):
        shutil.copytree(folder / "1", folder / name)
        shutil.rmtree(folder / name / "info")
        os.utime(folder / name, (time.time() - age,) * 2)
    before = _tree_of(tmp_path)
    assert _restore_newest(tmp_path, read_only=True).step == 1
    assert _tree_of(tmp_path) == before
    assert len(checkpoint_files.unfinished_in(folder)) == 2
    assert _restore_newest(tmp_path).step == 1
    assert [p.name for p in folder.iterdir()] == ["1"]
    damaged = tmp_path / "damaged"
    names = ["checkpoints-4", "unfinished-checkpoints-9"]
    assert sorted(p.name for p in damaged.iterdir()) == names
    shutil.copytree(folder / "1", folder / "11.orbax-checkpoint-tmp")
    assert _restore_newest(tmp_path).step == 1
    names = ["checkpoints-4", "unfinished-checkpoints-11"]
    assert sorted(p.name for p in damaged.iterdir()) == names


_KILLED = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import ddaebm_jax.training.checkpoints
import pytest, ml_dtypes
workdir = Path({workdir!r})

def child():
    signal.alarm(40)
    import test_checkpointing as t
    checkpoints = t.checkpointing.Checkpoints(workdir, keep=2)
    found = checkpoints.restore_newest(t._numbered(0, 30_000))
    step = 0
    if found is not None:
        step = found.step
        t.assert_trees_equal(found.state, t._numbered(step, 30_000))
    print("from", step, flush=True)
    while True:
        step += 1
        checkpoints.save(t._numbered(step, 30_000), {{"data": None}})
        if step % 3 == 0:
            checkpoints.wait()
            print("safe", step, flush=True)

for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(9)
    print("pid", pid, flush=True)
    print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_run_killed_at_any_moment_goes_on_from_what_was_complete(tmp_path: Path):
    rng = random.Random(0)
    script = _KILLED.format(
        root=str(ROOT), tests=str(Path(__file__).parent), workdir=str(tmp_path)
    )
    forker = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )

    def line() -> tuple[str, int]:
        word, number = forker.stdout.readline().split()
        return word, int(number)

    safe = 0
    for kill in range(24):
        forker.stdin.write("go\n")
        forker.stdin.flush()
        pid = dict([line()])["pid"]
        if kill % 4:  # Else: while it starts and cleans up.
            word, start = line()
            assert (word, start >= safe) == ("from", True)
        time.sleep(rng.random() * 0.3)
        os.kill(pid, signal.SIGKILL)
        word, number = line()
        while word != "end":
            safe = max(safe, number)
            word, number = line()
        assert number == -signal.SIGKILL
        left = list((tmp_path / "damaged").glob("*"))
        assert all(p.name.startswith("unfinished-") for p in left) and len(left) <= 1
    forker.stdin.close()
    assert forker.wait(timeout=30) == 0
    checkpoints = checkpointing.Checkpoints(tmp_path)
    found = checkpoints.restore_newest(_numbered(0, 30_000))
    checkpoints.close()
    assert found.step >= safe > 0
    assert_trees_equal(found.state, _numbered(found.step, 30_000))


# Failures of writing.


def test_a_file_where_the_directory_should_be(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(checkpoint_files.CheckpointWriteError, match="cannot be made"):
        checkpointing.Checkpoints(tmp_path)


def _save_until_it_fails(
    checkpoints: checkpointing.Checkpoints, state: minimax.TrainState
) -> str:
    """Returns the reason; `check` tells it without waiting."""
    with pytest.raises(checkpoint_files.CheckpointWriteError) as caught:
        checkpoints.save(state, {})
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)
    return str(caught.value)


def _fail_and_recover(workdir: Path, obstruct, release) -> None:
    """Saves while that is not possible, and again afterwards, with one object."""
    checkpoints = checkpointing.Checkpoints(workdir, keep=1)
    checkpoints.save(_numbered(1, 30_000), {})
    checkpoints.wait()
    obstruct()
    for step in (2, 2, 3):
        reason = _save_until_it_fails(checkpoints, _numbered(step, 30_000))
        assert f"{step} could not be written" in reason and "\n" not in reason
        assert checkpoints.steps() == [1]
        assert checkpoint_files.unfinished_in(checkpoints.directory) == []
        assert checkpoint_files.verify(workdir, "checkpoints", 1) is None
    release()
    for step in (2, 3):
        checkpoints.save(_numbered(step, 30_000), {})
        checkpoints.wait()
        assert checkpoint_files.steps_in(checkpoints.directory) == [step]
        assert checkpoint_files.verify(workdir, "checkpoints", step) is None
    obstruct()
    try:
        checkpoints.save(_numbered(4, 30_000), {})
        checkpoints.wait()
    except checkpoint_files.CheckpointWriteError:
        pass
    else:
        raise AssertionError("this save cannot have worked")
    release()
    checkpoints.save(_numbered(5, 30_000), {})
    obstruct()
    checkpoints.close()  # Whatever the save has come to.
    release()
    last = _restore_newest_of_size(workdir, 30_000)
    assert last in (3, 5)
    print("recovered")


def _restore_newest_of_size(workdir: Path, width: int) -> int:
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    found = checkpoints.restore_newest(_numbered(0, width))
    assert_trees_equal(found.state, _numbered(found.step, width))
    return found.step


def _with_small_files(workdir: Path) -> None:
    import resource

    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    _fail_and_recover(
        workdir,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most[1])),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most),
    )


def _with_a_full_disk(workdir: Path) -> None:
    ballast = workdir / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            for size in (65536, 512):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    _fail_and_recover(workdir, fill, ballast.unlink)


def _in_child(call: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    paths = [str(ROOT), str(Path(__file__).parent)]
    code = (
        f"import sys, pathlib; sys.path[:0] = {paths!r}\n"
        f"import test_checkpointing as t; t.{call}"
    )
    return subprocess.run(
        [*before, sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_save_is_not_blamed_for_what_the_failed_one_before_comes_to_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its metadata fails at once, and one of its files when that has been told."""
    checkpoints = checkpointing.Checkpoints(tmp_path, keep=1)
    checkpoints.save(_numbered(1, 10), {})
    checkpoints.wait()

    def fail_late(*_: object, **__: object) -> None:
        time.sleep(1.0)
        raise OSError(errno.ENOSPC, "No space left on device, noticed late")

    def fail_at_once() -> None:
        if threading.current_thread().name == "save_finalize":
            raise OSError(errno.ENOSPC, "No space left on device, noticed at once")

    with monkeypatch.context() as patch:
        patch.setattr(
            async_checkpointer, "_background_wait_for_commit_futures", fail_late
        )
        store = checkpoints._manager._non_blocking_metadata_store
        patch.setattr(store, "wait_until_finished", fail_at_once)
        reason = _save_until_it_fails(checkpoints, _numbered(2, 10))
    assert "noticed at once" in reason
    checkpoints.save(_numbered(3, 10), {})
    checkpoints.wait()
    checkpoints.close()
    assert checkpoint_files.steps_in(checkpoints.directory) == [3]


def test_saves_fail_and_recover_where_files_may_not_grow(tmp_path: Path):
    result = _in_child(f"_with_small_files(pathlib.Path({str(tmp_path)!r}))")
    assert "recovered" in result.stdout, result.stderr[-3000:]


def test_saves_fail_and_recover_on_a_full_disk(tmp_path: Path):
    mount = ["unshare", "-rm", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=2m none {tmp_path} && "
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*mount, mounted + "true"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this machine lets nobody mount a file system")
    result = _in_child(
        f"_with_a_full_disk(pathlib.Path({str(tmp_path)!r}))",
        (*mount, mounted + 'exec "$@"', "sh"),
    )
    assert "recovered" in result.stdout, result.stderr[-3000:]


def test_the_old_one_is_deleted_only_after_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seen at the moment of each deletion, in Orbax's thread."""
    seen = []
    folder = tmp_path / "checkpoints"
    checkpoints = checkpointing.Checkpoints(tmp_path, keep=1)
    deleter = checkpoints._manager._checkpoint_deleter
    original = deleter.delete_steps

    def delete_steps(steps):
        seen.append((list(steps), checkpoint_files.steps_in(folder)))
        return original(steps)

    monkeypatch.setattr(deleter, "delete_steps", delete_steps)
    for step in (1, 2, 3):
        checkpoints.save(_numbered(step), {})
    checkpoints.close()
    assert seen == [([], [1]), ([1], [1, 2]), ([2], [2, 3])]


def test_nothing_is_saved_where_only_reading_was_wanted(tmp_path: Path):
    _save(tmp_path, 1)
    checkpoints = checkpointing.Checkpoints(tmp_path, read_only=True)
    with pytest.raises(ValueError, match="read only"):
        checkpoints.save(_numbered(2), {})


def test_a_damaged_best_checkpoint_does_not_stop_a_run(tmp_path: Path):
    found = {"fid": 3.0, **dict.fromkeys(best_checkpoint.MEASUREMENT, "the same")}
    best = best_checkpoint.BestCheckpoint(tmp_path)
    best.offer(_numbered(1), found, {})
    best.close()
    (tmp_path / "best/1/info/metadata").write_text("[]")
    best = best_checkpoint.BestCheckpoint(tmp_path)
    best.offer(_numbered(2), {**found, "fid": 9.0}, {})
    best.close()
    assert checkpoint_files.steps_in(tmp_path / "best") == [2]
    assert (tmp_path / "damaged/best-1").is_dir()


# Those that lack a part, faults that pass, and several processes.


def _without_a_part(workdir: Path, *steps: int) -> None:
    for step in steps:
        (workdir / f"checkpoints/{step}/_CHECKPOINT_METADATA").unlink()


def test_ones_that_lack_a_part_are_damaged_not_unfinished(tmp_path: Path):
    _save(tmp_path, 1, 2, 3)
    _without_a_part(tmp_path, 1, 2, 3)
    before = _tree_of(tmp_path)
    for read_only in (False, True):
        with pytest.raises(checkpoint_files.CheckpointError) as caught:
            _restore_newest(tmp_path, read_only)
        assert str(caught.value).count("lacks a part") == 3
        assert _tree_of(tmp_path) == before


def test_one_that_lacks_a_part_is_moved_before_its_step_is_saved(tmp_path: Path):
    _save(tmp_path, 1, 2, 3)
    _without_a_part(tmp_path, 3)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_numbered(3), {})
    checkpoints.close()
    assert _restore_newest(tmp_path).step == 3
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["checkpoints-3"]


def test_what_is_left_of_a_deletion_is_deleted_with_the_next_save(tmp_path: Path):
    _save(tmp_path, 1, 2, 3)
    _without_a_part(tmp_path, 1)
    assert _restore_newest(tmp_path).step == 3
    _save(tmp_path, 4)
    assert checkpoint_files.steps_in(tmp_path / "checkpoints") == [2, 3, 4]
    assert not (tmp_path / "checkpoints/1").exists()
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError(), True),
        (OSError(5, "Input/output error"), True),
        (PermissionError(13, "Permission denied"), True),
        (OSError(24, "Too many open files"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), True),
        (ValueError("UNAVAILABLE: Error reading"), True),
        (ValueError("Error reading x: Input/output error"), True),
        (FileNotFoundError(2, "No such file"), False),
        (IsADirectoryError(21, "Is a directory"), False),
        (ValueError("NOT_FOUND: no manifest"), False),
        (ValueError("DATA_LOSS: CRC-32C mismatch"), False),
        (KeyError("x"), False),
    ],
)
def test_a_passing_fault_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool
):
    _save(tmp_path, 1, 2)
    before = _tree_of(tmp_path)
    original = checkpoint_files.check_sums

    def check(path, expected, state):
        if path.name == "2":
            raise error
        original(path, expected, state)

    monkeypatch.setattr(checkpoint_files, "check_sums", check)
    if not passes:
        assert _restore_newest(tmp_path).step == 1
        return
    with pytest.raises(checkpoint_files.CheckpointReadError, match="try again"):
        _restore_newest(tmp_path)
    assert _tree_of(tmp_path) == before


def test_a_fault_of_another_process_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpointing.parallel, "all_agree", lambda _: False)
    with (
        pytest.raises(checkpoint_files.CheckpointReadError),
        checkpointing.agreed(tmp_path),
    ):
        pass


def test_the_first_process_says_which_steps_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jax.experimental import multihost_utils

    _save(tmp_path, 1, 2)
    checkpoints = checkpointing.Checkpoints(tmp_path, read_only=True)
    told = np.full((checkpointing._MOST_STEPS, 2), -1, np.int32)
    told[:2] = [[0, 1], [1, 3]]
    sent = []

    def broadcast(value):
        sent.append(value)
        return told

    monkeypatch.setattr(checkpointing.parallel, "all_agree", lambda value: value)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    assert checkpoints.same_steps() == [1, 2**31 + 3]
    assert sent[0][:3].tolist() == [[0, 1], [0, 2], [-1, -1]]


def test_the_first_process_says_whether_a_step_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.parallel, "is_first_process", lambda: False)
        checkpoints.save(_numbered(1), {})  # The others said that it is there.
    checkpoints.close()
    assert checkpoints.steps() == []


# The best, closing and interruptions.

_FOUND = {"fid": 3.0, **dict.fromkeys(best_checkpoint.MEASUREMENT, "the same")}


def test_a_best_that_was_taken_back_is_forgotten_but_not_lost(tmp_path: Path):
    best = best_checkpoint.BestCheckpoint(tmp_path)
    best.offer(_numbered(5), _FOUND, {})
    best.forget_after(5)
    best.offer(_numbered(6), {**_FOUND, "fid": 4.0}, {})
    assert best._checkpoints.steps() == [5]
    best.forget_after(4)
    assert (tmp_path / "abandoned/best-5").is_dir()
    best.offer(_numbered(5), {**_FOUND, "fid": 9.0}, {})
    best.close()
    info = checkpoint_files.read_info(tmp_path / "best/5")
    assert info["fid"] == 9.0


def test_a_best_replaces_another_of_its_step(tmp_path: Path):
    best = best_checkpoint.BestCheckpoint(tmp_path)
    best.offer(_numbered(5), _FOUND, {})
    best.offer(_numbered(5), {**_FOUND, "fid": 2.0}, {})
    best.close()
    assert checkpoint_files.read_info(tmp_path / "best/5")["fid"] == 2.0
    old = json.loads((tmp_path / "abandoned/best-5/info/metadata").read_text())
    assert old["fid"] == 3.0


def test_a_best_that_cannot_be_looked_for_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def unreadable(_):
        raise OSError(errno.EIO, "Input/output error")

    best = best_checkpoint.BestCheckpoint(tmp_path)
    run = runs.Run(**dict.fromkeys(runs.Run._fields))._replace(best=best, info={})
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Checkpoints, "steps", unreadable)
        measuring._offer(run, _numbered(5), _FOUND)
        best.forget_after(3)
    assert "the best checkpoint cannot be kept" in caplog.text
    assert caplog.text.count("Input/output error") == 2
    measuring._offer(run, _numbered(6), _FOUND)
    best.close()
    assert checkpoint_files.steps_in(tmp_path / "best") == [6]


def test_closing_logs_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    checkpoints = checkpointing.Checkpoints(tmp_path)

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    checkpoints.close()
    assert "could not be written" in caplog.text


class _InterruptedError(BaseException):
    pass


def test_an_interruption_leaves_a_running_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_numbered(1), {})

    def interrupted():
        raise _InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", interrupted)
        with pytest.raises(_InterruptedError):
            checkpoints.wait()
    assert checkpoints._pending == 1
    checkpoints.wait()
    monkeypatch.setattr(checkpointing, "_join_writers", lambda: False)
    running = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    running.mkdir()
    checkpoints._failed(2, OSError("x"))
    assert running.is_dir()
    checkpoints.close()
