"""`--mode=restore` from end to end; the mathematics is in test_restoration."""

import csv
import functools
from pathlib import Path

import numpy as np
import pytest
from cli import TINY_UNET, assert_error, flags_of, run, succeed, tiny
from PIL import Image
from test_likelihood import NO_VARIABLES, experiment, gaussian_networks

from ddaebm_jax import reference
from ddaebm_jax.commands import restore
from ddaebm_jax.data.image_files import write_image, write_images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import reference_draws, restoring
from ddaebm_jax.models import Players
from ddaebm_jax.restoration import Mask, Measurement
from ddaebm_jax.training.trained_run import load_run

# --- Tables -----------------------------------------------------------------------

COLUMNS = "height", "weight", "age"


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows whose columns follow each other, in units of their own."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    rows = np.stack([first, 2.0 * first, -first], axis=1)
    rows = 100.0 + 10.0 * (rows + 0.1 * rng.normal(size=rows.shape))
    lines = [COLUMNS, *rows.tolist()]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    (folder / "rows.csv").write_text(text + "\n")
    fields = {
        "data.path": folder / "rows.csv",
        "model.reference": 2,
        "diffusion.time_eps": None,
        "diffusion.keep_scale": True,
        "game.noise_at_data": True,
        "game.num_negatives": 2,
        "game.defensive": 0.5,
        "train.num_steps": 4,
    }
    flags = tiny(
        "configs/table.py", **{k.replace(".", "__"): v for k, v in fields.items()}
    )
    succeed(*flags, f"--workdir={folder / 'run'}")
    return folder / "run"


