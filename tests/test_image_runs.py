"""Runs on images from end to end: trained, resumed, sampled, scored, evaluated.

All play with one tiny U-Net, whose programs are compiled once, with little effort.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import quick
import tiny_inception
from cli import ROOT, CommandLine, environment
from helpers import assert_trees_close, assert_trees_equal
from PIL import Image
from test_config import load_recipe

from ddaebm_jax import config as config_lib
from ddaebm_jax import density, minimax, models
from ddaebm_jax import experiment as experiments
from ddaebm_jax.commands import modes
from ddaebm_jax.commands import ood as detection
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures, image_quality, outlier_sets
from ddaebm_jax.training import (
    best_checkpoint,
    dispatching,
    measuring,
    run_directory,
)
from ddaebm_jax.training import (
    checkpoints as checkpointing,
)
from ddaebm_jax.training import (
    loop as train,
)

DIGITS = ROOT / "configs" / "digits.py"

TINY = {
    "data.batch_size": 8,
    "data.test_fraction": 0.9,
    "data.on_device": False,
    "model.nz": 4,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.attn_resolutions": (),
    "model.unet.z_emb_dim": 8,
    "model.unet.n_mlp": 0,
    "model.encoder.ngf": 4,
    "model.encoder.t_emb_dim": 8,
    "optimizer.ema_decay": 0.9,
    "train.num_steps": 6,
    "train.report_every": 1,
    "train.picture_every": 0,
    "train.checkpoint_every": 2,
    "train.tensorboard": False,
    "parallel.num_devices": 1,
    "evaluation.num_samples": 32,
    "evaluation.batch_size": 32,
}

# Of the folder: 20 images are 13 to train on, so that of the 6 batches of 8 the
# second, fourth and fifth lie in two epochs.
NUM_FILES, CROP = 20, (1, 2, 9, 10)


def _config(**fields: Any) -> ml_collections.ConfigDict:
    config = load_recipe(DIGITS)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(TINY | changes)
    return config


def _of_folder(folder: Path, **fields: Any) -> ml_collections.ConfigDict:
    return _config(
        data__name="folder",
        data__path=str(folder),
        data__crop=CROP,
        data__test_fraction=0.35,
        **fields,
    )


def _pixels(num: int, side: int, seed: int = 0) -> np.ndarray:
    """Grey images, every pixel of which is random."""
    shape = (num, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def shared_programs() -> Iterator[None]:
    """Compiles every program soon, and once for all runs that need it."""
    build, dispatcher = models.build, dispatching.Dispatcher
    networks, dispatchers = {}, {}
    soon = functools.partial(jax.jit, compiler_options=quick._options())

    def shared_networks(
        model: Any, event_shape: tuple[int, ...], axis_name: str | None = None
    ):
        key = (model.to_json(), event_shape, axis_name)
        if key not in networks:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "jit", soon)
                networks[key] = build(model, event_shape, axis_name)
        return networks[key]

    def shared_dispatcher(experiment: experiments.Experiment):
        config = experiment.config
        data = config.data.copy_and_resolve_references()
        # What is fed from the host changes no program.
        names = ("path", "num_threads", "prefetch", "held_out_classes")
        for name in names[: None if not data.on_device else 0]:
            del data[name]
        parts = (config.seed, data, config.diffusion, config.model, config.game)
        parts += (config.optimizer, config.parallel, config.train.num_steps)
        key = tuple(map(str, parts))
        if key not in dispatchers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "jit", soon)
                dispatchers[key] = dispatcher(experiment)
        return dispatchers[key]

    load_run = modes.load_run
    loaded = functools.cache(load_run)

    def shared_run(
        workdir: Path, open_images: bool = False, checkpoint: str = "latest"
    ) -> modes.Run:
        """Loads a run once, but for modes that look at its images."""
        if open_images:
            return load_run(workdir, True, checkpoint)
        return loaded(workdir, checkpoint=checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "load_run", shared_run)
        patch.setattr(models, "build", shared_networks)
        patch.setattr(dispatching, "Dispatcher", shared_dispatcher)
        for name, static in (("_draw_chunk", (0, 1, 2, 3)), ("_energies", (0, 1))):
            function = getattr(figures, name).__wrapped__
            patch.setattr(figures, name, soon(function, static_argnums=static))
        yield


class _KilledError(Exception):
    """Stands for whatever ends a run early."""


def _train(
    config: ml_collections.ConfigDict, workdir: Path, killed_at: int | None = None
) -> None:
    """Trains without figures and pictures; may be cut off before a step is saved."""
    look_at = train._look_at

    def look(run: Any, taken: Any) -> None:
        if taken.step == killed_at:
            raise _KilledError
        look_at(run, taken)

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(figures, "evaluate", lambda *_: {})
        patch.setattr(measuring, "_draw", lambda *_: None)
        patch.setattr(train, "_look_at", look)
        if killed_at is not None:
            stack.enter_context(pytest.raises(_KilledError))
        train.train(config, workdir)


def _final_state(workdir: Path, step: int | None = None) -> minimax.TrainState:
    """The newest checkpoint of a run, or that of a step."""
    experiment = experiments.build(
        run_directory.read_config(workdir), open_images=False
    )
    checkpoints = checkpointing.Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(experiments.init_state(experiment), step)
    checkpoints.close()
    return state


def _losses(workdir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(x["step"], x["energy/loss"]) for x in lines if "energy/loss" in x]


def _files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- From the command line --------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    options = [f"--{k}={str(v).lower()}" for k, v in quick._options().items()]
    env = environment()
    env["XLA_FLAGS"] = " ".join([env["XLA_FLAGS"], *options])
    # Reference statistics are kept in the user's cache.
    env["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    command_line = CommandLine(env=env)
    yield command_line
    command_line.close()


FLAGS = [
    f"--config={DIGITS}",
    *(f"--config.{name}={value}" for name, value in TINY.items()),
    "--config.train.num_steps=4",
    "--config.train.report_every=2",
    "--config.train.picture_every=2",
    "--config.train.checkpoint_every=2",
    "--config.optimizer.learning_rate=0.01",
]


@pytest.fixture(scope="module")
def digits_run(run: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("digits") / "run"
    result = run(*FLAGS, f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir


def _picture(workdir: Path, name: str) -> np.ndarray:
    with Image.open(workdir / "samples" / name) as image:
        return np.asarray(image)


def test_a_run_directory_holds_what_is_promised(digits_run: Path):
    lines = (digits_run / "metrics.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    training = [report for report in reports if "energy/loss" in report]
    assert [report["step"] for report in training] == [2, 4]
    gaps = [name for report in training for name in report if "gap_t" in name]
    # A t that none of a report's 16 examples had is left out.
    assert set(gaps) == {f"energy/gap_t{t}" for t in range(4)}
    for report in training:
        assert all(np.isfinite(value) for value in report.values())
        assert report["images_per_second"] == 8 * report["steps_per_second"]
    assert [r["step"] for r in reports if "final/frechet_samples" in r] == [4]
    assert sorted(path.name for path in (digits_run / "samples").iterdir()) == [
        f"{name}_{step:08d}.png"
        for name in ("energies", "samples", "steps")
        for step in (2, 4)
    ]
    assert _picture(digits_run, "samples_00000004.png").std() > 5
    report = json.loads((digits_run / "report.json").read_text())
    assert all(count > 0 for count in report["parameters"].values())
    found = report["figures"]
    assert 0 <= found["auroc_held_out_against_samples"] <= 1
    assert found["held_out_energy_mean"] < 0 > found["samples_energy_mean"]
    assert found["num_samples"] == 32
    assert found["classifier_accuracy"] > 0.6
    assert 0 < found["frechet_train"] < found["frechet_samples"]
    assert sum(found["class_histogram"]) == pytest.approx(1)
    assert 0 <= found["confident_share"] <= 1


def test_pictures_of_a_run_start_from_the_same_noise(digits_run: Path):
    """The strip's columns, x_4 … x_0, differ at two steps, but for the first."""
    first, second = (
        _picture(digits_run, f"steps_{step:08d}.png").astype(int) for step in (2, 4)
    )
    assert first.shape == second.shape
    column = first.shape[1] // 5
    same = (first == second).all(axis=0)
    assert same[: column - 1].all()
    assert not same[-column:].all()
    assert np.unique(first[:, :column]).size > 100


