"""Metrics survive a resume without gaps or duplicates; pictures show something."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddaebm_jax import writers


def test_a_resume_drops_what_will_be_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = writers.MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.write(step, {"loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a crash
    second = writers.MetricsFile(path, 20)
    second.write(30, {"loss": -1.0})
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (10, 10.0),
        (20, 20.0),
        (30, -1.0),
    ]


def test_without_tensorflow_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real_import = builtins.__import__

    def no_tensorflow(name, *args, **kwargs):
        if name.split(".")[0] == "tensorflow":
            raise ImportError("no module named tensorflow")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tensorflow)
    output = writers.Writers(tmp_path, 0, 10, tensorboard=True)
    output.report(5, {"energy/loss": 1.0, "generator/loss": 2.0})
    output.picture(5, "none", tmp_path / "none.png")
    output.close()
    (line,) = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 5
    assert line["steps_per_second"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (60.0, "1m 00s"),
        (754.0, "12m 34s"),
        (11_100.0, "3h 05m"),
    ],
)
def test_durations_are_readable(seconds: float, text: str):
    assert writers.format_seconds(seconds) == text


def test_a_report_is_a_table():
    text = writers.format_report({"step": 3, "figures": {"auroc": 0.98765}})
    assert text.splitlines() == ["step           3", "figures/auroc  0.9877"]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), np.float32)


def test_the_picture_of_the_plane_shows_where_the_density_is(tmp_path: Path):
    """A bright density in one corner shows in that corner of the third panel."""
    points = np.random.default_rng(0).normal(size=(500, 2))
    log_density = np.full((40, 40), -50.0)
    log_density[30:, 30:] = 0.0  # large first and second coordinate: top right
    path = tmp_path / "plane.png"
    writers.plot_plane(path, points, points, log_density, 2.0, "title")
    pixels = _pixels(path)
    height, width = pixels.shape
    panel = pixels[int(0.2 * height) : int(0.95 * height), int(0.7 * width) :]
    middle = [n // 2 for n in panel.shape]
    quarters = {
        "top left": panel[: middle[0], : middle[1]],
        "bottom left": panel[middle[0] :, : middle[1]],
        "bottom right": panel[middle[0] :, middle[1] :],
        "top right": panel[: middle[0], middle[1] :],
    }
    bright = {
        name: (part < 250).mean() and part.mean() for name, part in quarters.items()
    }
    assert max(bright, key=bright.get) == "top right"


def test_other_pictures_are_drawn(tmp_path: Path):
    rng = np.random.default_rng(0)
    writers.plot_levels(tmp_path / "a.png", rng.normal(size=(5, 100, 2)), 3.0, "t")
    writers.plot_table(
        tmp_path / "b.png",
        rng.normal(size=(50, 4)),
        rng.normal(size=(50, 4)),
        {"inliers": rng.normal(size=50), "outliers": rng.normal(size=50) - 5},
        "t",
    )
    writers.plot_table(
        tmp_path / "c.png",
        rng.normal(size=(50, 1)),
        rng.normal(size=(50, 1)),
        {"inliers": np.zeros(50)},
        "t",
    )
    writers.plot_samples(tmp_path / "d.png", rng.normal(size=(50, 2)), 3.0, "t")
    for name in "abcd":
        assert _pixels(tmp_path / f"{name}.png").std() > 5
    assert not list(tmp_path.glob("*.partial"))
