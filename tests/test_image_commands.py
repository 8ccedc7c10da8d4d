"""The commands on images, from end to end: trained, sampled, scored, measured."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick
import tiny_inception
from cli import (
    TINY_UNET,
    assert_error,
    dotted,
    files,
    flags_of,
    python,
    report,
    run,
    succeed,
)
from PIL import Image
from sklearn.datasets import load_digits

from ddaebm_jax import config as config_lib
from ddaebm_jax import density
from ddaebm_jax.commands import evaluate, ood, sample
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import likelihood, plots
from ddaebm_jax.training.run_directory import read_config
from ddaebm_jax.training.trained_run import load_run

FIELDS = TINY_UNET | {
    "data.batch_size": 8,
    "data.test_fraction": 0.9,
    "data.on_device": False,
    "optimizer.learning_rate": 0.01,
    "train.num_steps": 4,
    "train.report_every": 2,
    "train.picture_every": 2,
    "train.checkpoint_every": 2,
    "train.tensorboard": False,
    "parallel.num_devices": 1,
    "evaluation.num_samples": 32,
    "evaluation.batch_size": 32,
    "evaluation.num_particles": 128,
    "evaluation.num_runs": 2,
}


def _tiny(**changes: object) -> list[str]:
    fields = FIELDS | dotted(changes)
    return ["--config=configs/digits.py", *flags_of(fields)]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("digits") / "run"
    succeed(*_tiny(), f"--workdir={workdir}")
    return workdir


def _pixels(num: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """Grey images of random pixels."""
    shape = (num, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def _picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# --- Trained ----------------------------------------------------------------------


def test_a_run_directory_holds_metrics_pictures_and_figures(digits_run: Path):
    written = (digits_run / "metrics.jsonl").read_text().splitlines()
    training = [line for line in map(json.loads, written) if "energy/loss" in line]
    assert [line["step"] for line in training] == [2, 4]
    # A t that none of a report's 16 examples had is left out.
    gaps = {name for line in training for name in line if "gap_t" in name}
    assert gaps == {f"energy/gap_t{t}" for t in range(4)}
    for line in training:
        assert all(np.isfinite(value) for value in line.values())
        assert line["images_per_second"] == 8 * line["steps_per_second"]
    assert sorted(path.name for path in (digits_run / "samples").iterdir()) == [
        f"{name}_{step:08d}.png"
        for name in ("energies", "nearest", "samples", "steps")
        for step in (2, 4)
    ]
    assert _picture(digits_run / "samples" / "samples_00000004.png").std() > 5
    assert all(count > 0 for count in report(digits_run)["parameters"].values())
    found = report(digits_run)["figures"]
    assert 0 <= found["auroc_held_out_against_samples"] <= 1
    assert found["num_held_out_energies"] == found["num_samples_energies"] == 32
    assert found["held_out_energy_mean"] < 0 > found["samples_energy_mean"]
    assert found["num_samples"] == 32
    assert 0 < found["frechet_train"] < found["frechet_samples"]
    assert sum(found["class_histogram"]) == pytest.approx(1)


def test_pictures_of_a_run_start_from_the_same_noise(digits_run: Path):
    """The strip's columns, x_4 … x_0, differ at two steps, but for the first."""
    first, second = (
        _picture(digits_run / "samples" / f"steps_{step:08d}.png").astype(int)
        for step in (2, 4)
    )
    assert first.shape == second.shape
    column = first.shape[1] // 5
    same = (first == second).all(axis=0)
    assert same[: column - 1].all()
    assert not same[-column:].all()


# --- Sampled ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in drawn.npz, beside files that were there before."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "drawn.png").write_text("mine")
    flags = (f"--output={folder / 'drawn.npz'}", "--num_samples=10", "--seed=3")
    result = succeed("--mode=sample", f"--workdir={digits_run}", *flags)
    assert result.out.strip() == str(folder / "drawn.npz")
    return folder


