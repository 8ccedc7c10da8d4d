"""Metrics survive a resume without gaps or duplicates, and no report ends a run."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from failing import full_disk
from PIL import Image
from runs import small, steps

from ddaebm_jax import progress
from ddaebm_jax.training.reports import Reports, format_report

METRICS = {
    "energy/loss": np.array(1.0),
    "energy/real": np.array(2.0),
    "energy/fake": np.array(3.0),
    "energy/gap_sum_by_t": np.array([1.0, 0.0]),
    "energy/share_by_t": np.array([0.5, 0.0]),
    "generator/loss": np.array(2.0),
}


def opened(workdir: Path, holds_images: bool = False, **fields: object) -> Reports:
    found = Reports(workdir, small(**fields), holds_images)
    found.rewind(0)
    return found


def test_a_resume_drops_what_will_be_written_again(tmp_path: Path):
    path, found = tmp_path / "metrics.jsonl", opened(tmp_path)
    for step in (10, 20, 30):
        found.write(step, {"loss": float(step)})
        found.write(step, {"evaluation/auroc": 0.5})
    found.write(30, {"final/auroc": 0.5})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # Cut short by a crash.
    whole = path.read_text()
    for step, evaluated, expected in (
        (30, 30, [10, 10, 20, 20, 30, 30]),
        (30, 20, [10, 10, 20, 20, 30]),
        (20, 10, [10, 10, 20]),
        (0, 0, []),
    ):
        path.write_text(whole)
        found.rewind(step, evaluated)
        assert steps(tmp_path) == expected
    path.unlink()
    found.rewind(0)
    assert not path.exists()


def test_lines_of_a_full_disk_are_dropped_whole_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    found = opened(tmp_path)
    found.write(10, {"loss": 1.0})
    with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 5):
        found.write(20, {"loss": 1.0})
        found.write(30, {"loss": 1.0})
    found.write(40, {"loss": 1.0})
    assert steps(tmp_path) == [10, 40]
    warnings = [m for m in caplog.messages if "cannot be written" in m]
    assert len(warnings) == 1 and "File too large" in warnings[0]


def test_a_report_holds_means_gaps_by_t_and_rates(tmp_path: Path):
    found = opened(tmp_path, holds_images=True, train__report_every=4)
    found.add(1, 1, METRICS | {"energy/loss": np.array(4.0)})
    found.add(4, 3, METRICS)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 4 and line["energy/loss"] == 1.75
    assert line["energy/gap_t0"] == 2.0
    assert "energy/gap_t1" not in line  # No example had it.
    assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"])


def test_tensorboard_shows_numbers_pictures_and_histograms(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from tensorboard.backend.event_processing import event_accumulator

    found = opened(tmp_path, train__report_every=1, train__tensorboard=True)
    found.add(1, 1, METRICS)
    Image.new("L", (3, 2)).save(tmp_path / "picture.png")
    found.show(1, {"picture": tmp_path / "picture.png"}, {"energies": np.arange(9.0)})
    found.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"energy/loss", "steps_per_second"} <= {*tags["scalars"], *tags["tensors"]}
    assert any("picture" in tag for tag in (*tags["images"], *tags["tensors"]))
    assert any("energies" in tag for tag in (*tags["histograms"], *tags["tensors"]))
    assert "no TensorBoard files" not in caplog.text

    found.show(2, {"picture": tmp_path / "missing.png"}, {})  # Could not be drawn.
    assert "no TensorBoard files" not in caplog.text
    (tmp_path / "broken.png").touch()
    found.show(2, {"picture": tmp_path / "broken.png"}, {})
    found.write(2, {"energy/loss": 1.0})
    assert caplog.text.count("no TensorBoard files from here on (") == 1
    assert steps(tmp_path) == [1, 2]


class Terminal(io.StringIO):
    """A terminal; `gone` is one that was closed."""

    gone = False

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        if self.gone:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("stream", "kernel"),
    [(Terminal(), False), (io.StringIO(), False), (None, False), (io.StringIO(), True)],
)
def test_the_bar_needs_a_terminal_or_a_notebook_and_a_run_outlives_it(
    stream: Any, kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout" if kernel else "stderr", stream)
    if kernel:
        shell = SimpleNamespace(kernel=object())
        ipython = SimpleNamespace(get_ipython=lambda: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
    found = opened(tmp_path, train__report_every=1)
    found.add(1, 1, METRICS)
    if stream is not None:
        shown = kernel or isinstance(stream, Terminal)
        assert ("| 1/24 [" in stream.getvalue()) is shown
        assert ("energy +1.000" in stream.getvalue()) is shown
        stream.gone = True
    found.add(2, 1, METRICS)
    found.close()
    assert steps(tmp_path) == [1, 2]


def test_the_bar_goes_back_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    found = opened(tmp_path, train__report_every=1)
    for _ in range(2):
        found.rewind(8)
        found.add(9, 1, METRICS)
        assert "| 9/24 [" in terminal.getvalue().rpartition("\r")[2]
    found.close()


def test_rates_leave_out_steps_of_earlier_runs_and_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal, now = Terminal(), [1_000.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    found = opened(tmp_path, train__report_every=1, train__num_steps=100)
    found.rewind(80)
    now[0] += 90.0  # Compilation.
    found.restart_clock(80)
    for step in (81, 82, 83):
        now[0] += 0.5
        found.add(step, 1, METRICS)
    last = terminal.getvalue().rpartition("\r")[2]
    assert "2.00step/s" in last and "00:08<" not in last and "<00:08" in last
    found.close()


def test_a_phase_says_what_begins_and_how_long_it_took(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level("INFO")
    times = iter([0.0, 12.34, 20.0, 20.5])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    for text in ("long", "short"):
        with progress.phase(text, hint="1 to 9 s" if text == "long" else ""):
            pass
    expected = ["long (1 to 9 s) ...", "long: done in 12.3 s", "short ..."]
    assert caplog.messages == expected


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_loop_shows_how_far_it_is_and_one_inside_it_nothing(
    stream: io.StringIO,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    caplog.set_level("INFO")
    with progress.loop_bar(50_000, "image", "drawing") as bar:
        for _ in range(3):
            now[0] += 20.0
            bar.update(5_000)
            with progress.loop_bar(9, "row", "inside") as inner:
                now[0] += 1.0
                inner.update(9)
    shown = isinstance(stream, Terminal)
    assert ("drawing:  30%" in stream.getvalue()) is shown
    assert "inside" not in stream.getvalue()
    line = "drawing: 10,000 of 50,000 images, 02:44 left"
    assert caplog.messages == ([] if shown else [line])


def test_a_report_is_a_table():
    text = format_report({"step": 3, "figures": {"auroc": 0.98765}})
    assert text.splitlines() == ["step           3", "figures/auroc  0.9877"]
