"""The authors' checkpoints: every array at its place, and runs made of them."""

import csv
import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import quick
from cli import ROOT, environment
from helpers import assert_trees_equal
from released import recipe, state_dict

from ddaebm_jax import interop, models
from ddaebm_jax.commands import modes
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.models import Players
from ddaebm_jax.training import loop as train
from ddaebm_jax.training import measuring

# Every image recipe in small: the layers are the recipe's own, but for their widths.
NARROW = {
    "model.nz": 5,
    "model.unet.nf": 4,
    "model.unet.z_emb_dim": 3,
    "model.unet.n_mlp": 2,
    "model.encoder.ngf": 2,
    "model.encoder.t_emb_dim": 4,
}

# One level at 8 × 8 and two denoising steps: quick to compile.
SMALL_RUN = {
    **NARROW,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.attn_resolutions": (8,),
    "diffusion.num_steps": 2,
    "evaluation.batch_size": 4,
    "train.num_steps": 2,
    "train.tensorboard": False,
}


def changed(name: str, fields: dict[str, Any]) -> ml_collections.ConfigDict:
    config = recipe(name)
    config.update_from_flattened_dict(fields)
    return config


class Weights:
    """Random weights of a recipe, as Flax holds them and as PyTorch does.

    Attributes:
      config: the recipe.
      networks: that it describes.
      names: of each network.
      shapes: of each network's variables.
      params: of each network.
      state_dicts: the same numbers with the authors' names and layout.
    """

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.config = config
        side = config.data.image_size
        event_shape = (side, side, config.data.channels)
        self.networks = models.build(config.model, event_shape)
        self.shapes = jax.eval_shape(self.networks.init, jax.random.key(0))
        self.names = interop.names_of(config.model, side, self.shapes)
        rng = np.random.default_rng(0)
        self.params = Players(
            *(
                jax.tree.map(
                    lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype("f"),
                    one["params"],
                )
                for one in self.shapes
            )
        )
        self.state_dicts = Players(*map(state_dict, self.names, self.params))

    def save(self, folder: Path, prefix: str = "") -> Players:
        """Writes three NPZ files; returns their paths."""
        folder.mkdir(exist_ok=True)
        paths = Players(*(folder / f"{name}.npz" for name in Players._fields))
        for path, arrays in zip(paths, self.state_dicts, strict=True):
            named = {prefix + name: value for name, value in arrays.items()}
            np.savez(path, **named)
        return paths

    def convert(self, player: str, arrays: dict[str, np.ndarray]) -> dict:
        """Converts one network's state_dict."""
        wanted = getattr(self.shapes, player)["params"]
        return interop.convert(arrays, getattr(self.names, player), wanted, "x.pth")


@functools.cache
def weights_of(name: str) -> Weights:
    # Blocks are told apart by number, so the one of two a level says it all.
    blocks = {} if name == "cifar10" else {"model.unet.num_res_blocks": 1}
    return Weights(changed(name, {**NARROW, **blocks}))


