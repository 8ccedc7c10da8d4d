"""Devices and processes: every way of running a step gives one result."""

import functools
import json
import math
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import quick
from cli import MAIN, ROOT, environment, tiny
from helpers import assert_trees_close, assert_trees_equal
from processes import Forked, ended, results_of, started
from stepping import CONFIGS, digits, indices, plane, trained
from test_config import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sharding
from ddaebm_jax.commands import modes
from ddaebm_jax.errors import InputError
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import (
    checkpoint_files,
    run_directory,
)
from ddaebm_jax.training import checkpoints as checkpointing
from ddaebm_jax.training import (
    loop as train,
)
from ddaebm_jax.training.dispatch import Dispatcher

STEPS = 3


def assert_same_run(actual: Any, expected: Any):
    """Asserts that two states are the same up to rounding, after a few steps.

    Adam's first steps are near the learning rate (1e-3) whatever the gradient, and
    so another noise or batch would move most numbers by about that. Rounding does so
    only where a gradient is next to nothing: few numbers, and none by much.
    """
    apart = [
        np.abs(np.asarray(a) - np.asarray(b)).ravel()
        for a, b in zip(
            jax.tree.leaves((actual.variables, actual.ema)),
            jax.tree.leaves((expected.variables, expected.ema)),
            strict=True,
        )
    ]
    everything = np.concatenate(apart)
    assert everything.max() < 5e-4
    assert everything.mean() < 3e-6


WAYS = {
    "jit": {"parallel__num_devices": 8},
    "pmap": {"parallel__num_devices": 8, "parallel__mode": "pmap"},
    "pmap of 2": {"parallel__num_devices": 2, "parallel__mode": "pmap"},
    "fsdp": {"parallel__num_devices": 8, "parallel__fsdp": True},
    "in parts": {"parallel__num_devices": 4, "optimizer__accumulate": 2},
    "one device, in parts": {"parallel__num_devices": 1, "optimizer__accumulate": 4},
    "pmap in parts": {
        "parallel__num_devices": 2,
        "parallel__mode": "pmap",
        "optimizer__accumulate": 2,
    },
    "fsdp in parts": {
        "parallel__num_devices": 8,
        "parallel__fsdp": True,
        "optimizer__accumulate": 2,
    },
}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple]:
    """Of one device."""
    return {
        "plane": trained(plane(parallel__num_devices=1), STEPS),
        "digits": trained(digits(parallel__num_devices=1), STEPS),
    }


def test_another_batch_is_another_run(alone: dict[str, tuple]):
    """The comparison sees what it is for."""
    other = trained(plane(parallel__num_devices=1, data__batch_size=8), STEPS)[0]
    with pytest.raises(AssertionError):
        assert_same_run(other, alone["plane"][0])


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("plane", way) for way in WAYS),
        *(("digits", way) for way in ("pmap", "fsdp", "in parts")),
    ],
)
def test_every_way_gives_what_one_device_gives(
    alone: dict[str, tuple], kind: str, way: str, monkeypatch: pytest.MonkeyPatch
):
    """After 3 steps, float32."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
    config = {"plane": plane, "digits": digits}[kind](**WAYS[way])
    state, metrics = trained(config, STEPS)
    expected, expected_metrics = alone[kind]
    assert_same_run(state, expected)
    assert int(state.step) == STEPS
    assert_trees_close(metrics, expected_metrics, rtol=2e-3, atol=1e-3)
    leaves = jax.tree.leaves((state.variables, state.opt_energy))
    whole = [leaf.is_fully_replicated for leaf in leaves]
    if "fsdp" in way:
        split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
        assert len(split) > 10
        for leaf in split:
            shard = leaf.addressable_shards[0].data
            assert shard.size * 8 == leaf.size
    else:
        assert all(whole)


def compiled_text(config: ml_collections.ConfigDict) -> str:
    """Returns the compiled program of one step, compiled with little effort."""
    described = experiment.build(config)
    dispatcher = Dispatcher(described)
    batches = indices(0) if described.source.holds_images else None
    inputs = dispatcher.inputs(batches)
    lowered = dispatcher.steps.program.lower(1, dispatcher.init(), *inputs)
    return lowered.compile(compiler_options=quick.options()).as_text()


def collectives(text: str) -> list[tuple[str, int]]:
    """Returns kind and numbers of each collective of a compiled program."""
    found = re.findall(r"= (.*?) (all-[a-z-]+|reduce-scatter|collective-\w+)\(", text)
    return [
        (
            kind,
            sum(
                math.prod(int(side) for side in shape.split(",") if side)
                for shape in re.findall(r"[a-z]+\d+\[([\d,]*)\]", shapes)
            ),
        )
        for shapes, kind in found
    ]


@pytest.mark.parametrize("kind", ["plane", "digits", "in parts", "pmap"])
def test_gradients_are_reduced_once_a_player(kind: str):
    """The energy's, and the generator's with the posterior's; nothing is gathered."""
    fields = {"plane": {}, "digits": {}, **WAYS}[kind] | {"parallel__num_devices": 8}
    config = (digits if kind == "digits" else plane)(**fields)
    text = compiled_text(config)
    found = collectives(text)
    assert [kind for kind, _ in found] == ["all-reduce", "all-reduce"]
    variables = experiment.state_shapes(experiment.build(config)).variables
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in variables]
    # Each gradient once, but for the few that are known to be zero, and a few metrics;
    # in the text in any order.
    expected = sorted((sizes[0], sizes[1] + sizes[2]))
    more = np.subtract(sorted(numbers for _, numbers in found), expected)
    assert (np.abs(more) < 60).all()
    # Not in a loop, where they would run for each part.
    assert len(collectives(text[text.index("ENTRY") :])) == 2


