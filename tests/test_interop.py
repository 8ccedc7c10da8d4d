"""The authors' checkpoints: the place of every array, and imported runs."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from cli import ROOT, environment, succeed
from helpers import assert_trees_equal
from released import posterior_shapes, recipe, unet_shapes
from test_weights import write_npz, write_safetensors, write_zip
from untrusted import refused

from ddaebm_jax import diffusion, experiment, interop, models
from ddaebm_jax.models import Players
from ddaebm_jax.training.checkpoints import Checkpoints
from ddaebm_jax.training.trained_run import load_run

RECIPES = ("cifar10", "celeba64", "lsun_church128")
# DDGAN's generators have the modules of the authors' netG, whose numbers
# tests/test_reference.py compares.
DDGAN = ("cifar10", "celebahq256")

# The layers of an image recipe, narrower.
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
    "model.reference": 0,
    "diffusion.num_steps": 2,
    "evaluation.batch_size": 4,
    "train.num_steps": 2,
    "train.tensorboard": False,
}


def released_shapes(name: str, config: ml_collections.ConfigDict) -> Players:
    """Return the names and shapes in the three released files."""
    model, channels = config.model, config.data.channels
    return Players(
        energy=unet_shapes(name, model, channels, is_generator=False),
        generator=unet_shapes(name, model, channels, is_generator=True),
        posterior=posterior_shapes(name, model, channels),
    )


class Released:
    """A recipe with random weights under the authors' names, and our networks."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.config = recipe(name)
        self.config.update_from_flattened_dict(fields)
        rng = np.random.default_rng(0)
        self.state_dicts = Players(
            *(
                {key: rng.normal(size=shape).astype("f") for key, shape in one.items()}
                for one in released_shapes(name, self.config)
            )
        )
        self.side = self.config.data.image_size
        event_shape = (self.side, self.side, self.config.data.channels)
        self.networks = models.build(self.config.model, event_shape)
        shapes = jax.eval_shape(self.networks.init, jax.random.key(0))
        self.shapes = Players(*(one["params"] for one in shapes))
        self.paths = interop.parameter_paths(self.config.model, self.side, self.shapes)

    def to_params(self, player: str, state_dict: dict[str, np.ndarray]) -> dict:
        paths, shapes = getattr(self.paths, player), getattr(self.shapes, player)
        return interop.to_params(state_dict, paths, shapes, "x.pth")

    @functools.cached_property
    def variables(self) -> Players:
        return Players(
            *(
                {"params": self.to_params(player, arrays)}
                for player, arrays in self.state_dicts._asdict().items()
            )
        )

    def save(self, folder: Path, prefix: str = "") -> Players:
        """Write a file for each network, each in another format."""
        folder.mkdir(exist_ok=True)
        energy, generator, posterior = (
            {prefix + key: array for key, array in arrays.items()}
            for arrays in self.state_dicts
        )
        return Players(
            energy=write_zip(folder / "netD.pth", energy),
            generator=write_npz(folder / "netG.npz", generator),
            posterior=write_safetensors(folder / "netE.safetensors", posterior),
        )


@functools.cache
def narrow(name: str) -> Released:
    return Released(name, NARROW)


# Names.


@pytest.mark.parametrize("player", Players._fields)
def test_typed_names_are_those_of_the_released_cifar10_files(player, test_data: Path):
    shapes = getattr(released_shapes("cifar10", recipe("cifar10")), player)
    typed = {f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()}
    released = (test_data / f"cifar10_{player}_names.txt").read_text().split("\n")
    assert typed == {line for line in released if line}


