"""The loop: a resumed run equals an unbroken one, bit for bit, whatever stops it."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick
from cli import ROOT, tiny
from helpers import assert_trees_close, assert_trees_equal
from PIL import Image
from processes import Started
from runs import changed, final_state, lines, small, steps, train
from test_config import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax.errors import InputError, TrainingError
from ddaebm_jax.training import checkpoints, dispatch, reports, run_directory


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train(small(), workdir, figures=True)
    return workdir


# --- Resumed equals unbroken ------------------------------------------------------


def test_a_resumed_run_is_bit_identical(unbroken: Path, tmp_path: Path):
    for num_steps in (8, 16, 24):
        report = train(small(train__num_steps=num_steps), tmp_path, figures=True)
    assert report["resumed_from_step"] == 16
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    assert lines(tmp_path) == lines(unbroken)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    unbroken: Path, tmp_path: Path
):
    (tmp_path / "config.json.partial").write_text("{")  # Killed while writing it.
    run_directory.check(tmp_path, small())
    (tmp_path / "config.json").write_text(config_lib.to_json(small()))
    (tmp_path / "checkpoints").mkdir()  # Killed right after making it.
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n{"step": 16, "ener')
    train(small(), tmp_path)
    assert_trees_equal(final_state(tmp_path), final_state(unbroken))
    assert steps(tmp_path) == steps(unbroken)


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
    saved = broken / "checkpoints"

    def finish(workdir: Path) -> None:
        with Started(*flags, f"--workdir={workdir}") as process:
            result = process.ended()
        assert result.code == 0, result.err

    def names() -> list[str]:
        return [path.name for path in saved.iterdir()] if saved.is_dir() else []

    def newest() -> int:
        return max((int(name) for name in names() if name.isdigit()), default=0)

    def unfinished() -> bool:
        return any("tmp" in name for name in names())

    finish(whole)
    left_unfinished, wait = 0, random.Random(0)
    for kill in range(3):
        before = newest()
        with Started(*flags, f"--workdir={broken}") as process:
            process.until(lambda before=before: newest() > before, every=0.0005)
            if kill % 2:
                time.sleep(wait.uniform(0.0, 0.05))
            else:
                process.until(unfinished, every=0.0005)
            process.send_signal(signal.SIGKILL)
        left_unfinished += unfinished()
    assert left_unfinished >= 1, "no kill came while a checkpoint was being written"
    assert 0 < newest() < 600
    finish(broken)
    assert_trees_equal(final_state(broken), final_state(whole))
    assert not unfinished()
    assert steps(broken) == steps(whole)


DIGITS = {
    "data.batch_size": 8,
    "data.test_fraction": 0.35,
    "data.crop": (1, 2, 9, 10),
    "data.num_threads": 2,
    "model.nz": 4,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.num_res_blocks": 1,
    "model.unet.attn_resolutions": (),
    "model.unet.z_emb_dim": 8,
    "model.unet.n_mlp": 0,
    "model.encoder.ngf": 4,
    "model.encoder.t_emb_dim": 8,
    "optimizer.ema_decay": 0.9,
    "train.num_steps": 6,
    "train.report_every": 1,
    "train.picture_every": 0,
    "train.evaluate_every": 0,
    "train.checkpoint_every": 3,
    "train.tensorboard": False,
    "parallel.num_devices": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, 13 of them to train on: batches of 8 cross epochs."""
    path = tmp_path_factory.mktemp("folder")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 10), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{number:02}.png")
    return path


@pytest.fixture
def compiled_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch.jax, "jit", lambda f, **kwargs: quick.jit(f, **kwargs), raising=False
    )


def of_folder(folder: Path, **fields: Any):
    config = load_recipe(ROOT / "configs" / "digits.py")
    own = {"data__name": "folder", "data__path": str(folder)}
    return changed(config, DIGITS | own | fields)


def test_a_run_on_images_resumes_bit_identical(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed a step after a checkpoint within an epoch, with batches read ahead.

    The images lie on the device first, and are then read from the host: the input is
    no part of what the run is.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(of_folder(folder, data__on_device=False), whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(of_folder(folder, data__on_device=True), broken)
    report = train(of_folder(folder, data__on_device=False), broken)
    assert report["resumed_from_step"] == 3
    assert_trees_equal(final_state(broken), final_state(whole))
    assert lines(broken) == lines(whole)

    config, changed_image = of_folder(folder, train__num_steps=9), folder / "03.png"
    before = {p: p.read_bytes() for p in broken.iterdir() if p.is_file()}
    original = changed_image.read_bytes()
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(changed_image)
    with pytest.raises(InputError, match=r"not those that .* was trained on"):
        train(config, broken)
    changed_image.write_bytes(original)
    assert {p: p.read_bytes() for p in broken.iterdir() if p.is_file()} == before
