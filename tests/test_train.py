"""The loop: resumed equals unbroken, bit for bit, whatever stops it."""

import json
import random
import signal
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from cli import tiny
from helpers import assert_trees_close, assert_trees_equal
from processes import Started

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiments
from ddaebm_jax import minimax
from ddaebm_jax import sharding as parallel
from ddaebm_jax.commands import modes
from ddaebm_jax.config.fields import leaves
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.training import (
    checkpoints as checkpointing,
)
from ddaebm_jax.training import (
    loop as train,
)
from ddaebm_jax.training import (
    run_directory,
)


def _config(**fields: object) -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.unlock()
    small = {
        "model.mlp.hidden": (8, 8),
        "model.mlp.x_widths": (4, 4),
        "data.batch_size": 8,
        "optimizer.ema_decay": 0.9,
        "train.num_steps": 24,
        "train.steps_per_dispatch": 4,
        "train.report_every": 8,
        "train.picture_every": 0,
        "train.checkpoint_every": 8,
        "train.tensorboard": False,
        "parallel.num_devices": 1,
        "evaluation.num_samples": 64,
        "evaluation.num_projections": 4,
    }
    small.update({name.replace("__", "."): value for name, value in fields.items()})
    config.update_from_flattened_dict(small)
    return config


def _final_state(workdir: Path) -> minimax.TrainState:
    """The newest checkpoint of a run."""
    experiment = experiments.build(run_directory.read_config(workdir))
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(experiments.init_state(experiment))
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train.train(_config(), workdir)
    return workdir


def test_a_resumed_run_is_bit_identical(unbroken: Path, tmp_path: Path):
    train.train(_config(train__num_steps=8), tmp_path / "run")
    train.train(_config(train__num_steps=16), tmp_path / "run")
    train.train(_config(), tmp_path / "run")
    assert_trees_equal(_final_state(tmp_path / "run"), _final_state(unbroken))


def test_a_run_whose_rates_decay_cannot_change_its_length(tmp_path: Path):
    """The rate at a step depends on the length: resumed would not equal unbroken."""
    fields = {"optimizer__schedule": "cosine", "train__checkpoint_every": 4}
    train.train(_config(train__num_steps=4, **fields), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(InputError, match=r"train\.num_steps"):
        train.train(_config(train__num_steps=8, **fields), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_cannot_be_made_shorter_than_it_is(unbroken: Path):
    before = {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()}
    with pytest.raises(InputError, match=r"beyond train\.num_steps 10"):
        train.train(_config(train__num_steps=10), unbroken)
    assert {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()} == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    unbroken: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json.partial").write_text("{")  # killed while writing it
    run_directory.open_workdir(workdir, _config())
    (workdir / "config.json").write_text(config_lib.to_json(_config()))
    (workdir / "checkpoints").mkdir()  # killed right after making it
    train.train(_config(), workdir)
    assert_trees_equal(_final_state(workdir), _final_state(unbroken))


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "samples"])
def test_a_run_does_not_write_through_links_out_of_its_directory(
    name: str, tmp_path: Path
):
    workdir, outside = tmp_path / "run", tmp_path / "precious"
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(_config()))
    outside.write_text("lines\n")
    (workdir / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{name} is a link out of the run directory"):
        train.train(_config(), workdir)
    assert outside.read_text() == "lines\n"
    (workdir / name).unlink()
    (workdir / "mine").write_text("")
    (workdir / name).symlink_to(workdir / "mine")  # Within it: the user's own affair.
    run_directory.open_workdir(workdir, _config())


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    unbroken: Path, tmp_path: Path
):
    train.train(_config(), tmp_path / "same")
    train.train(_config(seed=1), tmp_path / "other")
    first = _final_state(unbroken)
    assert_trees_equal(_final_state(tmp_path / "same"), first)
    kernel = first.variables.energy["params"]
    other = _final_state(tmp_path / "other").variables.energy["params"]
    assert not np.allclose(jax.tree.leaves(kernel)[0], jax.tree.leaves(other)[0])