@pytest.mark.parametrize("name", sorted({*RECIPES, *DDGAN}))
def test_every_released_array_has_its_place(name: str):
    """All arrays arrive, transposed at most, and set every parameter of ours."""

    def kinds(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    def contents(arrays: Any) -> list:
        # Transposing keeps an array's sorted numbers.
        return sorted(tuple(np.sort(array.ravel())) for array in arrays)

    released = narrow(name)
    assert kinds([one["params"] for one in released.variables]) == kinds(
        list(released.shapes)
    )
    for ours, theirs in zip(released.variables, released.state_dicts, strict=True):
        assert contents(jax.tree.leaves(ours)) == contents(theirs.values())


PLACES = {
    "cifar10": {
        "energy all_modules.0.weight": "trunk time_0 kernel",
        "energy all_modules.6.Conv2d_0.bias": "trunk down_0_pyramid bias",
        "energy all_modules.8.NIN_0.W": "trunk down_1_attention_0 query kernel",
        "energy all_modules.8.NIN_1.W": "trunk down_1_attention_0 key kernel",
        "energy all_modules.8.NIN_2.b": "trunk down_1_attention_0 value bias",
        "energy all_modules.8.NIN_3.W": "trunk down_1_attention_0 out kernel",
        "energy all_modules.3.GroupNorm_0.weight": "trunk down_0_block_0 norm_0 scale",
        "generator all_modules.3.GroupNorm_1.style.weight": (
            "trunk down_0_block_0 norm_1 style kernel"
        ),
        "generator all_modules.5.Conv_2.weight": "trunk down_0_resample skip kernel",
        "generator all_modules.5.Dense_0.weight": "trunk down_0_resample time kernel",
        "generator z_transform.1.weight": "latent_0 kernel",
        "generator z_transform.5.bias": "latent_2 bias",
        "posterior t_embed.main.2.weight": "time dense_1 kernel",
        "posterior conv51.weight": "mu kernel",
        "posterior conv52.bias": "logvar bias",
    },
    "celeba64": {
        "energy all_modules.24.NIN_0.W": "trunk middle_attention query kernel",
        "energy all_modules.37.GroupNorm_0.bias": "trunk up_2_attention norm bias",
        "energy all_modules.46.weight": "trunk norm_out scale",
        "energy all_modules.47.weight": "trunk conv_out kernel",
        "posterior conv5.weight": "conv_4 kernel",
        "posterior dense_t5.bias": "time_4 bias",
        "posterior conv61.weight": "mu kernel",
        "posterior conv62.weight": "logvar kernel",
    },
    "lsun_church128": {
        "generator all_modules.13.NIN_3.b": "trunk down_3_attention_0 out bias",
        "generator all_modules.30.Conv_0.weight": "trunk up_3_resample conv_0 kernel",
        "generator all_modules.43.bias": "trunk conv_out bias",
        "posterior start_conv.conv.weight": "conv_in kernel",
        "posterior start_conv.conv.bias": "conv_in bias",
        "posterior conv1.conv1.0.conv.weight": "block_0 conv_0 kernel",
        "posterior conv6.conv2.0.conv.bias": "block_5 conv_1 bias",
        "posterior conv4.dense_t1.weight": "block_3 time kernel",
        "posterior conv5.skip.0.conv.weight": "block_4 skip kernel",
        "posterior final_conv.conv.weight": "conv_out kernel",
        "posterior end_linear_mean.weight": "mu kernel",
        "posterior end_linear_logvar.weight": "logvar kernel",
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_places_of_released_arrays(name: str):
    released = narrow(name)
    for source, path in PLACES[name].items():
        player, key = source.split()
        expected = getattr(released.state_dicts, player)[key]
        if expected.ndim == 4:
            expected = expected.transpose(2, 3, 1, 0)
        elif key.endswith(".weight"):
            expected = expected.T
        found = getattr(released.variables, player)["params"]
        for part in path.split():
            found = found[part]
        np.testing.assert_array_equal(found, expected, err_msg=source)


@pytest.mark.parametrize("name", DDGAN)
def test_ddgan_denoises_by_the_same_posterior(name: str):
    """Its levels are ours, but for β_0 = 1e-8, which its posterior leaves out."""
    schedule = diffusion.make_schedule(**recipe(name).diffusion)
    tau = np.linspace(1e-3, 1, schedule.num_steps + 1)
    p = np.exp(-0.5 * tau**2 * (20 - 0.1) - 0.1 * tau)
    p, before = p[1:] / p[0], p[:-1] / p[0]
    alpha = p / before
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
    close(schedule.posterior_c1, (1 - alpha) * np.sqrt(before) / (1 - p))
    close(schedule.posterior_c2, (1 - before) * np.sqrt(alpha) / (1 - p))
    std = np.sqrt((1 - alpha) * (1 - before) / (1 - p))
    close(jnp.exp(0.5 * schedule.posterior_log_var[1:]), std[1:])  # None at t = 0.


# A run from imported weights, through the command line.


@pytest.fixture(scope="module")
def small() -> Released:
    return Released("digits", SMALL_RUN)


@pytest.fixture(scope="module")
def files(small: Released, tmp_path_factory) -> Players:
    return small.save(tmp_path_factory.mktemp("files"), prefix="module.")


def run_import(files: Players, workdir: Path) -> subprocess.CompletedProcess:
    flags = [f"--config={ROOT / 'configs' / 'digits.py'}", f"--workdir={workdir}"]
    flags += [f"--config.{field}={value}" for field, value in SMALL_RUN.items()]
    flags += [f"--{name}={path}" for name, path in files._asdict().items() if path]
    command = [sys.executable, "-m", "ddaebm_jax.interop", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_a_run_holds_the_imported_weights(
    files: Players, small: Released, tmp_path: Path, monkeypatch
):
    imported = tmp_path / "run"
    result = run_import(files, imported)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(imported)]
    assert "untrained" not in result.stderr
    # Zeros in place of the weights that imported ones replace.
    zeros = jax.tree.map(jnp.zeros_like, small.variables)
    networks = small.networks._replace(init=lambda key: zeros)
    monkeypatch.setattr(models, "build", lambda *args: networks)
    run = load_run(imported)
    assert run.step == 0
    assert run.experiment.config.to_dict() == small.config.to_dict()
    assert_trees_equal(run.variables, small.variables)
    # Training continues from the same weights.
    like = experiment.evaluation_state(run.experiment)
    state = Checkpoints(imported, read_only=True).restore(like).state
    assert_trees_equal(state.variables, small.variables)
    assert_trees_equal(state.ema, small.variables)
    for moment in jax.tree.leaves((state.opt_energy, state.opt_generator)):
        assert not np.asarray(moment).any()


def test_a_generator_alone_gives_samples(
    files: Players, small: Released, tmp_path: Path
):
    warning = "untrained: energy, posterior;"
    imported = tmp_path / "run"
    result = run_import(Players(None, files.generator, None), imported)
    assert result.returncode == 0 and warning in result.stderr, result.stderr
    initial = small.networks.init(experiment.run_keys(small.config.seed).weights)
    expected = initial._replace(generator=small.variables.generator)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, load_run(imported).variables, expected)
    sampled = succeed("--mode=sample", f"--workdir={imported}", "--num_samples=4")
    assert warning in sampled.err
    with np.load(imported / "images.npz") as images:
        assert images["x"].shape == (4, 8, 8, 1) and images["x"].dtype == np.uint8


def test_the_command_line_reports_one_line(files: Players, tmp_path: Path):
    missing = tmp_path / "none.pth"
    result = run_import(files._replace(energy=missing), tmp_path / "run")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {missing}: no such file; check the path\n"
    result = run_import(files._replace(generator=None), tmp_path / "run")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch("error: .*--generator.*\n", result.stderr)
    assert not (tmp_path / "run").exists()


# Errors, each of one line that names its cause.


NAME = "all_modules.2.weight"


def zeros(*shape: int, dtype: str = "f") -> Callable[[dict], None]:
    return lambda w: w.update({NAME: np.zeros(shape, dtype)})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop(NAME), (f"missing: {NAME};", "flag")),
        (lambda w: w.update(extra=w[NAME]), ("unknown: extra;",)),
        (
            zeros(16, 1, 3, 3),
            (NAME, "16×1×3×3; 8×1×3×3 is needed for trunk/conv_in/kernel"),
        ),
        (zeros(72), (NAME, "shape 72")),
        (lambda w: w.update({NAME: w[NAME] * np.nan}), (NAME, "NaN")),
        (lambda w: w.update({NAME: w[NAME] + np.float64(1e300)}), (NAME, "float32")),
        (zeros(8, 1, 3, 3, dtype="i8"), (NAME, "int64")),
        (zeros(8, 1, 3, 3, dtype="U1"), (NAME, "<U1")),
        (dict.clear, ("missing: all_modules.0.weight", "more")),
    ],
)
def test_wrong_weights(small: Released, change, parts: tuple[str, ...]):
    weights = dict(small.state_dicts.energy)
    change(weights)
    refused(lambda: small.to_params("energy", weights), "x.pth", *parts)


