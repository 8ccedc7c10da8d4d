"""The Python interface: its examples, its units, and its errors."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from cli import ROOT, TINY, TINY_UNET

import ddaebm_jax as ddaebm
from ddaebm_jax.config import recipes
from ddaebm_jax.evaluation import inference
from ddaebm_jax.training.loop import train
from ddaebm_jax.training.trained_run import load_run

SMALL = {
    "train.num_steps": 20,
    "train.steps_per_dispatch": 10,
    "train.report_every": 10,
    "train.picture_every": 0,
    "train.tensorboard": False,
    "parallel.num_devices": 1,
    "evaluation.num_particles": 2_000,
    "evaluation.num_runs": 2,
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    with quick.compilation():
        yield


SHIFT, SCALE = np.array([100.0, -5.0, 0.0]), np.array([3.0, 0.1, 1e3])


def small(name: str, **fields) -> object:
    unet = TINY_UNET if name in ("digits", "folder") else {}
    own = {} if unet else {k: v for k, v in TINY.items() if k.startswith("model")}
    return ddaebm.recipe(name, **(own | unet | SMALL | fields))


def rows(num: int = 200, dim: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(num, dim))
    return SHIFT[:dim] + SCALE[:dim] * x


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> ddaebm.Model:
    folder = tmp_path_factory.mktemp("table") / "run"
    return ddaebm.fit(rows(), small("table"), folder)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def images(pixels: np.ndarray, tmp_path_factory) -> ddaebm.Model:
    folder = tmp_path_factory.mktemp("images") / "run"
    return ddaebm.fit(pixels, small("folder", **{"data.batch_size": 8}), folder)


def test_the_examples_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every block of docs/api.md, one after another, with smaller recipes."""
    monkeypatch.chdir(tmp_path)
    load = recipes.load
    few = TINY | SMALL

    def small_load(name: str):
        found = load(name)
        found.update_from_flattened_dict(few)
        return found

    monkeypatch.setattr(recipes, "load", small_load)
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        block = block.replace("2_000})", "40})").replace("2_000", "400")
        exec(compile(block, "docs/api.md", "exec"), names)
    assert names["samples"].shape == (1_000, 2) and names["f"].shape == (200,)
    assert names["score"].shape == (1_000, 2)
    assert (tmp_path / "density.png").exists() and (tmp_path / "curves.png").exists()


def test_energies_are_of_the_datas_own_units(table: ddaebm.Model):
    x = rows(50)
    run, table_of = table.run, table.run.experiment.source.table
    known = inference.energies(
        run.experiment, run.variables, table_of.standardizer.transform(x)
    )
    np.testing.assert_allclose(table.energy(x), known, rtol=1e-6)
    assert table.energy(x[0]) == pytest.approx(known[0], rel=1e-5)
    assert table.energy(x[:0]).shape == (0,)
    samples = table.sample(500)
    spread = np.abs(samples - SHIFT) / SCALE
    assert samples.shape == (500, 3) and np.median(spread) < 3.0


def test_the_energy_inside_jit_vmap_and_grad(table: ddaebm.Model):
    x = rows(7).astype(np.float32)
    known = table.energy(x)
    # float32 differences of numbers of about 100 in units of 0.1.
    near = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(jax.jit(table.energy)(x), known, **near)
    np.testing.assert_allclose(jax.vmap(table.energy)(x), known, **near)
    gradient = jax.vmap(jax.grad(table.energy))(x)
    step = np.array([0.0, 1e-2, 0.0], np.float32)
    change = (table.energy(x + step) - table.energy(x - step)) / 2e-2
    np.testing.assert_allclose(gradient[:, 1], change, rtol=0.1, atol=0.05)


def test_log_densities_are_normalised_in_the_datas_own_units(table: ddaebm.Model):
    """By importance sampling from a wide Gaussian around the data."""
    assert table.log_z is not None
    rng = np.random.default_rng(2)
    z = 1.5 * rng.standard_normal((4_000, 3))
    x = jnp.asarray(SHIFT + SCALE * z, jnp.float32)
    log_q = (-0.5 * (z / 1.5) ** 2 - np.log(1.5 * SCALE * np.sqrt(2 * np.pi))).sum(1)
    log_p = np.asarray(jax.jit(jax.vmap(table.log_density))(x), np.float64)
    assert np.exp(log_p - log_q).mean() == pytest.approx(1.0, abs=0.15)