def test_evaluate_repeats_the_final_figures(run: CommandLine, digits_run: Path):
    result = run("--mode=evaluate", f"--workdir={digits_run}")
    assert result.code == 0, result.err
    assert "frechet_samples" in result.out
    report = json.loads((digits_run / "report.json").read_text())
    evaluation = json.loads((digits_run / "report-1.json").read_text())
    assert (evaluation["step"], evaluation["checkpoint"]) == (4, "latest")
    assert evaluation["figures"] == report["figures"]
    assert "frechet_samples" in (digits_run / "report-1.txt").read_text()


def test_sample_and_score_from_the_command_line(
    run: CommandLine, digits_run: Path, tmp_path: Path
):
    path = tmp_path / "drawn.npz"
    flags = (f"--workdir={digits_run}", f"--output={path}", "--num_samples=3")
    result = run("--mode=sample", *flags)
    assert result.code == 0, result.err
    assert result.out.strip() == str(path)
    assert np.load(path)["x"].shape == (3, 8, 8, 1)
    (tmp_path / "drawn" / "1.png").write_text("no image")
    flags = (f"--workdir={digits_run}", f"--input={tmp_path / 'drawn'}")
    result = run("--mode=score", *flags, f"--output={tmp_path / 'scores.csv'}")
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "1.png" in errors[0]
    assert "Traceback" not in result.err
    assert not (tmp_path / "scores.csv").exists()


