"""Devices and processes: every way of running a step gives one result."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import quick
from cli import call, environment
from helpers import assert_trees_close
from processes import free_port
from runs import assert_same_run, final_state, train
from stepping import CONFIGS, digits, in_two_processes, plane, trained

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment, sharding
from ddaebm_jax.commands import sample
from ddaebm_jax.diagnostics import energy_gaps_by_t
from ddaebm_jax.errors import InputError
from ddaebm_jax.training import run_directory
from ddaebm_jax.training.dispatch import Dispatcher

STEPS = {"plane": 3, "digits": 3, "weighted": 1}


WAYS = {
    "jit": {"parallel__num_devices": 8},
    "pmap": {"parallel__num_devices": 8, "parallel__mode": "pmap"},
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


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    with quick.compilation():
        yield


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fsdp split small arrays too."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple]:
    """What one device comes to."""
    return {
        kind: trained(config(parallel__num_devices=1), STEPS[kind])
        for kind, config in CONFIGS.items()
    }


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("plane", way) for way in WAYS),
        *(("weighted", way) for way in ("pmap", "fsdp in parts")),
        ("digits", "in parts"),
    ],
)
@pytest.mark.usefixtures("small_shards")
def test_every_way_gives_what_one_device_gives(
    alone: dict[str, tuple], kind: str, way: str
):
    """After a few steps, float32."""
    state, metrics = trained(CONFIGS[kind](**WAYS[way]), STEPS[kind])
    expected, expected_metrics = alone[kind]
    # More gradients of weighted negatives, which are differences, are near 0.
    assert_same_run(state, expected, 1.5e-3 if kind == "weighted" else 5e-4)
    assert int(state.step) == STEPS[kind]
    assert_trees_close(
        energy_gaps_by_t(metrics),
        energy_gaps_by_t(expected_metrics),
        rtol=2e-3,
        atol=1e-3,
    )
    leaves = jax.tree.leaves((state.variables, state.opt_energy))
    split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    assert len(split) > 10 if "fsdp" in way else split == []
    for leaf in split:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def compiled_text(config: ml_collections.ConfigDict) -> str:
    """Returns the compiled program of one step."""
    described = experiment.build(config)
    dispatcher = Dispatcher(described)
    batches = np.zeros((1, 16), np.int32) if described.source.holds_images else None
    inputs = dispatcher.inputs(batches)
    lowered = dispatcher.steps.program(1).lower(dispatcher.init(), *inputs)
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


def gradient_sizes(config: ml_collections.ConfigDict) -> list[int]:
    """Returns the sizes of the energy's gradient and of the others', in order."""
    variables = experiment.state_shapes(experiment.build(config)).variables
    energy, *others = (
        sum(leaf.size for leaf in jax.tree.leaves(one["params"])) for one in variables
    )
    return sorted((energy, sum(others)))


@pytest.mark.parametrize("kind", ["plane", "digits", "in parts", "pmap"])
def test_gradients_are_reduced_once_a_player(kind: str):
    """The energy's, and the generator's with the posterior's; nothing is gathered."""
    fields = {"plane": {}, "digits": {}, **WAYS}[kind] | {"parallel__num_devices": 8}
    config = (digits if kind == "digits" else plane)(**fields)
    text = compiled_text(config)
    found = collectives(text)
    assert [kind for kind, _ in found] == ["all-reduce", "all-reduce"]
    # Each gradient once, but for the few that are known to be zero, and a few metrics;
    # in the text in any order.
    more = np.subtract(sorted(numbers for _, numbers in found), gradient_sizes(config))
    assert (np.abs(more) < 60).all()
    # Not in a loop, where they would run for each part.
    assert len(collectives(text[text.index("ENTRY") :])) == 2


@pytest.mark.usefixtures("small_shards")
def test_a_state_in_parts_is_gathered():
    text = compiled_text(plane(parallel__num_devices=8, parallel__fsdp=True))
    assert "all-gather" in [kind for kind, _ in collectives(text)]


BATCH_NORM = {"model__mlp__norm": "batch", "data__batch_size": 32}


def test_batch_norm_reduces_gradients_once_a_player_too():
    config = plane(parallel__num_devices=8, **BATCH_NORM)
    found = collectives(compiled_text(config))
    assert {kind for kind, _ in found} == {"all-reduce"}
    # The others are statistics, of a few layers of at most 16 features.
    gradients = sorted(numbers for _, numbers in found if numbers > 200)
    assert len(gradients) == 2
    more = np.subtract(gradients, gradient_sizes(config))
    assert (np.abs(more) < 300).all(), more


@pytest.mark.parametrize("mode", ("jit", "pmap"))
def test_batch_norm_sees_the_whole_batch(mode: str):
    """A step's losses and gradients are those of one device.

    Later ones are not the same: a bias before a norm has no gradient but rounding, of
    which Adam makes steps.
    """
    ways = ({"parallel__num_devices": 1}, WAYS[mode])
    states, both = zip(
        *(trained(plane(**way, **BATCH_NORM), steps=1) for way in ways), strict=True
    )
    both = [energy_gaps_by_t(metrics) for metrics in both]
    for metrics in both:
        del metrics["generator/update_norm"]  # The norm of those steps, too.
        del metrics["posterior/update_norm"]
    assert_trees_close(both[1], both[0], rtol=1e-4, atol=1e-5)
    averages = (state.variables.generator["batch_stats"] for state in states)
    assert_trees_close(*averages, rtol=1e-4, atol=1e-6)


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


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps are of 4 devices, each with a part of the state, of 8, of 1."""
    workdir = tmp_path_factory.mktemp("moved") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
        for step, devices in enumerate((4, 8, 1), 1):
            config = plane(
                train__num_steps=step,
                parallel__num_devices=devices,
                parallel__fsdp=devices == 4,
            )
            train(config, workdir)
    return workdir


def test_a_run_goes_on_with_another_number_of_devices(
    alone: dict[str, tuple], moved: Path
):
    assert_same_run(final_state(moved), alone["plane"][0])


def test_a_run_is_used_where_there_are_fewer_devices(moved: Path, tmp_path: Path):
    """Trained on 64, by its config; sampled on the 8 that are here."""
    workdir = shutil.copytree(moved, tmp_path / "run")
    config = run_directory.read_config(workdir)
    config.parallel.num_devices = 64
    (workdir / "config.json").write_text(config_lib.to_json(config))
    drawn = sample.sample(workdir, 10, 0, str(tmp_path / "drawn.npz"))
    assert np.load(drawn)["x"].shape == (10, 2)
    with pytest.raises(InputError, match=r"parallel\.num_devices is 64"):
        train(config, workdir)


# --- Several processes ------------------------------------------------------------


def test_two_processes_step_as_one_does(alone: dict[str, tuple], tmp_path: Path):
    """Each reads its own part of every batch of images."""
    runs = [
        ("digits", {"data__on_device": False}),
        ("plane", {"parallel__mode": "pmap"}),
        ("plane", {"parallel__fsdp": True}),
    ]
    port = free_port()
    calls = [[number, port, str(tmp_path), runs, 3] for number in range(2)]
    env = environment(devices=2)
    for code, _, err in call(in_two_processes, *calls, env=env, seconds=600.0):
        assert code == 0, err
    for run, (kind, _) in enumerate(runs):
        expected, _ = alone[kind]
        for number in range(2):
            with np.load(tmp_path / f"{run}-{number}.npz") as found:
                leaves = [found[name] for name in found.files]
            state = jax.tree.unflatten(jax.tree.structure(expected), leaves)
            assert_same_run(state, expected)
