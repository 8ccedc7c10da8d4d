"""Devices and processes: every way of running a step gives one result."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import quick
from cli import ROOT
from helpers import assert_trees_close
from processes import Forked
from runs import final_state, train
from stepping import CONFIGS, digits, indices, plane, trained
from test_config import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sharding
from ddaebm_jax.commands import sample
from ddaebm_jax.errors import InputError
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import run_directory
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
    lowered = dispatcher.lower(dispatcher.init(), 1, batches)
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
        ({"optimizer__accumulate": 3}, "does not divide data.batch_size 16"),
        ({"optimizer__accumulate": 2, "model__mlp__norm": "batch"}, "whole batch"),
    ],
)
def test_what_does_not_go_together(fields: dict, message: str):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(plane(**fields))


def test_parts_of_the_largest_images_are_whole_groups():
    config = load_recipe(ROOT / "configs" / "lsun_church128.py")
    config.data.batch_size, config.optimizer.accumulate = 8, 4
    with pytest.raises(config_lib.ConfigError, match="groups of 4; each part must be"):
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
    train(saved, tmp_path / "run")
    on = plane(train__num_steps=4, parallel__num_devices=devices, **fields)
    train(on, tmp_path / "run")
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
    train(plane(**fields), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["parallel"]["num_devices"] = 64
    path.write_text(json.dumps(config))
    drawn = sample.sample(tmp_path / "run", 10, 0, str(tmp_path / "drawn.npz"))
    assert np.load(drawn)["x"].shape == (10, 2)
    with pytest.raises(InputError, match=r"parallel\.num_devices is 64"):
        train(run_directory.read_config(tmp_path / "run"), tmp_path / "run")


# --- Several processes ------------------------------------------------------------


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