# --- Resumed equals unbroken ------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "images"
    return _write_folder(path, _pixels(NUM_FILES, 10))


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fed from the host, each batch read when it is asked for."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    _train(_of_folder(folder, data__num_threads=1, data__prefetch=1), workdir)
    return workdir


@pytest.mark.parametrize("saved_at", [2, 3])
def test_a_resumed_run_is_bit_identical(
    unbroken: Path, folder: Path, tmp_path: Path, saved_at: int
):
    """Cut off a step after a checkpoint that lies within an epoch.

    After step 2 the next batch lies in one epoch, after step 3 in two. One part is
    trained with the images on the device and the other from the host, with batches
    read ahead: the input is no part of what the run is.
    """
    for on_device in (saved_at == 3, saved_at == 2):
        config = _of_folder(
            folder,
            data__on_device=on_device,
            data__prefetch=5,
            data__num_threads=2,
            train__checkpoint_every=saved_at,
        )
        if (tmp_path / "run").exists():
            saved = checkpointing.Checkpoints(tmp_path / "run", read_only=True)
            assert saved.latest_step() == saved_at
            assert saved.info(saved_at)["input"]["batches"] == saved_at
            saved.close()
            _train(config, tmp_path / "run")
        else:
            _train(config, tmp_path / "run", killed_at=saved_at + 1)
    assert_trees_equal(_final_state(tmp_path / "run"), _final_state(unbroken))
    assert _losses(tmp_path / "run") == _losses(unbroken)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["resumed_from_step"] == saved_at


def test_devices_and_steps_per_dispatch_change_rounding_only(
    unbroken: Path, folder: Path, tmp_path: Path
):
    """2 devices, and 2 steps a dispatch, against 1 and 1, after 2 steps.

    Adam's first steps are near the learning rate, 1e-3, whatever the gradient; so
    1e-5 is far below what another noise or batch would do.
    """
    config = _of_folder(
        folder,
        parallel__num_devices=2,
        train__steps_per_dispatch=2,
        train__report_every=2,
    )
    _train(config, tmp_path / "run", killed_at=4)
    actual, expected = _final_state(tmp_path / "run", 2), _final_state(unbroken, 2)
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_changed_or_missing_images_stop_a_run_that_would_go_on(
    folder: Path, tmp_path: Path
):
    """The folder goes; what the run directory holds is enough to sample and score."""
    own, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(folder, own)
    config = _of_folder(own)
    _train(config, workdir)
    scores = modes.score(workdir, str(own))
    before = _files(workdir)

    Image.fromarray(_pixels(1, 10, seed=1)[0]).save(own / "03.png")
    with pytest.raises(InputError, match=r"not those that .* was trained on"):
        _train(config, workdir)
    with pytest.raises(InputError, match="not those of its checkpoint 6"):
        modes.evaluate(workdir)
    shutil.rmtree(own)
    for action in (
        lambda: modes.evaluate(workdir),
        lambda: _train(config, workdir),
    ):
        with pytest.raises(FileNotFoundError, match="no such folder; check") as error:
            action()
        assert str(own) in str(error.value)
    assert _files(workdir) == before

    path = modes.sample(workdir, 10, seed=0)
    assert np.load(path)["x"].shape == (10, 8, 8, 1)
    assert modes.score(workdir, str(folder)).read_text() == scores.read_text()