def test_a_state_in_parts_is_gathered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
    text = compiled_text(plane(parallel__num_devices=8, parallel__fsdp=True))
    assert "all-gather" in [kind for kind, _ in collectives(text)]


BATCH_NORM = {"model__mlp__norm": "batch", "data__batch_size": 32}


def test_batch_norm_reduces_gradients_once_a_player_too():
    config = plane(parallel__num_devices=8, **BATCH_NORM)
    found = collectives(compiled_text(config))
    assert {kind for kind, _ in found} == {"all-reduce"}
    variables = experiment.state_shapes(experiment.build(config)).variables
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(one["params"])) for one in variables
    ]
    # The others are statistics, of a few layers of at most 16 features.
    gradients = sorted(numbers for _, numbers in found if numbers > 200)
    assert len(gradients) == 2
    more = np.subtract(gradients, sorted((sizes[0], sizes[1] + sizes[2])))
    assert (np.abs(more) < 300).all(), more


@pytest.mark.parametrize("mode", ("jit", "pmap"))
def test_batch_norm_sees_the_whole_batch(mode: str):
    """A step's losses and gradients are those of one device.

    Later ones are not the same: a bias before a norm has no gradient but rounding, of
    which Adam makes steps.
    """
    ways = ({"num_devices": 1}, {"num_devices": 8, "mode": mode})
    one, eight = (
        trained(
            plane(**{f"parallel__{k}": v for k, v in way.items()}, **BATCH_NORM),
            steps=1,
        )
        for way in ways
    )
    for told in (one[1], eight[1]):
        told.pop("generator/update_norm")  # Of which the norm has those steps, too.
        told.pop("posterior/update_norm")
    assert_trees_close(eight[1], one[1], rtol=1e-4, atol=1e-5)
    assert_trees_close(
        eight[0].variables.generator["batch_stats"],
        one[0].variables.generator["batch_stats"],
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel__mode": "pmapp"}, r"allowed: jit, pmap \(did you mean 'pmap'"),
        ({"parallel__mode": "pmap", "parallel__fsdp": True}, "fsdp is True"),
        ({"optimizer__accumulate": 3}, "batch_size is 16; the first must divide"),
        ({"optimizer__accumulate": 2, "model__mlp__norm": "batch"}, "whole batch"),
    ],
)
def test_what_does_not_go_together(fields: dict, message: str):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(plane(**fields))


def test_parts_of_the_largest_images_are_whole_groups():
    config = load_recipe(ROOT / "configs" / "lsun_church128.py")
    config.data.batch_size, config.optimizer.accumulate = 8, 4
    with pytest.raises(config_lib.ConfigError, match="part must be a multiple of 4"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("batch", "parts", "group", "message"),
    [
        (4, 1, 1, "data.batch_size is 4, not divisible by the 8 devices; use 8, or"),
        (8, 2, 1, "each in optimizer.accumulate=2 parts; use 16"),
        (40, 2, 4, "of whole groups of 4; use 64"),
    ],
)
def test_more_shares_than_examples(batch: int, parts: int, group: int, message: str):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(8, batch, parts, group)


def test_parts_of_a_state():
    mesh = sharding.make_mesh(4)
    spec = sharding.fully_sharded(mesh, (3, 256, 512)).spec
    assert spec == jax.sharding.PartitionSpec(None, None, "data")
    assert sharding.fully_sharded(mesh, (512, 31)).is_fully_replicated  # Too small.
    assert sharding.fully_sharded(mesh, (513, 1_001)).is_fully_replicated
    assert sharding.fully_sharded(mesh, ()).is_fully_replicated


