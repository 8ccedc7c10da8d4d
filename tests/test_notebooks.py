"""The notebooks run from a clean kernel, with fewer steps."""

import json
from pathlib import Path

import nbformat
import pytest
from cli import ROOT, TINY_UNET, environment
from nbclient import NotebookClient

FEW = {
    "parallel.num_devices": 1,
    "evaluation.num_particles": 400,
    "evaluation.num_samples": 400,
}


def run(name: str, parameters: str, folder: Path) -> list[dict]:
    """Run a notebook with other parameters; return its cells."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source = parameters
    client = NotebookClient(notebook, timeout=900, kernel_name="python3")
    client.execute(cwd=str(folder), env=environment())
    return notebook.cells


def outputs(cells: list[dict], kind: str) -> list[str]:
    return [
        output["data"][kind]
        for cell in cells
        for output in cell.get("outputs", ())
        if kind in output.get("data", {})
    ]


def test_the_tour(tmp_path: Path):
    unet = TINY_UNET | {"data.batch_size": 8}
    cells = run(
        "ddaebm.ipynb",
        f"""
STEPS, TABLE_STEPS, DIGIT_STEPS, WORKDIR = 40, 20, 4, "runs"
FIELDS = {FEW!r}
import ddaebm_jax
from ddaebm_jax.evaluation import particles, restoring
restoring.Search.__new__.__defaults__ = 2, 0.1, 1.0, 2
particles.LEAST_EFFECTIVE = 0  # So little training leaves few.
recipe = ddaebm_jax.recipe
def small(name, **fields):
    own = {unet!r} if name == "digits" else {{"model.mlp.hidden": (8, 8)}}
    return recipe(name, **fields | own)
ddaebm_jax.recipe = small
""",
        tmp_path,
    )
    assert len(outputs(cells, "image/png")) >= 8
    assert any(
        "figures" in text or "step 40" in text for text in outputs(cells, "text/plain")
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_committed_notebooks_are_small_and_hold_no_error(path: Path):
    assert path.stat().st_size < 2 * 2**20
    cells = json.loads(path.read_text())["cells"]
    found = [o["output_type"] for c in cells for o in c.get("outputs", ())]
    assert "error" not in found


def test_cifar10_continues_after_a_restart(tmp_path: Path):
    from test_tfds_images import write

    prepared = write(tmp_path / "tfds", "array_record")
    fields = (
        TINY_UNET
        | FEW
        | {
            "data.tfds_dir": str(prepared),
            "data.batch_size": 4,
            "model.unet.num_res_blocks": 1,
            "diffusion.num_steps": 2,
            "train.checkpoint_every": 2,
            "train.picture_every": 0,
            "train.evaluate_every": 0,
            "evaluation.inception": False,
            "evaluation.num_samples": 16,
            "evaluation.num_samples_on_the_way": 0,
        }
    )
    for steps in (2, 4):
        given = fields | {"train.num_steps": steps, "optimizer.schedule": "constant"}
        parameters = f"""
WORKDIR, DRIVE, FIELDS = 'run', False, {given!r}
from ddaebm_jax.evaluation import pictures
pictures._HISTOGRAM_IMAGES = 16
"""
        cells = run("cifar10.ipynb", parameters, tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["resumed_from_step"] == 2
    assert any("step 4" in text for text in outputs(cells, "text/plain"))
    assert len(outputs(cells, "image/png")) == 2