# --- What is done with a run ------------------------------------------------------


def _sample(workdir: Path, output: Path, num: int = 10, seed: int = 3) -> np.ndarray:
    return np.load(modes.sample(workdir, num, seed, str(output)))["x"]


def test_samples_are_an_npz_a_folder_and_a_grid(digits_run: Path, tmp_path: Path):
    samples = _sample(digits_run, tmp_path / "drawn.npz", num=10)
    assert (samples.dtype, samples.shape) == (np.uint8, (10, 8, 8, 1))
    assert len(np.unique(samples.reshape(10, -1), axis=0)) == 10
    with np.load(tmp_path / "drawn.npz") as file:
        assert (file["seed"], file["step"]) == (3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "drawn",
        "drawn.npz",
        "drawn.png",
    ]
    files = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in files] == [f"{i}.png" for i in range(10)]
    for path, expected in zip(files, samples, strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), expected[:, :, 0])
    # The grid is 4 × 3, of whole pixels, with lines between the images.
    with Image.open(tmp_path / "drawn.png") as image:
        times = image.size[0] // (4 * 9 + 1)
        grid = np.asarray(image)[::times, ::times]
    assert grid.shape == (3 * 9 + 1, 4 * 9 + 1)
    for i, expected in enumerate(samples[:, :, :, 0]):
        top, left = 1 + i // 4 * 9, 1 + i % 4 * 9
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], expected)


def test_a_sample_is_a_function_of_the_seed_and_its_number(
    digits_run: Path, tmp_path: Path
):
    """Not of how many are drawn, nor of how many the networks take at once.

    With other numbers at once the program is another, and may round otherwise: a
    pixel that lies between two levels can fall on either.
    """
    first = _sample(digits_run, tmp_path / "first.npz")
    np.testing.assert_array_equal(first, _sample(digits_run, tmp_path / "again.npz"))
    other = _sample(digits_run, tmp_path / "other.npz", seed=4)
    assert (first != other).any(axis=(1, 2, 3)).all()
    few = _sample(digits_run, tmp_path / "few.npz", num=4)
    np.testing.assert_allclose(few.astype(int), first[:4].astype(int), atol=1)

    workdir = tmp_path / "copy"
    shutil.copytree(digits_run, workdir)
    config = run_directory.read_config(workdir)
    config.evaluation.batch_size = 4
    (workdir / "config.json").write_text(config_lib.to_json(config))
    in_fours = _sample(workdir, tmp_path / "in_fours.npz")
    np.testing.assert_allclose(in_fours.astype(int), first.astype(int), atol=1)
    np.testing.assert_array_equal(
        in_fours[:9], _sample(workdir, tmp_path / "nine.npz", num=9)
    )