def test_samples_are_an_npz_a_folder_and_a_grid(samples: Path):
    with np.load(samples / "drawn.npz") as file:
        drawn = file["x"]
        assert (file["seed"], file["step"]) == (3, 4)
    assert (drawn.dtype, drawn.shape) == (np.uint8, (10, 8, 8, 1))
    assert len(np.unique(drawn.reshape(10, -1), axis=0)) == 10
    files = sorted((samples / "drawn").iterdir())
    assert [path.name for path in files] == [f"{i}.png" for i in range(10)]
    for path, expected in zip(files, drawn, strict=True):
        np.testing.assert_array_equal(_picture(path), expected[:, :, 0])
    assert (samples / "drawn.png").read_text() == "mine"
    # The grid is 4 × 3, of whole pixels, with lines between the images.
    grid = _picture(samples / "drawn-1.png")
    times = grid.shape[1] // (4 * 9 + 1)
    grid = grid[::times, ::times]
    assert grid.shape == (3 * 9 + 1, 4 * 9 + 1)
    for i, expected in enumerate(drawn[:, :, :, 0]):
        top, left = 1 + i // 4 * 9, 1 + i % 4 * 9
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], expected)


def test_a_sample_is_a_function_of_the_seed_and_its_number(
    digits_run: Path, samples: Path, tmp_path: Path
):
    """Not of how many are drawn, nor of how many the networks take at once.

    With other numbers at once the program is another, and may round otherwise: a
    pixel that lies between two levels can fall on either.
    """

    def sample(workdir: Path, num: int, seed: int) -> np.ndarray:
        path = tmp_path / f"{workdir.name}-{num}-{seed}.npz"
        flags = (f"--output={path}", f"--num_samples={num}", f"--seed={seed}")
        succeed("--mode=sample", f"--workdir={workdir}", *flags)
        return np.load(path)["x"].astype(int)

    first = np.load(samples / "drawn.npz")["x"].astype(int)
    np.testing.assert_array_equal(sample(digits_run, 10, seed=3), first)
    assert (sample(digits_run, 10, seed=4) != first).any(axis=(1, 2, 3)).all()
    in_fours = tmp_path / "fours"
    shutil.copytree(digits_run, in_fours)
    config = read_config(in_fours)
    config.evaluation.batch_size = 4
    (in_fours / "config.json").write_text(config_lib.to_json(config))
    np.testing.assert_allclose(sample(in_fours, 9, seed=3), first[:9], atol=1)


def test_a_picture_that_cannot_be_drawn_leaves_no_file(
    digits_run: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
):
    monkeypatch.setattr(plots, "write_grid", lambda *_: None)
    caplog.set_level("INFO")
    path = sample.sample(digits_run, 5, output=tmp_path / "a.npz")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "a.npz"]
    assert len(list((tmp_path / "a").iterdir())) == 5
    assert f"wrote {path}" in caplog.messages


# --- Scored -----------------------------------------------------------------------


def test_scores_of_folders_and_arrays_are_energies(digits_run: Path, tmp_path: Path):
    pixels = _pixels(10)
    folder = _write_folder(tmp_path / "some images", pixels)
    np.savez(tmp_path / "x.npz", x=pixels[..., None])
    for source, output in (
        (folder, "of_folder.csv"),
        (tmp_path / "x.npz", "of_npz.csv"),
        (folder, "scores.npz"),
    ):
        files = (f"--input={source}", f"--output={tmp_path / output}")
        succeed("--mode=score", f"--workdir={digits_run}", *files)
    with np.load(tmp_path / "scores.npz") as file:
        names, energies = file["image"], file["energy"]
    assert list(names) == [f"{i:02}.png" for i in range(10)]
    for output, expected in (("of_folder.csv", names), ("of_npz.csv", range(10))):
        header, *lines = (tmp_path / output).read_text().splitlines()
        assert header == "image,energy,rank,p_value"
        cells = [line.split(",") for line in lines]
        written, values, ranks, p_values = zip(*cells, strict=True)
        assert all(0 < float(p) <= 1 for p in p_values)
        assert list(written) == list(map(str, expected))
        np.testing.assert_allclose(np.array(values, float), energies, rtol=1e-6)
        assert ranks[np.argmin(energies)] == "1" and ranks[np.argmax(energies)] == "10"

    # They are f(x, 0) of the averaged model.
    loaded = load_run(digits_run)
    expected = quick.jit(density.energy_at_data, static_argnums=0)(
        loaded.experiment.networks,
        jax.tree.map(np.asarray, loaded.variables.energy),
        images.to_float(pixels[..., None]),
    )
    np.testing.assert_allclose(energies, expected, rtol=1e-5)