RECIPES = ("cifar10", "celeba64", "lsun_church128")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trip(name: str, prefix: str, tmp_path: Path, monkeypatch):
    weights = weights_of(name)
    # Networks that have been traced already.
    monkeypatch.setattr(models, "build", lambda *args: weights.networks)
    files = weights.save(tmp_path, prefix)
    variables = interop.import_variables(weights.config, files)
    expected = Players(*({"params": one} for one in weights.params))
    assert_trees_equal(variables, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_follow_the_order_of_the_calls(name: str):
    """PyTorch's list of modules is in the order in which the U-Net calls them."""
    weights = weights_of(name)
    side = weights.config.data.image_size
    called = []

    def record(call, args, kwargs, context):
        path = context.module.path
        if len(path) == 2 and path[0] == "trunk" and path[1] not in called:
            called.append(path[1])
        return call(*args, **kwargs)

    x, t = jnp.zeros((1, side, side, 3)), jnp.zeros((1,), jnp.int32)
    with nn.intercept_methods(record):
        jax.eval_shape(weights.networks.energy, weights.shapes.energy, x, t)
    numbers: dict[str, int] = {}
    for torch_name, target in weights.names.energy.items():
        number = int(torch_name.split(".")[1])
        assert numbers.setdefault(target.path[1], number) == number
    assert sorted(numbers, key=numbers.get) == called
    assert sorted(numbers.values()) == list(range(len(called)))


# A run from imported weights, through the command line.


@pytest.fixture(scope="module")
def small() -> Weights:
    return Weights(changed("digits", SMALL_RUN))


def run_import(files: Players, workdir: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "ddaebm_jax.interop",
            f"--config={ROOT / 'configs' / 'digits.py'}",
            *(f"--config.{field}={value}" for field, value in SMALL_RUN.items()),
            *(f"--{name}={path}" for name, path in files._asdict().items()),
            f"--workdir={workdir}",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def imported(small: Weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    result = run_import(small.save(folder / "files", "module."), folder / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(folder / "run")]
    return folder / "run"


@pytest.fixture
def undrawn(small: Weights, monkeypatch) -> None:
    """Starts networks at zero: no need to draw weights that imported ones replace."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), small.shapes)
    networks = small.networks._replace(init=lambda key: zeros)
    monkeypatch.setattr(models, "build", lambda *args: networks)


@pytest.mark.usefixtures("undrawn")
def test_a_run_holds_the_imported_weights(imported: Path, small: Weights):
    run = modes.load_run(imported)
    assert run.step == 0
    assert run.experiment.config.to_dict() == small.config.to_dict()
    assert_trees_equal(run.variables, Players(*({"params": p} for p in small.params)))


@pytest.mark.usefixtures("undrawn")
def test_sampling_from_imported_weights(imported: Path, tmp_path: Path):
    path = modes.sample(imported, 3, seed=0, output=str(tmp_path / "x.npz"))
    with np.load(path) as saved:
        assert saved["x"].shape == (3, 8, 8, 1) and saved["x"].dtype == np.uint8
        assert len(np.unique(saved["x"])) > 10


@pytest.mark.usefixtures("undrawn")
def test_scoring_with_imported_weights(imported: Path, small: Weights, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels)
    written = modes.score(
        imported, str(tmp_path / "images.npz"), str(tmp_path / "scores.csv")
    )
    with written.open() as file:
        scores = [float(row["energy"]) for row in csv.DictReader(file)]
    energy = quick.jit(small.networks.energy)
    x, t = images.to_float(pixels), jnp.zeros((4,), jnp.int32)
    expected = energy({"params": small.params.energy}, x, t)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_training_goes_on_from_imported_weights(
    imported: Path, small: Weights, monkeypatch
):
    """Up to the first step, which test_train takes."""
    started = []

    def loop(run, state, *others):
        started.append(state)
        return state

    monkeypatch.setattr(train, "_loop", loop)
    monkeypatch.setattr(measuring, "_draw", lambda *args: None)
    monkeypatch.setattr(figures, "evaluate", lambda *args: {})
    report = train.train(small.config, imported)
    assert report["resumed_from_step"] == 0
    (state,) = started
    expected = Players(*({"params": params} for params in small.params))
    assert_trees_equal(state.variables, expected)
    assert_trees_equal(state.ema, expected)
    for moment in jax.tree.leaves((state.opt_energy, state.opt_generator)):
        assert not np.asarray(moment).any()


def test_the_command_line_reports_one_line(small: Weights, tmp_path: Path):
    files = small.save(tmp_path / "files")
    missing = tmp_path / "none.pth"
    result = run_import(files._replace(energy=missing), tmp_path / "run")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {missing}: no such file; check the path\n"
    assert not (tmp_path / "run").exists()


# What cannot be imported. Every message is one line that names what is at fault.


def assert_refused(action, *parts: str):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def without(arrays: dict, name: str) -> dict:
    return {key: value for key, value in arrays.items() if key != name}


NAME = "all_modules.2.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: without(w, NAME), ("missing: all_modules.2.weight;", "flag")),
        (lambda w: {**w, "extra": w[NAME]}, ("unknown: extra;",)),
        (
            lambda w: {**w, NAME: np.zeros((16, 1, 3, 3), np.float32)},
            (NAME, "16×1×3×3", "trunk/conv_in/kernel (3×3×1×8)"),
        ),
        (lambda w: {**w, NAME: np.zeros(72, np.float32)}, (NAME, "shape 72")),
        (lambda w: {**w, NAME: w[NAME] * np.nan}, (NAME, "NaN")),
        (lambda w: {**w, NAME: np.full((8, 1, 3, 3), 1e300)}, (NAME, "float32")),
        (lambda w: {**w, NAME: np.zeros((8, 1, 3, 3), int)}, (NAME, "int64")),
        (lambda w: {**w, NAME: np.zeros((8, 1, 3, 3), "U1")}, (NAME, "<U1")),
        (lambda w: {}, ("missing: all_modules.0.weight", "more")),
    ],
)
def test_wrong_weights(small: Weights, change, parts: tuple[str, ...]):
    assert_refused(
        lambda: small.convert("energy", change(small.state_dicts.energy)),
        "x.pth",
        *parts,
    )


def test_half_precision_is_read(small: Weights):
    halves = {k: v.astype(np.float16) for k, v in small.state_dicts.energy.items()}
    for leaf in jax.tree.leaves(small.convert("energy", halves)):
        assert leaf.dtype == np.float32


def an_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def objects(path: Path) -> None:
    np.savez(path, a=np.array([{}], object))


def damaged(path: Path) -> None:
    np.savez_compressed(path, a=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not an archive"),
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        an_array,
        objects,
        damaged,
    ],
)
def test_files_that_are_no_npz(write, tmp_path: Path):
    path = tmp_path / "weights.npz"
    write(path)
    assert_refused(lambda: interop.read_state_dict(path), str(path), "numpy.savez")


def test_files_of_another_kind(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    assert_refused(lambda: interop.read_state_dict(path), "'.safetensors'", ".pth")
    path = tmp_path / "weights.npz"
    assert_refused(lambda: interop.read_state_dict(path), str(path), "no such file")
    path.mkdir()
    assert_refused(lambda: interop.read_state_dict(path), str(path), "no such file")


def test_files_at_each_other_s_flags(small: Weights, tmp_path: Path):
    files, workdir = small.save(tmp_path / "files"), tmp_path / "run"
    swapped = files._replace(energy=files.generator, generator=files.energy)
    assert_refused(
        lambda: interop.import_run(small.config, swapped, workdir),
        str(files.generator),
        "unknown: ",
        "GroupNorm_0.style.weight",
        "each file to its own flag",
    )
    assert not workdir.exists()


def test_directories_in_use(small: Weights, tmp_path: Path):
    files = small.save(tmp_path / "files")
    (tmp_path / "used").mkdir()
    note = tmp_path / "used" / "note.txt"
    note.write_text("mine")
    for workdir in (note.parent, note):
        assert_refused(
            lambda workdir=workdir: interop.import_run(small.config, files, workdir),
            f"--workdir={workdir} exists already",
        )
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]
    assert note.read_text() == "mine"


def test_recipes_without_images(small: Weights, tmp_path: Path):
    files = small.save(tmp_path / "files")
    assert_refused(
        lambda: interop.import_run(recipe("gaussians25"), files, tmp_path / "run"),
        "model.name is 'mlp'",
        "configs/cifar10.py",
    )
    assert not (tmp_path / "run").exists()


# PyTorch's own files, where torch is installed.


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_pytorch_files(torch, small: Weights, tmp_path: Path):
    expected = small.state_dicts.energy
    for number, make in enumerate(
        (
            torch.from_numpy,
            lambda array: torch.nn.Parameter(torch.from_numpy(array)),
            lambda array: torch.from_numpy(array).double(),
        )
    ):
        path = tmp_path / f"{number}.pth"
        tensors = {
            f"module.{name}": make(np.ascontiguousarray(value))
            for name, value in expected.items()
        }
        torch.save(tensors, path)
        found = interop.read_state_dict(path)
        single = {name: np.float32(value) for name, value in found.items()}
        assert_trees_equal(single, dict(expected))
    coarse = {
        name: torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
        for name, value in expected.items()
    }
    torch.save(coarse, tmp_path / "coarse.pt")
    for name, value in interop.read_state_dict(tmp_path / "coarse.pt").items():
        np.testing.assert_allclose(value, expected[name], rtol=0.01)


class Code:
    """What a hostile file would run."""

    def __reduce__(self):
        return print, ("this file's code ran",)


def test_pytorch_files_that_are_refused(torch, tmp_path: Path, capsys):
    path = tmp_path / "weights.pth"
    integers = {"a": torch.zeros(2, dtype=torch.int32)}
    torch.save(integers, path)
    assert interop.read_state_dict(path)["a"].dtype == np.int32
    for content, part in (
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"a": torch.zeros(2)}}, "'model' is a dict, not a tensor"),
        (torch.zeros(2), "holds a Tensor; a state_dict"),
        (torch.nn.Linear(2, 2), "only plain weights are loaded, never code"),
        ({"a": Code()}, "only plain weights are loaded, never code"),
    ):
        torch.save(content, path)
        assert_refused(lambda: interop.read_state_dict(path), str(path), part)
    for content, part in (
        (b"", "cannot be read"),
        (b"not a file of PyTorch's", "cannot be read"),
        (pickle.dumps(Code()), "never code"),
    ):
        path.write_bytes(content)
        assert_refused(lambda: interop.read_state_dict(path), str(path), part)
    assert "code ran" not in capsys.readouterr().out