def test_nothing_that_is_there_is_overwritten(digits_run: Path, tmp_path: Path):
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_text("mine")
    before = _files(tmp_path)
    samples = _sample(digits_run, tmp_path / "a.npz")
    assert _files(tmp_path).items() >= before.items()
    with pytest.raises(InputError, match="exists already"):
        _sample(digits_run, tmp_path / "a.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["x"], samples)

    workdir = tmp_path / "run"
    shutil.copytree(digits_run, workdir)
    before = _files(workdir)
    paths = [modes.sample(workdir, 10, 0) for _ in range(2)]
    paths += [modes.score(workdir, str(paths[0])) for _ in range(2)]
    assert len(set(paths)) == 4
    after = _files(workdir)
    assert after.items() >= before.items()
    # Of each time: the NPZ, the grid and ten images; then twice the scores.
    assert len(after) == len(before) + 2 * 12 + 2


def test_scores_are_energies_whatever_the_file(digits_run: Path, tmp_path: Path):
    pixels = _pixels(10, 8)
    folder = _write_folder(tmp_path / "some images", pixels)
    np.savez(tmp_path / "x.npz", x=pixels[..., None])
    found = {}
    for source in (folder, tmp_path / "x.npz"):
        output = tmp_path / f"{source.stem}.csv"
        modes.score(digits_run, str(source), str(output))
        header, *lines = output.read_text().splitlines()
        assert header == "image,energy"
        names, values = zip(*(line.split(",") for line in lines), strict=True)
        found[source.stem] = (names, np.array(values, float))
    assert found["some images"][0] == tuple(f"{i:02}.png" for i in range(10))
    assert found["x"][0] == tuple(map(str, range(10)))
    np.testing.assert_array_equal(found["x"][1], found["some images"][1])

    output = modes.score(digits_run, str(folder), str(tmp_path / "scores.npz"))
    with np.load(output) as file:
        assert tuple(file["image"]) == found["some images"][0]
        np.testing.assert_allclose(file["energy"], found["x"][1], rtol=1e-6)

    # They are f(x, 0) of the averaged model.
    loaded = modes.load_run(digits_run)
    expected = quick.jit(density.energy_at_data, static_argnums=0)(
        loaded.experiment.networks,
        jax.tree.map(np.asarray, loaded.variables.energy),
        images.to_float(pixels[..., None]),
    )
    np.testing.assert_allclose(found["x"][1], expected, rtol=1e-5)


def test_unusable_images_are_named_and_nothing_is_written(
    digits_run: Path, tmp_path: Path
):
    good = _pixels(3, 8)[..., None]
    np.savez(tmp_path / "wide.npz", x=np.zeros((3, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "float.npz", x=good / np.float32(255))
    np.savez(tmp_path / "none.npz", x=good[:0])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    _write_folder(tmp_path / "small", _pixels(2, 7))
    corrupt = _write_folder(tmp_path / "corrupt", _pixels(2, 8))
    (corrupt / "01.png").write_bytes((corrupt / "01.png").read_bytes()[:60])
    before = (_files(digits_run), _files(tmp_path))
    for name, expected in {
        "wide.npz": "the model's shape",
        "float.npz": "not of uint8",
        "none.npz": "empty",
        "text.npz": "text.npz",
        "empty": "no image in this folder",
        "small": "at least 8 a side are needed",
        "corrupt": "01.png",
        "missing": "no such folder",
        "missing.npz": "no such file",
    }.items():
        with pytest.raises((InputError, FileNotFoundError), match=expected) as error:
            modes.score(digits_run, str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert (_files(digits_run), _files(tmp_path)) == before


def test_a_checkpoint_is_drawn_the_same_again(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit from two loads; and as the run did, whose program is another."""
    monkeypatch.setattr(figures, "_HISTOGRAM_IMAGES", 100)
    for name in ("first", "second"):
        loaded = modes.load_run(digits_run, open_images=True)
        drawn = figures.draw_pictures(
            loaded.experiment, loaded.variables, tmp_path / name / "samples", 4
        )
        assert {name: v.shape for name, v in drawn.histograms.items()} == {
            "energy/held-out images": (100,),
            "energy/samples": (100,),
        }
    for name in drawn.files:
        first, second = (
            (tmp_path / part / "samples" / f"{name}_00000004.png").read_bytes()
            for part in ("first", "second")
        )
        assert first == second, name
    for name in ("samples_00000004.png", "steps_00000004.png"):
        of_run, again = _picture(digits_run, name), _picture(tmp_path / "first", name)
        np.testing.assert_allclose(of_run.astype(int), again.astype(int), atol=1)


def test_figures_pass_the_checks_of_types(digits_run: Path):
    """Which are on here, and off in the command line."""
    loaded = modes.load_run(digits_run, open_images=True)
    found = figures.evaluate(loaded.experiment, loaded.variables)
    report = json.loads((digits_run / "report.json").read_text())
    assert found.keys() == report["figures"].keys()
    for name in ("held_out_energy_mean", "samples_energy_mean"):
        assert found[name] == pytest.approx(report["figures"][name], rel=1e-3)


# --- Measured ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with Inception's names."""
    return tiny_inception.write(tmp_path_factory.mktemp("inception") / "tiny.npz")


def test_a_run_is_measured_by_inceptions_features(
    run: CommandLine,
    digits_run: Path,
    weights: Path,
    tmp_path: Path,
):
    """From the command line: samples, then images in their place."""
    before = _files(digits_run)
    flags = (f"--workdir={digits_run}", f"--inception_weights={weights}")
    result = run("--mode=evaluate", *flags, "--num_samples=40")
    assert result.code == 0, result.err
    assert "fid" in result.out and "precision" in result.out
    assert "not the published file" in result.err
    made = _files(digits_run)
    assert before.items() <= made.items()
    (path,) = [p for p in made.keys() - before.keys() if p.suffix == ".json"]
    table = path.with_suffix(".txt").read_text()
    found = json.loads(path.read_text())["figures"]
    assert found["num_images"] == 40 and found["num_reference"] == 179
    assert found["preprocessing"] == "tf" and found["reference"] == "train"
    assert found["inception_weights_published"] is False
    assert 1 <= found["inception_score"] and 0 <= found["precision"] <= 1
    assert found["fid"] > 0 and f"{found['fid']:.4g}" in table
    # Beside what a run of digits is measured by anyway.
    assert found["frechet_samples"] > 0

    real = images.open_images(run_directory.read_config(digits_run).data, 0).train
    np.savez(tmp_path / "real.npz", x=images.stack(real))
    result = run("--mode=evaluate", *flags, f"--input={tmp_path / 'real.npz'}")
    assert result.code == 0, result.err
    (newest,) = (
        _files(digits_run).keys()
        - made.keys()
        - {path}
        - {p for p in _files(digits_run) if p.suffix == ".txt"}
    )
    ideal = json.loads(newest.read_text())["figures"]
    assert ideal["num_images"] == 179 and ideal["fid"] < 1e-3 * found["fid"]
    assert ideal["precision"] == ideal["recall"] == ideal["coverage"] == 1.0
    assert "step" not in json.loads(newest.read_text())  # They are of no checkpoint.


def test_figures_of_a_folder_do_not_depend_on_its_order(
    digits_run: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Images sorted by kind have the Inception score of images that are not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = images.open_images(run_directory.read_config(digits_run).data, 0)
    pixels = images.stack(found.test, 200)
    scores = []
    for name, order in (
        ("mixed", np.arange(200)),
        ("sorted", np.argsort(pixels.mean(axis=(1, 2, 3)))),
    ):
        np.savez(tmp_path / f"{name}.npz", x=pixels[order])
        report = modes.evaluate(
            digits_run,
            input_path=tmp_path / f"{name}.npz",
            inception=True,
            inception_weights=str(weights),
        )
        scores.append(report["figures"]["inception_score"])
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_a_part_of_a_folder_is_of_all_kinds(digits_run: Path, tmp_path: Path):
    """Not its first files, which may all be of one kind."""
    pixels = np.concatenate([np.zeros((40, 8, 8)), np.full((40, 8, 8), 255)])
    _write_folder(tmp_path / "kinds", pixels.astype(np.uint8))
    data = run_directory.read_config(digits_run).data
    name, shape = str(tmp_path / "kinds"), (8, 8, 1)
    none = np.zeros((0, *shape), np.uint8)
    part = outlier_sets.open_outliers(name, none, shape, data, 0, 30)
    assert len(part) == 30 and 50 < part.mean() < 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inception_weights=nowhere.npz",), "nowhere.npz: no such file"),
        (("--inception_weights=setup.py",), "the suffix is '.py'"),
        (("--checkpoint=best",), "keeps no best checkpoint"),
        (("--checkpoint=3",), "allowed: latest, best, 2, 4"),
        (("--checkpoint=last",), "allowed: latest, best, 2, 4"),
        (("--num_samples=1",), "evaluation.num_samples is 1"),
        (("--input=nowhere",), "nowhere: no such folder"),
        (("--input=nowhere", "--num_samples=9"), "--num_samples has no meaning with"),
        (("--input=nowhere", "--inception_weights=none"), "leave one of them out"),
        (("--preprocessing=pytorch_fid",), "--preprocessing is for Inception's"),
        (("--skip_corrupt",), "--skip_corrupt has no meaning without --input"),
    ],
)
def test_what_cannot_be_measured(
    run: CommandLine, digits_run: Path, flags: tuple[str, ...], message: str
):
    before = _files(digits_run)
    result = run("--mode=evaluate", f"--workdir={digits_run}", *flags)
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.err
    assert _files(digits_run) == before


def test_the_checkpoint_of_the_lowest_fid_is_kept(folder: Path, tmp_path: Path):
    """Also by a run that is cut off, and then goes on from before its best step."""
    workdir, best = tmp_path / "run", tmp_path / "run" / "best"
    config = _of_folder(folder, train__evaluate_every=1)
    config.evaluation.num_samples_on_the_way = 16
    fids: list[float | None] = []
    meter = image_quality.Meter(lambda _: None, None, {}, 0)
    measurement = dict.fromkeys(best_checkpoint.MEASUREMENT, "the same")

    def evaluate(experiment, averages, given, num_samples=None):
        assert given is meter
        if num_samples is None:
            return {"fid": 0.1, **measurement}  # Of more samples: not to be compared.
        assert num_samples == 16
        if fids[0] is None:
            raise _KilledError
        return {"fid": fids.pop(0), **measurement}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "evaluate", evaluate)
        patch.setattr(figures, "open_meter", lambda _: meter)
        patch.setattr(measuring, "_draw", lambda *_: None)
        fids += [5.0, 3.0, 4.0, None]
        with pytest.raises(_KilledError):
            train.train(config, workdir)
        assert [path.name for path in best.iterdir()] == ["2"]
        fids[:] = [4.0, 3.0, 2.5, 2.2]  # Of steps 3 to 6: the last competes too.
        train.train(config, workdir)
    assert not fids
    assert [path.name for path in best.iterdir()] == ["6"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("evaluation/fid") for line in lines]
    assert [fid for fid in found if fid] == [5.0, 3.0, 4.0, 3.0, 2.5]
    loaded = modes.load_run(workdir, checkpoint="best")
    assert loaded.step == 6
    kept = modes.load_run(workdir, checkpoint="4")
    assert kept.step == 4
    with pytest.raises(AssertionError):
        assert_trees_equal(loaded.variables, kept.variables)


def test_fids_measured_in_different_ways_are_not_compared(
    unbroken: Path, tmp_path: Path
):
    state = _final_state(unbroken)
    best = best_checkpoint.BestCheckpoint(tmp_path)

    def kept_after(step: int, fid: float, way: str) -> list[int]:
        found = {"fid": fid, **dict.fromkeys(best_checkpoint.MEASUREMENT, way)}
        best.offer(state.replace(step=np.int32(step)), found, {})
        best._checkpoints.wait()
        return best._checkpoints.steps()

    assert kept_after(1, 5.0, "tf") == [1]
    assert kept_after(2, 6.0, "tf") == [1]
    best.close()
    best = best_checkpoint.BestCheckpoint(tmp_path)  # As after a resume.
    assert kept_after(3, 5.5, "tf") == [1]
    assert kept_after(4, 9.0, "pytorch_fid") == [4]
    assert kept_after(5, 8.0, "tf") == [5]
    best.close()


def test_outliers_are_detected_from_the_command_line(
    run: CommandLine, digits_run: Path, tmp_path: Path
):
    np.savez(tmp_path / "black.npz", x=np.zeros((30, 8, 8, 1), np.uint8))
    names = f"inverted,noise,photos,{tmp_path / 'black.npz'}"
    flags = (f"--out={names}", "--baselines", "--num_draws=2", "--limit=60")
    result = run("--mode=ood", f"--workdir={digits_run}", *flags)
    assert result.code == 0, result.err
    folder = digits_run / "ood"
    assert result.out.splitlines()[0] == str(folder)
    assert (folder / "report.txt").read_text().strip() in result.out
    report = json.loads((folder / "report.json").read_text())
    assert report["inliers"] == {"name": "test", "num_images": 60}
    sizes = dict(zip(names.split(","), (60, 60, 60, 30), strict=True))
    assert report["outliers"] == sizes
    scores = ["energy", "gradient norm", "energy over t"]
    baselines = ["kernel density", "Gaussian mixture", "isolation forest"]
    for name in sizes:
        found = report["figures"][name]
        assert {*scores, *baselines, "PCA reconstruction error"} == found.keys()
        for figures_of_score in found.values():
            for estimate in figures_of_score.values():
                assert 0 <= estimate["low"] <= estimate["high"] <= 1
    # No model is needed to tell noise from digits.
    assert report["figures"]["noise"]["kernel density"]["auroc"]["value"] > 0.99
    kept = np.load(folder / "scores.npz")
    assert kept["in/energy"].shape == (60,)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 8 and "noise_roc.png" in pictures
    # No folder is written twice, and what is drawn is drawn the same again.
    again = detection.detect(digits_run, ["noise"], num_draws=1, limit=60)
    assert again == digits_run / "ood-1"
    np.testing.assert_allclose(
        np.load(again / "scores.npz")["out/noise/energy"],
        kept["out/noise/energy"],
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outliers": []}, "--out is empty"),
        ({"outliers": ["noise", "noise"]}, "name noise twice"),
        ({"outliers": ["held_out_classes"]}, "this run left no class out"),
        ({"outliers": ["noise"], "inliers": "inverted"}, "only be in --out"),
        ({"outliers": ["nois"]}, "did you mean 'noise'"),
        ({"outliers": ["test"], "inliers": "noise"}, "it is for --in"),
        ({"outliers": ["noise"], "inliers": "noise"}, "noise twice"),
        ({"outliers": ["digits"]}, "what this run was trained on"),
        ({"outliers": ["noise"], "inliers": "held_out_classes"}, "left no class out"),
        ({"outliers": ["noise"], "num_draws": 0}, "--num_draws is 0"),
        ({"outliers": ["noise"], "checkpoint": "9"}, "--checkpoint=9"),
    ],
)
def test_outliers_that_cannot_be_detected(
    digits_run: Path, arguments: dict, message: str
):
    before = _files(digits_run)
    with pytest.raises(InputError, match=message):
        detection.detect(digits_run, **arguments)
    assert _files(digits_run) == before


def test_a_class_can_be_left_out(tmp_path: Path):
    config = _config(data__held_out_classes=(9, 3))
    config_lib.validate(config)
    _train(config, tmp_path / "run")
    source = modes.load_run(tmp_path / "run", open_images=True).experiment.source
    found, whole = source.image_set, images.open_images(_config().data, config.seed)
    assert not np.isin(found.train_labels, (3, 9)).any()
    assert not np.isin(found.test_labels, (3, 9)).any()
    labels = np.concatenate([whole.train_labels, whole.test_labels])
    assert len(found.left_out) == np.isin(labels, (3, 9)).sum()
    assert len(found.train) == (~np.isin(whole.train_labels, (3, 9))).sum()
    kept = images.stack(found.train)
    np.testing.assert_array_equal(
        kept, images.stack(whole.train)[~np.isin(whole.train_labels, (3, 9))]
    )
    folder = detection.detect(tmp_path / "run", ["held_out_classes"], limit=20)
    report = json.loads((folder / "report.json").read_text())
    assert report["outliers"] == {"held_out_classes": 20}
    for classes, message in (((10,), "choose of"), (tuple(range(9)), "at least two")):
        with pytest.raises(InputError, match=message):
            images.open_images(_config(data__held_out_classes=classes).data, 0)