def test_runs_are_found_and_told(table: ddaebm.Model):
    found = ddaebm.load(table.workdir.parent)
    assert found.workdir == table.workdir and found.step == 20
    assert found.figures == table.figures and "test_energy_mean" in found.figures
    text = repr(found)
    for part in ("table", "step 20", str(table.workdir), "test_energy_mean"):
        assert part in text
    np.testing.assert_array_equal(found.sample(3), table.sample(3))


def test_images_are_uint8_and_floats_in_one_range(
    images: ddaebm.Model, pixels: np.ndarray
):
    known = images.energy(pixels)
    floats = pixels / np.float32(127.5) - 1
    np.testing.assert_allclose(images.energy(floats), known, rtol=1e-4, atol=1e-4)
    drawn = images.sample(3)
    assert drawn.dtype == np.uint8 and drawn.shape == (3, 8, 8, 1)
    assert images.log_z is None
    one = images.log_density(floats[0])
    assert one == pytest.approx(float(known[0]), rel=1e-4, abs=1e-4)
    assert images.plot().axes and images.plot_history().axes


def test_images_of_a_moved_run_are_found(images: ddaebm.Model, tmp_path: Path):
    shutil.copytree(images.workdir, tmp_path / "moved")
    moved = tmp_path / "moved" / "data.npz"
    run = load_run(moved.parent, open_images=True, data_path=moved)
    kept = images.run.experiment.config.data.test_fraction
    assert len(run.experiment.source.held_out(100, 0)) == round(40 * kept)


def test_fit_continues_a_run_with_the_same_array_only(table: ddaebm.Model):
    again = ddaebm.fit(rows(), table.config, table.workdir)
    assert again.step == 20
    with pytest.raises(ddaebm.InputError, match="holds other data"):
        ddaebm.fit(rows() + 1.0, table.config, table.workdir)


def test_the_first_use_may_be_inside_jit(table: ddaebm.Model):
    fresh, x = ddaebm.load(table.workdir), rows(1)[0].astype(np.float32)
    inside = jax.jit(lambda x: fresh.log_density(x) + fresh.energy(rows(1)[0]))(x)
    expected = table.log_density(x) + table.energy(rows(1)[0])
    assert inside == pytest.approx(float(expected), rel=1e-3)


def test_log_densities_take_pixels(images: ddaebm.Model, pixels: np.ndarray):
    known = images.energy(pixels[:3])
    found = jax.vmap(images.log_density)(pixels[:3])
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-4)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path):
    one, folder = rows(1), tmp_path / "run"
    with pytest.raises(ddaebm.InputError):
        ddaebm.fit(one, small("table"), folder)
    assert not folder.exists() or not list(folder.iterdir())
    (tmp_path / "data.npz").write_bytes(b"mine")
    with pytest.raises(ddaebm.InputError):
        ddaebm.fit(rows(), small("table"), tmp_path)
    assert (tmp_path / "data.npz").read_bytes() == b"mine"


def test_an_interrupted_fit_continues(tmp_path: Path, monkeypatch):
    from ddaebm_jax.training import loop
    from ddaebm_jax.training.preemption import Stopped

    def stop(*_: object) -> None:
        raise Stopped(signal.SIGINT, 3, 20)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stop)
        with pytest.raises(KeyboardInterrupt, match=r"step 3 of 20.*workdir="):
            ddaebm.fit(rows(), small("table"), tmp_path / "run")


