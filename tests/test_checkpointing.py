"""A checkpoint gives back exactly what was saved, or says why it cannot."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GAME, assert_trees_equal, smooth_networks

from ddaebm_jax import checkpointing, files, minimax

OPTIMIZERS = minimax.make_optimizers(1e-3, 1e-3, 0.5, 0.9)


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
    with pytest.raises(checkpointing.CheckpointError, match="train first"):
        checkpointing.Checkpoints(tmp_path, read_only=True)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    with pytest.raises(checkpointing.CheckpointError, match="train first"):
        checkpoints.restore(_state())
    checkpoints.close()


def test_a_state_of_other_shapes_is_refused(tmp_path: Path):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_state(dim=2), {})
    checkpoints.wait()
    with pytest.raises(checkpointing.CheckpointError, match="does not hold the state"):
        checkpoints.restore(_state(dim=3))
    checkpoints.close()


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpointing, "FORMAT_VERSION", 99)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    checkpoints.save(_state(), {})
    checkpoints.wait()
    monkeypatch.setattr(checkpointing, "FORMAT_VERSION", 1)
    with pytest.raises(checkpointing.CheckpointError, match="format 99"):
        checkpoints.info(3)
    checkpoints.close()


def test_an_atomic_write_replaces_or_leaves(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_json_atomically(path, {"x": 1})
    with pytest.raises(TypeError):
        files.write_json_atomically(path, {"x": object()})
    assert path.read_text() == '{\n  "x": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