def test_steps_per_dispatch_do_not_change_the_run(unbroken: Path, tmp_path: Path):
    train.train(_config(train__steps_per_dispatch=1), tmp_path / "run")
    assert_trees_close(
        _final_state(tmp_path / "run"), _final_state(unbroken), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_does_not_change_the_run(
    unbroken: Path, tmp_path: Path, devices: int
):
    """Up to the rounding of sums taken in another order."""
    train.train(_config(parallel__num_devices=devices), tmp_path / "run")
    assert_trees_close(
        _final_state(tmp_path / "run"), _final_state(unbroken), rtol=1e-3, atol=1e-5
    )


def test_the_batch_is_split_over_the_devices():
    mesh = parallel.make_mesh(4, 8)
    index = parallel.JitLayout(mesh).batch_index(8)
    assert [shard.data.tolist() for shard in index.addressable_shards] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize(
    ("devices", "batch", "expected"),
    [
        (9, 9, "parallel.num_devices is 9, but there are 8"),
        (8, 12, "data.batch_size is 12, not divisible by the 8 devices; use 8 or 16"),
        (0, 7, "not divisible by the 8 devices; use 8,"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(
    tmp_path: Path, devices: int, batch: int, expected: str
):
    config = _config(parallel__num_devices=devices, data__batch_size=batch)
    with pytest.raises(InputError, match=expected):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_are_means_over_the_steps_of_a_report(tmp_path: Path):
    """Reports of 1 step each, averaged, are the report of all of them."""
    fields = {"train__num_steps": 8, "train__steps_per_dispatch": 2}
    for name, every in (("fine", 1), ("coarse", 8)):
        train.train(_config(train__report_every=every, **fields), tmp_path / name)
    reports = {
        name: [
            line
            for line in map(
                json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            )
            if "energy/loss" in line
        ]
        for name in ("fine", "coarse")
    }
    assert len(reports["fine"]) == 8
    (coarse,) = reports["coarse"]
    for key in ("energy/loss", "generator/reconstruction", "energy/update_norm"):
        fine = np.mean([line[key] for line in reports["fine"]])
        np.testing.assert_allclose(coarse[key], fine, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path):
    config = _config(optimizer__learning_rate=1e30, train__checkpoint_every=4)
    with pytest.raises(TrainingError, match="not finite"):
        train.train(config, tmp_path / "run")
    saved = checkpointing.Checkpoints(tmp_path / "run", read_only=True).latest_step()
    if saved is not None:
        for leaf in jax.tree.leaves(_final_state(tmp_path / "run")):
            assert np.isfinite(leaf).all()


def test_without_a_latent_or_posterior_a_run_works_from_end_to_end(tmp_path: Path):
    for field in ("game__latent", "game__posterior"):
        workdir = tmp_path / field
        report = train.train(_config(train__num_steps=4, **{field: False}), workdir)
        assert report["parameters"]["posterior"] == 0
        run = modes.load_run(workdir)
        assert figures.draw_samples(run.experiment, run.variables, 5).shape == (5, 2)


def test_a_run_directory_does_not_choose_what_compiled_code_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a resume the command line's config decides."""
    before = jax.config.jax_compilation_cache_dir
    train.train(_config(train__num_steps=4), tmp_path / "run")
    config = run_directory.read_config(tmp_path / "run")
    config.compilation_cache.directory = str(tmp_path / "theirs")
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    try:
        modes.load_run(tmp_path / "run")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_run_directory_does_not_choose_what_is_written(tmp_path: Path):
    """Reading from where its config says is allowed."""
    theirs = {
        "evaluation.reference_path": str(tmp_path / "reference.npz"),
        "data.tfds": "cifar10:3.0.2",
        "data.tfds_dir": str(tmp_path),
    }
    config = _config(**theirs)
    modes._distrust(config)
    assert config.evaluation.reference_path == config.data.tfds_dir == ""
    (tmp_path / "reference.npz").touch()
    (tmp_path / "cifar10").mkdir()
    config = _config(**theirs)
    modes._distrust(config)
    found = dict(leaves(config))
    assert theirs.items() <= found.items()


def _finish(workdir: Path, flags: list[str]) -> None:
    with Started(*flags, f"--workdir={workdir}") as process:
        result = process.ended(600.0)
    assert result.code == 0, result.err


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
    _finish(whole, flags)

    saved = broken / "checkpoints"

    def unfinished() -> bool:
        """Whether a checkpoint is being written at this moment."""
        return saved.is_dir() and any(
            "tmp" in path.name for path in list(saved.iterdir())
        )

    def complete() -> int:
        names = [p.name for p in saved.iterdir()] if saved.is_dir() else []
        return max((int(name) for name in names if name.isdigit()), default=0)

    left_unfinished = 0
    wait = random.Random(0)
    for kill in range(4):
        before = complete()
        with Started(*flags, f"--workdir={broken}") as process:
            process.until(lambda before=before: complete() > before, every=0.0005)
            if kill % 2:
                process.until(unfinished, every=0.0005)
            else:
                time.sleep(wait.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        left_unfinished += unfinished()
    assert left_unfinished >= 1, "no kill came while a checkpoint was being written"
    assert 0 < complete() < 600

    _finish(broken, flags)
    assert_trees_equal(_final_state(broken), _final_state(whole))
    assert not unfinished()
    steps = [
        [line["step"] for line in map(json.loads, text.splitlines())]
        for text in ((d / "metrics.jsonl").read_text() for d in (whole, broken))
    ]
    assert steps[0] == steps[1]