def test_a_loop_of_ones_own_with_a_reference_density():
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    config = small("table")
    with pytest.raises(ddaebm.InputError, match="data="):
        ddaebm.build(config, (3,))
    game = ddaebm.build(config, (3,), x)
    state = game.init(jax.random.key(0))
    step = jax.jit(game.step)
    first, metrics = step(state, x[:16], jax.random.key(1))
    again, _ = step(state, x[:16], jax.random.key(1))
    assert int(first.step) == 1 and np.isfinite(metrics["energy/loss"])
    for one, other in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loop_of_ones_own_takes_the_steps_of_training(tmp_path: Path):
    """With the draws of `train`, which are functions of the run's keys."""
    from ddaebm_jax import experiment as experiment_lib
    from ddaebm_jax.game import example_keys

    config = small("gaussians25", **{"data.batch_size": 16, "train.num_steps": 3})
    train(config, tmp_path / "run")
    trained = ddaebm.load(tmp_path / "run")
    source = trained.run.experiment.source
    keys = experiment_lib.run_keys(config.seed)
    game = ddaebm.build(config, (2,))
    state, step = game.init(keys.weights), jax.jit(game.step)
    for _ in range(3):
        row_keys = example_keys(keys.data, state.step, jnp.arange(16))
        state, _ = step(state, source.draw((), None, row_keys), keys.noise)
    for one, other in zip(
        *map(jax.tree.leaves, (state.ema, trained.run.variables)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_on_images_of_ones_own():
    config = small("digits", **{"model.reference": 0, "diffusion.num_steps": 1})
    game = ddaebm.build(config, event_shape=(8, 8, 1))
    batch = jax.random.uniform(jax.random.key(4), (4, 8, 8, 1), minval=-1.0)
    before = game.init(jax.random.key(0))
    state, metrics = jax.jit(game.step)(before, batch, jax.random.key(1))
    assert int(state.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    moved = jax.tree.map(
        lambda old, new: bool((old != new).any()), before.variables, state.variables
    )
    for player in moved:
        assert any(jax.tree.leaves(player))


@pytest.mark.parametrize(("name", "is_smooth"), [("table", True), ("plane", False)])
def test_which_networks_have_second_derivatives(name: str, is_smooth: bool):
    own = {"model.reference": 0, "model.confinement": 0.0, "diffusion.time_eps": 0.01}
    game = ddaebm.build(small(name, **own), (2,))
    weights = game.init(jax.random.key(0)).ema.energy

    def f(x):
        return game.networks.energy(weights, x[None], jnp.zeros(1, jnp.int32))[0]

    hessian = jax.hessian(f)(jnp.array([0.3, -0.8]))
    assert bool(hessian.any()) is is_smooth


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda t, i: ddaebm.load("/nonexistent"), ("/nonexistent", "run directory")),
        (lambda t, i: ddaebm.load(t.workdir, "7"), ("--checkpoint=7", "latest")),
        (lambda t, i: ddaebm.recipe("tabel"), ("tabel", "gaussians25")),
        (lambda t, i: small("table", **{"train.steps": 1}), ("train.steps",)),
        (lambda t, i: small("table", **{"train.num_steps": "x"}), ("num_steps",)),
        (lambda t, i: t.energy(rows(5, 2)), ("(5, 2)", "(3,)")),
        (lambda t, i: t.energy(rows()[None]), ("(1, 200, 3)", "(3,)")),
        (lambda t, i: t.energy(rows().astype(int)), ("int64", "astype")),
        (lambda t, i: t.energy(rows() * 1j), ("complex128", "floats")),
        (lambda t, i: t.energy([["a", "b", "c"]]), ("<U1", "floats")),
        (lambda t, i: t.energy(rows() * np.nan), ("x: example 0", "not finite")),
        (lambda t, i: i.energy(np.full((2, 8, 8, 1), np.inf)), ("x: example 0",)),
        (lambda t, i: ddaebm.fit(rows(), "table", "taken/run"), ("taken/run",)),
        (lambda t, i: i.energy(np.full((8, 8, 1), 255.0)), ("255", "127.5")),
        (lambda t, i: i.energy(np.zeros((8, 8, 1), int)), ("int64", "uint8")),
        (lambda t, i: jax.jit(t.energy)(jnp.zeros((2, 4))), ("(2, 4)",)),
        (lambda t, i: t.log_density(rows()), ("vmap",)),
        (lambda t, i: t.sample(2, sampler="mcmc"), ("mcmc", "energy")),
        (lambda t, i: ddaebm.fit(rows().astype(int), "table"), ("int64", "astype")),
        (lambda t, i: ddaebm.fit(np.zeros((3, 8, 4, 1)), "digits"), ("square",)),
        (lambda t, i: ddaebm.fit(rows(), "digits"), ("model.name",)),
        (lambda t, i: ddaebm.fit(rows() * np.inf, "table"), ("row 0", "finite")),
        (lambda t, i: t.sample(0), ("num is 0",)),
        (lambda t, i: t.log_density(rows(1)[0].astype(int)), ("int",)),
        (lambda t, i: ddaebm.build("gaussians25", (8, 8, 1)), ("event_shape",)),
        (
            lambda t, i: ddaebm.build(
                ddaebm.recipe("gaussians25", **{"optimizer.learning_rate": -1.0}), (2,)
            ),
            ("optimizer.learning_rate",),
        ),
    ],
)
def test_bad_input(
    call, parts, table: ddaebm.Model, images: ddaebm.Model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(ddaebm.InputError) as raised:
        call(table, images)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.rglob("*.npz"))


def test_importing_the_package_loads_nothing():
    code = "import sys, ddaebm_jax; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
