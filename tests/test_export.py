"""Exported runs: the same numbers as the runs', without this package."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from cli import ROOT, TINY_UNET, assert_error, environment, files, python, run, succeed
from helpers import filled_like
from jax import export as jax_export
from runs import load_recipe, small

from ddaebm_jax import colour
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.evaluation import inference
from ddaebm_jax.training import run_directory
from ddaebm_jax.training.checkpoints import Checkpoints
from ddaebm_jax.training.trained_run import load_run

SIZES, SEED = (1, 7, 64), 3

# Between them: batch norm, a whitened table, references, attention, coloured noise.
FIELDS = {
    "plane": {"model.mlp.norm": "batch"},
    "table": {"data.name": "table", "data.whiten": True, "model.reference": 2},
    "digits": TINY_UNET
    | {
        "model.reference": 2,
        "data.whiten": True,
        "model.unet.attn_resolutions": (8,),
        "diffusion.num_steps": 2,
    },
}


def _make_run(name: str, workdir: Path) -> None:
    """Make a run at step 0, with weights as large as trained ones."""
    config = small()
    if name == "digits":
        config = load_recipe(ROOT / "configs" / "digits.py")
    config.update_from_flattened_dict(FIELDS[name])
    if name == "table":
        config.data.path = str(workdir.parent / "rows.csv")
    experiment = experiment_lib.build(config)
    filled = filled_like(experiment_lib.state_shapes(experiment).variables)
    networks = experiment.networks._replace(init=lambda key: filled)
    state = experiment_lib.init_state(experiment._replace(networks=networks))
    workdir.mkdir()
    run_directory.write_config(workdir, config)
    run_directory.write_report(workdir, {"step": 0, "figures": {"modes": 25}})
    experiment.source.save(workdir)
    checkpoints = Checkpoints(workdir)
    data = experiment.source.metadata()
    checkpoints.save_whole(state, {"config": {}, "data": data, "input": None})
    checkpoints.close()


def save_originals(workdir: str, path: str) -> None:
    """Save what the run itself computes, and from what."""
    experiment, variables = load_run(workdir)[1:3]
    table, found = experiment.source.table, {}
    generate = jax.jit(experiment.networks.generator)
    for n in SIZES:
        x = inference.draw_samples(experiment, variables, n, SEED)
        own = x if table is None else table.standardizer.inverse(x).astype(np.float32)
        if experiment.source.colour is not None:
            own = np.asarray(colour.coloured(experiment.source.colour, x))
        inside = x if table is None else table.standardizer.transform(own)
        rng = np.random.default_rng(n)
        t = rng.integers(0, experiment.schedule.num_steps, n).astype(np.int32)
        z = rng.normal(size=(n, experiment.networks.nz)).astype(np.float32)
        found |= {
            f"sample/{n}": own,
            f"energy/{n}": inference.energies(experiment, variables, inside),
            f"x/{n}": x,
            f"t/{n}": t,
            f"z/{n}": z,
            f"predict/{n}": generate(variables.generator, x, t, z),
        }
        if experiment.source.distribution is not None and n == 7:
            found[f"score/{n}"] = inference.gradients(experiment, variables, x)
    np.savez(path, **found)


# A process of its own, compiled with the same options as the exported functions.
_ORIGINALS = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_export
for name in sys.argv[3:]:
    path = pathlib.Path(sys.argv[2], name)
    test_export.save_originals(f"{path}-run", f"{path}.npz")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs, and of each, its numbers, a ZIP, and its content."""
    root = tmp_path_factory.mktemp("export")
    rows = np.random.default_rng(0).normal((100, -200, 3000), (1, 20, 30), (90, 3))
    np.savetxt(root / "rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    for name in FIELDS:
        workdir = root / f"{name}-run"
        _make_run(name, workdir)
        before, output = files(workdir), root / f"{name}.zip"
        made = succeed("--mode=export", f"--workdir={workdir}", f"--output={output}")
        assert made.out.strip() == str(output) and files(workdir) == before
        with zipfile.ZipFile(output) as archive:
            archive.extractall(root / name)
    done = python("-c", _ORIGINALS, str(ROOT / "tests"), str(root), *FIELDS)
    assert done.code == 0, done.err
    return root


def isolated(*argv: str) -> str:
    """Run Python without this project's folder, and return what it prints."""
    command = [sys.executable, "-I", *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_COMPARE = """
import pathlib, runpy, sys
for name in ("ddaebm_jax", "flax", "jaxtyping", "optax", "orbax", "safetensors"):
    sys.modules[name] = None
import jax, numpy as np
for name in sys.argv[2:]:
    folder = pathlib.Path(sys.argv[1], name)
    variables, *functions = runpy.run_path(folder / "run.py")["load"](folder)
    sample, energy, predict = functions
    given = dict(np.load(f"{folder}.npz"))
    def compare(found, key, atol=1e-6):
        message = f"{name} {key}"
        np.testing.assert_allclose(found, given[key], 1e-6, atol, err_msg=message)
    for n in SIZES:
        rows, own = np.arange(n, dtype=np.int32), given[f"sample/{n}"]
        compare(sample(variables, np.uint32(SEED), rows), f"sample/{n}")
        compare(energy(variables, own), f"energy/{n}")
        inputs = (given[f"{key}/{n}"] for key in "xtz")
        compare(predict(variables, *inputs), f"predict/{n}")
    given["sample of a row"] = given["sample/64"][5:6]
    row = np.array([5], np.int32)
    compare(sample(variables, np.uint32(SEED), row), "sample of a row")
    if "score/7" in given:
        total = lambda x: energy(variables, x).sum()
        atol = 1e-6 * np.abs(given["score/7"]).max()
        compare(jax.grad(total)(given["sample/7"]), "score/7", atol)
"""


def test_exported_functions_equal_the_runs_without_this_package(root: Path):
    script = _COMPARE.replace("SIZES", str(SIZES)).replace("SEED", str(SEED))
    isolated("-c", script, str(root), *FIELDS)


def test_run_py_reads_its_folder_or_a_zip(root: Path):
    script = str(root / "table" / "run.py")
    beside, zipped = isolated(script), isolated(script, str(root / "table.zip"))
    assert beside == zipped and beside.count("energy ") == 8


@pytest.mark.parametrize("name", FIELDS)
def test_the_card_tells_what_the_files_are(name: str, root: Path):
    card = (root / name / "model_card.md").read_text()
    figures, config = (json.loads(part[5:]) for part in card.split("```")[1:4:2])
    assert figures == {"report.json": {"modes": 25}}
    assert config["data"]["name"] in card.splitlines()[0]
    assert "after 0\ntraining steps" in card and jax.__version__ in card
    assert "Apache-2.0" in card and str(root) not in card
    assert ('["a", "b", "c"]' in card) == (name == "table")
    for part in ("sample", "energy", "predict"):
        raw = (root / name / f"{part}.bin").read_bytes()
        program = jax_export.deserialize(bytearray(raw))
        assert program.platforms == ("cpu", "cuda", "tpu")


def test_nothing_is_overwritten(root: Path, tmp_path: Path):
    flags = "--mode=export", f"--workdir={root / 'plane-run'}"
    (tmp_path / "mine.zip").write_text("mine")
    for output, problem in (
        (tmp_path / "mine.zip", "exists already"),
        (tmp_path / "model.npz", "ends in '.npz'; allowed: .zip"),
        (tmp_path / "no" / "model.zip", "no is not a directory"),
    ):
        assert_error(run(*flags, f"--output={output}"), problem)
    assert (tmp_path / "mine.zip").read_text() == "mine"
    made = [Path(succeed(*flags).out.strip()).name for _ in range(2)]
    assert made == ["model.zip", "model-1.zip"]