def test_wrong_files_and_recipes(small: Released, files: Players, tmp_path: Path):
    swapped = files._replace(energy=files.generator, generator=files.energy)
    remedy = "each file to its own flag"
    unknown = (str(files.generator), "unknown: ", "GroupNorm_0.style.weight", remedy)
    perceptrons = ("model.name is 'mlp'", "configs/cifar10.py")
    references = ("model.reference is 32", "--config.model.reference=0")
    patched = small.config.copy_and_resolve_references()
    patched.model.unet.update(patch_size=2, attn_resolutions=(4,))
    for config, given, parts in (
        (patched, files, ("patch_size is 2", "--config.model.unet.patch_size=1")),
        (small.config, swapped, unknown),
        (recipe("gaussians25"), files, perceptrons),
        (recipe("digits"), files, references),
    ):
        workdir = tmp_path / "run"
        refused(functools.partial(interop.import_run, config, given, workdir), *parts)
        assert not workdir.exists()


def test_directories_in_use(small: Released, files: Players, tmp_path: Path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    for workdir in (tmp_path, note):
        refused(
            functools.partial(interop.import_run, small.config, files, workdir),
            f"--workdir={workdir} exists already",
        )
    assert list(tmp_path.iterdir()) == [note] and note.read_text() == "mine"