def read(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def test_empty_cells_are_filled_in_the_tables_units(table_run: Path, tmp_path: Path):
    lines = ["name,age,height,weight", "a,95,105,", "b,105,,90"]
    lines += ["c,nan,107.25,114", "d,100,100,100.0"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n\n")  # A blank line, too.
    flags = (
        f"--workdir={table_run}",
        f"--input={tmp_path / 'rows.csv'}",
        "--task=impute",
    )
    result = succeed("--mode=restore", *flags, f"--output={tmp_path / 'out.csv'}")
    assert result.out.strip() == str(tmp_path / "out.csv")
    header, *rows = read(tmp_path / "out.csv")
    assert header == ["name", "age", "height", "weight"]
    assert rows[3] == ["d", "100", "100", "100.0"] and rows[2][2] == "107.25"
    assert [row[0] for row in rows] == ["a", "b", "c", "d"]
    filled = np.array([row[1:] for row in rows], float)[:, [1, 2, 0]]
    expected = [[105, 110, 95], [95, 90, 105], [107.25, 114, 92.75], [100] * 3]
    np.testing.assert_allclose(filled, expected, atol=4.0)
    header, *cells = read(tmp_path / "out-intervals.csv")
    assert header == ["row", "column", "mean", "std", "5%", "95%"]
    assert [cell[:2] for cell in cells] == [
        ["0", "weight"],
        ["1", "height"],
        ["2", "age"],
    ]
    for _, _, mean, std, low, high in cells:
        assert float(low) < float(mean) < float(high) and 0 < float(std) < 8
    with np.load(tmp_path / "out.npz") as file:
        assert file["draws"].shape == (4, 16, 3)
        # Means are of more draws than are kept.
        np.testing.assert_allclose(file["draws"].mean(axis=1), filled, atol=4.0)
        assert np.abs(file["draws"].mean(axis=1) - filled).max() > 1e-3
        np.testing.assert_array_equal(file["draws"][3], [[100.0] * 3] * 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("height,weight,age\n1,2,3\n", "no cell is empty"),
        ("height,weight,age\n100,,100\n,,\n100,,100\n", "line 3 has no number"),
        ("age,weight,height\n100,99999,\n", "line 2, column weight is 99999, "),
        ("100,,100\n,,99999\n", "line 2, column column_2 is 99999, "),
        ("height,weight,age\n1,tall,3\n", "tall"),
        ("height,weight\n1,\n", "no column 'age'"),
    ],
)
def test_rows_that_cannot_be_filled(text, words, table_run: Path, tmp_path: Path):
    (tmp_path / "rows.csv").write_text(text)
    output = tmp_path / "out.csv"
    flags = (
        f"--workdir={table_run}",
        f"--input={tmp_path / 'rows.csv'}",
        "--task=impute",
    )
    assert_error(run("--mode=restore", *flags, f"--output={output}"), words)
    assert not output.exists()


# --- Images -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("digits") / "run"
    fields = TINY_UNET | {
        "model.reference": 2,
        "data.batch_size": 8,
        "train.num_steps": 2,
        "train.picture_every": 0,
        "train.tensorboard": False,
        "parallel.num_devices": 1,
        "evaluation.num_samples": 32,
        "evaluation.batch_size": 32,
    }
    succeed("--config=configs/digits.py", *flags_of(fields), f"--workdir={workdir}")
    return workdir


def pixels(path: Path, side: int = 8, num: int = 3) -> Path:
    drawn = np.random.default_rng(0).integers(0, 256, (num, side, side, 1), np.uint8)
    np.savez(path, x=drawn)
    return path


def test_the_default_method_follows_from_the_reference():
    empty = {"params": {}}
    without = Players(empty, empty, empty)
    assert restore._method(without, None) == "noise_space"
    with pytest.raises(InputError, match="needs a run whose energy has a reference"):
        restore._method(without, "averaged")
    found = reference.with_fitted(without, reference.empty(1, (8, 8, 1)))
    assert restore._method(found, None) == "averaged"
    wide = reference.with_fitted(without, reference.empty(1, (17, 17, 1)))
    assert restore._method(wide, None) == "noise_space"


@pytest.mark.parametrize("task", ["denoise", "superres", "deblur"])
def test_pixels_and_noise_are_in_the_networks_units(task, digits_run, tmp_path):
    """0 … 255 becomes −1 … 1, and σ, a share of the range, twice that."""
    given = pixels(tmp_path / "given.npz", side=4 if task == "superres" else 8)
    how = 0.1, None, 2, 1.0, 0
    _, _, measurement = restore._measured(load_run(digits_run), given, task, *how)
    np.testing.assert_allclose(measurement.std, [0.2] * 3, rtol=1e-6)
    with np.load(given) as file:
        np.testing.assert_allclose(measurement.y, file["x"] / 127.5 - 1.0, atol=1e-6)


TASKS = {
    "noise": ("--task=denoise", "--sigma=0.1", "--method=direct"),
    "hole": ("--task=inpaint", "--mask=center:4", "--error=0.05"),
    "small": ("--task=superres", "--method=particles"),
    "blur": ("--task=deblur", "--blur=0.5", "--method=particles"),
}


@pytest.mark.parametrize("name", TASKS)
def test_images_are_restored(name: str, digits_run: Path, tmp_path: Path):
    side = 4 if name == "small" else 8
    given = pixels(tmp_path / "given.npz", side)
    truth, output = pixels(tmp_path / "truth.npz"), tmp_path / "out.npz"
    names = [f"{i}.png" for i in range(3)]
    if name == "noise":
        names = ["a/x.png", "a/y.png", "b.png"]
        with np.load(given) as file:
            for image, path in zip(file["x"], names, strict=True):
                write_image(tmp_path / "folder" / path, image)
        given = tmp_path / "folder"
    flags = f"--workdir={digits_run}", f"--input={given}", f"--truth={truth}"
    flags += ("--num_draws=4", f"--output={output}")
    result = succeed("--mode=restore", *flags, *TASKS[name])
    assert result.out.strip() == str(output) and "PSNR of the mean" in result.err
    with np.load(output) as file:
        assert file["x"].shape == file["std"].shape == (3, 8, 8, 1)
        assert file["draws"].shape == (3, 4, 8, 8, 1)
        assert file["x"].dtype == file["draws"].dtype == np.uint8
        assert file["std"].max() > 0.0
        if name == "hole":
            known = np.ones((8, 8), bool)
            known[2:6, 2:6] = False
            spread = file["std"][..., 0].mean(axis=0)
            assert spread[known].mean() < spread[~known].mean()
    written = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")]
    assert sorted(map(str, written)) == names
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 2 * image.height  # Seven columns of three images.


def test_error_and_mix_are_measured(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a shorter search; the mix is what `averaged` is given."""
    given, draw = [], reference_draws.averaged
    measured = reference_draws.Mix(0.25, 0.3)

    def averaged(*inputs):
        given.append(inputs[-1])
        return draw(*inputs)

    monkeypatch.setattr(reference_draws, "averaged", averaged)
    monkeypatch.setattr(reference_draws, "best_mix", lambda *inputs: measured)
    short = functools.partial(restoring.Search, num_steps=2, num_moves=4)
    monkeypatch.setattr(restoring, "Search", short)
    file, outputs = pixels(tmp_path / "given.npz"), []
    for error in (None, 0.05):
        how = {"mask": "random:0.5", "num_draws": 4, "error": error}
        outputs.append(restore.restore(digits_run, file, "inpaint", **how))
    assert given == [measured, reference_draws.Mix()]
    first, second = (np.load(output)["draws"] for output in outputs)
    assert first.shape == second.shape == (3, 4, 8, 8, 1) and (first != second).any()


def test_masks(tmp_path: Path):
    hole = np.full((8, 8), 255, np.uint8)
    hole[2:4, 5] = 0
    Image.fromarray(hole).save(tmp_path / "hole.png")
    known = restore._mask(str(tmp_path / "hole.png"), 2, (8, 8, 3), 0)
    np.testing.assert_array_equal(
        known, np.stack([hole > 0] * 6).reshape(2, 3, 8, 8).transpose(0, 2, 3, 1)
    )
    centre = restore._mask("center:4", 1, (8, 8, 1), 0)
    assert not centre[0, 2:6, 2:6].any() and centre.sum() == 48
    drawn = restore._mask("random:0.25", 100, (8, 8, 3), 0)
    assert abs(drawn.mean() - 0.75) < 0.02 and (drawn == drawn[..., :1]).all()
    assert (drawn[0] != drawn[1]).any()


def test_images_are_restored_in_groups(monkeypatch: pytest.MonkeyPatch):
    def draw(experiment, variables, known, seed):
        return known.y[:, None] + np.zeros((1, 3, 1, 1, 1))

    monkeypatch.setattr(restore, "_GROUP", 2)
    y = np.linspace(-1.0, 1.0, 5 * 4, dtype=np.float32).reshape(5, 2, 2, 1)
    known = Measurement(Mask(np.ones(y.shape, bool)), y, np.full(5, 0.1, np.float32))
    model = experiment(gaussian_networks()), NO_VARIABLES, known
    found = restore._restored(model, draw, 3, 0)
    np.testing.assert_allclose(found.mean, (y + 1) * 127.5, rtol=1e-5)
    assert found.draws.shape == (5, 3, 2, 2, 1) and not found.std.any()


def test_files_of_one_stem_keep_their_whole_names(tmp_path: Path):
    write_images(tmp_path, np.zeros((2, 4, 4, 1), np.uint8), ("a.jpg", "a.bmp"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bmp.png", "a.jpg.png"]


def test_what_cannot_be_restored(digits_run: Path, table_run: Path, tmp_path: Path):
    given, other = pixels(tmp_path / "given.npz"), pixels(tmp_path / "two.npz", num=2)
    before = set(digits_run.glob("restored*"))
    Image.new("L", (9, 8)).save(tmp_path / "hole.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "none.png")
    Image.new("1", (8, 8)).save(tmp_path / "all.png")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")
    (tmp_path / "folder").mkdir()
    Image.new("L", (8, 9)).save(tmp_path / "folder" / "a.png")
    mask = f"--mask={tmp_path}"
    for words, *flags in [
        ("--sigma=-1.0: a share of the range", "--task=denoise", "--sigma=-1"),
        ("--sigma=25.0: a share of the range", "--task=denoise", "--sigma=25"),
        ("needs --sigma", "--task=denoise"),
        ("--task=inpaint needs --mask", "--task=inpaint"),
        ("--factor is for --task=superres", "--task=deblur", "--factor=2"),
        ("--truth is for --task=denoise or", "--task=impute", f"--truth={given}"),
        ("is for --task=denoise", "--task=superres", "--method=direct"),
        ("does not divide", "--task=superres", "--factor=3"),
        (
            "--error is for --method=averaged or noise_space, not particles",
            *("--task=deblur", "--method=particles", "--error=0.1"),
        ),
        ("--mask=center:9", "--task=inpaint", "--mask=center:9"),
        ("9×8 pixels; exactly 8×8", "--task=inpaint", f"{mask}/hole.png"),
        ("16 bits a channel", "--task=inpaint", f"{mask}/deep.png"),
        ("mode is RGBA; allowed", "--task=inpaint", f"{mask}/clear.png"),
        ("hides nothing", "--task=inpaint", f"{mask}/none.png"),
        ("hides everything", "--task=inpaint", f"{mask}/all.png"),
        ("DecompressionBombError", "--task=inpaint", f"{mask}/huge.png"),
        ("holds 2 images, and --input 3", "--task=deblur", f"--truth={other}"),
        ("a.png: 8×9 pixels; exactly", "--task=deblur", f"--input={tmp_path}/folder"),
        ("is for runs of data.name", "--task=deblur", f"--data_path={tmp_path}"),
        ("is for rows of a table", "--task=impute"),
    ]:
        flags = f"--workdir={digits_run}", f"--input={given}", *flags
        assert_error(run("--mode=restore", *flags), words)
    flags = f"--workdir={table_run}", f"--input={given}"
    result = run("--mode=restore", *flags, "--task=denoise", "--sigma=0.1")
    assert_error(result, "is for images")
    assert set(digits_run.glob("restored*")) == before