def test_processes_must_be_told_of_wholly():
    for told in (("host:1", None, 0), ("", 2, None), ("", 2, 0)):
        with pytest.raises(InputError, match="belong together"):
            sharding.join(sharding.Processes(*told))
    with pytest.raises(InputError, match="process_id is 2 of --num_processes=2"):
        sharding.join(sharding.Processes("localhost:1", 2, 2))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_is_taken_up_by_another_number_of_devices(
    tmp_path: Path, devices: int, monkeypatch: pytest.MonkeyPatch
):
    """Saved by 4, in parts; the whole way on 4 gives the same."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
    fields = {
        "train__report_every": 2,
        "train__checkpoint_every": 2,
        "train__picture_every": 0,
        "train__steps_per_dispatch": 2,
        "train__tensorboard": False,
        "evaluation__num_samples": 16,
        "evaluation__num_projections": 4,
    }
    saved = plane(
        train__num_steps=2, parallel__num_devices=4, parallel__fsdp=True, **fields
    )
    train.train(saved, tmp_path / "run")
    on = plane(train__num_steps=4, parallel__num_devices=devices, **fields)
    train.train(on, tmp_path / "run")
    whole = trained(plane(parallel__num_devices=4), steps=4)[0]
    assert_same_run(final_state(tmp_path / "run"), whole)


def test_a_run_is_used_where_there_are_fewer_devices(tmp_path: Path):
    """Trained on 64, so its config says; sampled on the 8 that are here."""
    fields = {
        "train__num_steps": 1,
        "train__picture_every": 0,
        "train__tensorboard": False,
        "evaluation__num_samples": 16,
        "evaluation__num_projections": 4,
    }
    train.train(plane(**fields), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["parallel"]["num_devices"] = 64
    path.write_text(json.dumps(config))
    drawn = modes.sample(tmp_path / "run", 10, 0, str(tmp_path / "drawn.npz"))
    assert np.load(drawn)["x"].shape == (10, 2)
    with pytest.raises(InputError, match=r"parallel\.num_devices is 64"):
        train.train(of_run(tmp_path / "run"), tmp_path / "run")


def final_state(workdir: Path) -> TrainState:
    described = experiment.build(run_directory.read_config(workdir))
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(experiment.evaluation_state(described))
    checkpoints.close()
    return state


# --- Several processes ------------------------------------------------------------


GAUSSIANS = "configs/gaussians25.py"
# Nothing decays there, so that a run's length may change.
RELEASED = "configs/released_gaussians25.py"
RUN = {
    "train__num_steps": 6,
    "train__steps_per_dispatch": 1,
    "train__report_every": 2,
    "train__checkpoint_every": 2,
    "evaluation__num_samples": 16,
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    results = results_of([*tiny(GAUSSIANS, **RUN), f"--workdir={workdir}"], [], [])
    for code, _, err in results:
        assert code == 0, err
    first, second = (out for _, out, _ in results)
    assert str(workdir) in first and "modes_found" in first
    assert str(workdir) not in second  # One process reports.
    return workdir


def of_run(workdir: Path, **fields: Any) -> ml_collections.ConfigDict:
    """The config of a run, changed."""
    config = run_directory.read_config(workdir)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(changes)
    return config


def test_two_processes_do_what_one_does(together: Path, tmp_path: Path):
    train.train(of_run(together, parallel__num_devices=4), tmp_path / "run")
    expected = final_state(tmp_path / "run")
    assert_same_run(final_state(together), expected)
    report = json.loads((together / "report.json").read_text())
    assert report["processes"] == 2 and report["device"] == "4 × cpu"
    lines = (together / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 6, 6]
    assert sorted(path.name for path in (together / "samples").iterdir()) == [
        "plane_00000006.png",
        "steps_00000006.png",
    ]


STREAMED = {"plane": {}, "digits": {"data__on_device": False}}


@functools.cache
def streamed(kind: str) -> TrainState:
    """Returns what one process comes to."""
    config = CONFIGS[kind](**STREAMED[kind], parallel__num_devices=4)
    return trained(config, STEPS, streamed=True)[0]


@pytest.fixture(scope="module")
def processes() -> Iterator[Forked]:
    forked = Forked("stepping")
    yield forked
    forked.close()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("plane", {"parallel__mode": "pmap"}),
        ("digits", {}),
        ("digits", {"parallel__mode": "pmap"}),
        ("digits", {"parallel__fsdp": True}),
    ],
)
def test_two_processes_step_as_one_does(
    processes: Forked, kind: str, fields: dict, tmp_path: Path
):
    """Each reads its own part of every batch of images."""
    out = [str(tmp_path / str(number)) for number in range(2)]
    calls = [[path, kind, STREAMED[kind] | fields, STEPS] for path in out]
    for code, said, _ in processes("in_two_processes", *calls, seconds=600):
        assert code == 0, said
    expected = streamed(kind)
    for path in out:
        with np.load(path + ".npz") as found:
            leaves = [found[str(i)] for i in range(len(found.files))]
        state = jax.tree.unflatten(jax.tree.structure(expected), leaves)
        assert_same_run(state, expected)


def test_a_process_that_cannot_write_for_a_while_changes_nothing(
    together: Path, tmp_path: Path
):
    """The other one waits for it; more of this is in `test_process_faults.py`."""
    workdir = tmp_path / "run"
    flags = [*tiny(GAUSSIANS, **RUN), f"--workdir={workdir}"]
    with started(flags, [], []) as processes:
        writes = processes[1]
        most = resource.prlimit(writes.pid, resource.RLIMIT_FSIZE)
        writes.until((workdir / "checkpoints").exists)
        resource.prlimit(writes.pid, resource.RLIMIT_FSIZE, (10, most[1]))
        writes.until(lambda: "training goes on and tries again" in writes.err)
        assert checkpoint_files.steps_in(workdir / "checkpoints") == []
        resource.prlimit(writes.pid, resource.RLIMIT_FSIZE, most)
        results = ended(processes)
    assert "File too large" in results[1].err
    for code, _, err in results:
        assert code == 0, err
        assert "a checkpoint is written at last" in err
    assert_trees_equal(final_state(workdir), final_state(together))


def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path: Path):
    flags = [
        *tiny(RELEASED, **{**RUN, "train__num_steps": 10_000}),
        f"--workdir={tmp_path / 'run'}",
    ]
    checkpoints = tmp_path / "run" / "checkpoints"
    with started([*flags, "--heartbeat_timeout=10"], [], []) as processes:
        for process in processes:
            process.until((checkpoints / "4").exists)
        processes[1].send_signal(signal.SIGKILL)
        code, _, err = processes[0].ended()
    assert code != 0
    # JAX's own words where it notices first, ours where a computation does.
    noticed = ("another task died", "error: the other processes cannot be reached")
    assert any(words in err for words in noticed), err
    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    total = saved + 2
    shorter = [
        f"--config.train.num_steps={total}" if "num_steps" in flag else flag
        for flag in flags
    ]
    for code, _, err in results_of(shorter, [], []):
        assert code == 0, err
    assert int(final_state(tmp_path / "run").step) == total
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["resumed_from_step"] == saved


def test_processes_with_different_configs_are_refused(tmp_path: Path):
    flags = [*tiny(GAUSSIANS, **RUN), f"--workdir={tmp_path / 'run'}"]
    results = results_of(flags, [], ["--config.game.gamma=0.5"], devices=1)
    for code, _, err in results:
        assert code == 2
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "game.gamma (" in lines[0] and "0.5 in process 1" in lines[0]
    assert not (tmp_path / "run").exists()


def test_more_processes_than_examples(tmp_path: Path):
    flags = [
        *tiny(GAUSSIANS, **{**RUN, "data__batch_size": 1}),
        f"--workdir={tmp_path / 'run'}",
    ]
    for code, _, err in results_of(flags, [], [], devices=1):
        assert code == 2
        assert "error: data.batch_size is 1, not divisible by the 2 devices" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all(tmp_path: Path, number: signal.Signals):
    """After one dispatch, which is saved; JAX chooses a step within it."""
    fields = {
        **RUN,
        "train__num_steps": 100_000,
        "train__checkpoint_every": 100_000,
        "train__steps_per_dispatch": 4,
        "train__report_every": 6,
    }
    flags = [*tiny(RELEASED, **fields), f"--workdir={tmp_path / 'run'}"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(flags, [], []) as processes:
        for process in processes:
            process.until(lambda: metrics.exists() and metrics.read_text() != "")
        processes[1].send_signal(number)
        results = ended(processes)
    codes = [code for code, _, _ in results]
    assert codes == ([0, 0] if number == signal.SIGTERM else [0, 130]), results
    step = int(final_state(tmp_path / "run").step)
    assert 0 < step < 100_000
    assert all(f"after step {step} of 100000" in err for _, _, err in results)


def test_distributed_needs_a_directory():
    result = subprocess.run(
        [sys.executable, str(MAIN), f"--config={GAUSSIANS}", "--distributed"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--distributed needs --workdir" in result.stderr