def test_unusable_images_are_named_and_nothing_is_written(
    digits_run: Path, tmp_path: Path
):
    corrupt = _write_folder(tmp_path / "corrupt", _pixels(3))
    (corrupt / "01.png").write_bytes((corrupt / "01.png").read_bytes()[:60])
    np.savez(tmp_path / "wide.npz", x=_pixels(3, side=16)[..., None])
    before = files(digits_run)
    flags = ("--mode=score", f"--workdir={digits_run}")
    for name, *words in (
        ("corrupt", "01.png"),
        ("wide.npz", "the model's shape"),
        ("missing", "no such folder"),
    ):
        assert_error(run(*flags, f"--input={tmp_path / name}"), name, *words)
    assert files(digits_run) == before
    output = tmp_path / "scores.csv"
    succeed(*flags, f"--input={corrupt}", "--skip_corrupt", f"--output={output}")
    lines = output.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["image", "00.png", "02.png"]


def test_a_strangers_run_chooses_no_paths_to_load_code_from_or_write_to(
    digits_run: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(digits_run, workdir)
    config = read_config(workdir)
    for section, field in (
        (config.compilation_cache, "directory"),
        (config.data, "tfds_dir"),
    ):
        section[field] = str(tmp_path / "chosen")
    (workdir / "config.json").write_text(config_lib.to_json(config))
    loaded = load_run(workdir).experiment.config
    assert loaded.compilation_cache.directory == ""
    assert loaded.data.tfds_dir == ""
    assert not (tmp_path / "chosen").exists()


def test_a_run_needs_its_directory_alone_and_notices_changed_images(tmp_path: Path):
    folder, workdir = tmp_path / "images", tmp_path / "run"
    _write_folder(folder, _pixels(20, side=10))
    flags = _tiny(
        data__name="folder",
        data__path=folder,
        data__crop="(1,2,9,10)",
        data__test_fraction=0.35,
        train__picture_every=0,
    )
    succeed(*flags, f"--workdir={workdir}")
    intact = (folder / "03.png").read_bytes()
    Image.fromarray(_pixels(1, 10, seed=1)[0]).save(folder / "03.png")
    result = run("--mode=evaluate", f"--workdir={workdir}")
    assert_error(result, "not those of its checkpoint 4")
    moved = folder.rename(tmp_path / "elsewhere")
    for again in (["--mode=evaluate"], flags):
        assert_error(run(*again, f"--workdir={workdir}"), str(folder), "data_path")
    with pytest.raises(InputError, match="not those of its checkpoint 4"):
        load_run(workdir, open_images=True, data_path=moved)
    (moved / "03.png").write_bytes(intact)
    assert load_run(workdir, True, data_path=moved).step == 4
    with pytest.raises(InputError, match=r"--data_path, .*nowhere: no such folder"):
        load_run(workdir, data_path=tmp_path / "nowhere")
    made = succeed("--mode=sample", "--num_samples=2", f"--workdir={workdir}")
    assert np.load(made.out.strip())["x"].shape == (2, 8, 8, 1)
    flags = "--mode=score", f"--workdir={workdir}", f"--input={moved}"
    made = succeed(*flags)
    header, *lines = Path(made.out.strip()).read_text().splitlines()
    assert header == "image,energy,rank" and len(lines) == 20
    assert "no p-values, as the run's images are not opened" in made.err
    assert_error(run(*flags, "--fdr=0.2"), str(folder), "data_path")
    made = succeed(*flags, "--fdr=0.2", f"--data_path={moved}")
    header = Path(made.out.strip()).read_text().splitlines()[0]
    assert header == "image,energy,rank,p_value,flagged"


# --- Measured ---------------------------------------------------------------------


def test_a_run_is_measured_by_inception_features(digits_run: Path, tmp_path: Path):
    """Samples; then real images in their place, in any order."""
    weights = tiny_inception.write(tmp_path / "tiny.npz")  # With Inception's names.

    def measured(*flags: object) -> dict:
        before = set(digits_run.glob("*.json"))
        result = succeed(
            "--mode=evaluate",
            f"--workdir={digits_run}",
            f"--inception_weights={weights}",
            *flags,
        )
        assert "fid" in result.out and "not the published file" in result.err
        (path,) = set(digits_run.glob("*.json")) - before
        found = report(digits_run, path.name)
        table = path.with_suffix(".txt").read_text()
        assert f"{found['figures']['fid']:.4g}" in table
        return found

    found = measured("--num_samples=40")["figures"]
    assert found["num_images"] == 40 and found["num_reference"] == 179
    assert found["preprocessing"] == "tf" and found["reference"] == "train"
    assert found["inception_weights_published"] is False
    assert 1 <= found["inception_score"] and 0 <= found["precision"] <= 1
    assert found["frechet_samples"] > 0  # Beside the figures of every run of digits.

    train = images.open_images(read_config(digits_run).data, 0).train
    pixels = images.stack(train)
    order = np.argsort(pixels.mean(axis=(1, 2, 3)))
    reports = []
    for name, one in (("mixed", pixels), ("sorted", pixels[order])):
        np.savez(tmp_path / f"{name}.npz", x=one)
        reports.append(measured(f"--input={tmp_path / name}.npz"))
    mixed, by_kind = (one["figures"] for one in reports)
    assert mixed["num_images"] == 179 and mixed["fid"] < 1e-3 * found["fid"]
    assert mixed["precision"] == mixed["recall"] == mixed["coverage"] == 1.0
    assert "step" not in reports[0]  # They are of no checkpoint.
    scores = (mixed["inception_score"], by_kind["inception_score"])
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_likelihoods_of_images_are_measured_on_demand(
    digits_run: Path, monkeypatch: pytest.MonkeyPatch
):
    """In 64 dimensions 128 particles after four steps carry none, and that is said."""
    monkeypatch.setattr(likelihood, "_MOST_ROWS", 64)
    found = evaluate.evaluate(digits_run, with_likelihood=True)["figures"]
    assert len(found["effective_share"]) == len(found["consistency"]) == 4
    assert np.isfinite(found["log_z"]) and np.isfinite(found["log_likelihood_bound"])
    assert "particles count" in found["log_likelihood_refused"]
    assert "log_likelihood" not in found
    for name in ("kernel_density", "gaussian_mixture"):
        assert np.isfinite(found[f"log_likelihood_{name}"])
    source = load_run(digits_run, open_images=True).experiment.source
    rows = likelihood.training_rows(source)
    assert rows.shape[1:] == (8, 8, 1) and rows.min() == -1.0 and rows.max() == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inception_weights=nowhere.npz",), "nowhere.npz: no such file"),
        (("--checkpoint=3",), "allowed: latest, best, 2, 4"),
        (("--checkpoint=last",), "allowed: latest, best, 2, 4"),
        (("--checkpoint=best",), "best checkpoint"),
        (("--num_samples=1",), "evaluation.num_samples is 1"),
        (("--input=nowhere",), "nowhere: no such folder"),
        (("--input=nowhere", "--num_samples=9"), "--num_samples has no meaning with"),
        (("--input=nowhere", "--likelihood"), "--likelihood has no meaning with"),
        (("--input=nowhere", "--inception_weights=none"), "leave one of them out"),
        (("--preprocessing=pytorch_fid",), "--preprocessing is for Inception"),
        (("--skip_corrupt",), "--skip_corrupt has no meaning without --input"),
    ],
)
def test_an_impossible_measurement_is_refused(
    digits_run: Path, flags: tuple[str, ...], message: str
):
    before = files(digits_run)
    assert_error(run("--mode=evaluate", f"--workdir={digits_run}", *flags), message)
    assert files(digits_run) == before


# --- Outliers ---------------------------------------------------------------------


def test_outliers_are_detected(digits_run: Path, tmp_path: Path):
    black = tmp_path / "black, 20.npz"
    np.savez(black, x=np.zeros((20, 8, 8, 1), np.uint8))
    names = ["inverted", "noise", "photos", str(black)]
    flags = ("--mode=ood", f"--workdir={digits_run}", "--num_draws=2", "--limit=60")
    several = (f'--out=inverted,noise,"{black}"', "--out=photos")
    result = succeed(*flags, *several, "--baselines")
    assert re.search(rf"(?m)^{re.escape(str(black))} +60/20 ", result.out)
    folder = digits_run / "ood"
    assert result.out.splitlines()[0] == str(folder)
    assert (folder / "report.txt").read_text().strip() in result.out
    measured = report(folder)
    assert measured["inliers"] == {"name": "test", "num_images": 60}
    sizes = dict(zip(names, (60, 60, 60, 20), strict=True))
    assert measured["outliers"] == sizes
    scores = {"energy", "gradient norm", "energy over t", "kernel density"}
    for name in sizes:
        found = measured["figures"][name]
        assert len(found) == 10 and scores < found.keys()
        for estimates in found.values():
            for estimate in estimates.values():
                assert 0 <= estimate["low"] <= estimate["high"] <= 1
    # No model is needed to tell noise from digits.
    assert measured["figures"]["noise"]["kernel density"]["auroc"]["value"] > 0.99
    kept = np.load(folder / "scores.npz")
    assert kept["in/energy"].shape == (60,)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 8 and "noise_roc.png" in pictures
    # No folder is written twice, and what is drawn is drawn the same again.
    succeed(*flags, "--out=noise")
    again = np.load(digits_run / "ood-1" / "scores.npz")
    np.testing.assert_allclose(
        again["out/noise/energy"], kept["out/noise/energy"], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outliers": []}, "--out is empty"),
        ({"outliers": ["noise", "noise"]}, "name noise twice"),
        ({"outliers": ["noise"], "inliers": "inverted"}, "only be in --out"),
        ({"outliers": ["test"], "inliers": "noise"}, "it is for --in"),
        ({"outliers": ["held_out_classes"]}, "this run left no class out"),
        ({"outliers": ["nois"]}, "did you mean 'noise'"),
        ({"outliers": ["digits"]}, "what this run was trained on"),
        ({"outliers": ["noise"], "checkpoint": "9"}, "--checkpoint=9"),
    ],
)
def test_impossible_outlier_sets_are_refused(
    digits_run: Path, arguments: dict, message: str
):
    before = files(digits_run)
    with pytest.raises(InputError, match=message):
        ood.detect(digits_run, **arguments)
    assert files(digits_run) == before


def test_benchmark_of_mnist_leaves_a_digit_out(tmp_path: Path):
    """With scikit-learn's digits, which are fewer."""
    fields = FIELDS | {"data.test_fraction": 0.5, "train.num_steps": 2}
    results = tmp_path / "results.jsonl"
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}", "--digits=3"]
    flags += [f"--results={results}", *flags_of(fields)]
    first = python("benchmarks/mnist_outliers.py", *flags)
    assert first.code == 0, first.err
    assert read_config(tmp_path / "3").data.held_out_classes == (3,)
    lines = [json.loads(line) for line in results.read_text().splitlines()][1:]
    assert {"energy", "multiscale", "kernel density on PCA"} <= {
        line["detector"] for line in lines
    }
    labels = load_digits().target
    assert {line["outliers"] for line in lines} == {int((labels == 3).sum())}
    assert f"{lines[0]['auroc']:.3f}" in first.out
    before = results.read_text(), files(tmp_path / "3" / "checkpoints")
    # Stopped while it wrote: the digit is measured again, but not trained.
    results.write_text("\n".join(before[0].splitlines()[:-3]) + '\n{"set": "3", "se')
    again = python("benchmarks/mnist_outliers.py", *flags)
    assert again.code == 0 and again.out == first.out[-len(again.out) :]
    assert (results.read_text(), files(tmp_path / "3" / "checkpoints")) == before
    other = python("benchmarks/mnist_outliers.py", *flags, "--config.model.nz=3")
    assert other.code == 1 and "runs of another config (model.nz" in other.err
