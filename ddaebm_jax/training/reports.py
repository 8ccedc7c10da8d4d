"""What a run reports: metrics.jsonl, TensorBoard event files, and a progress bar."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from tqdm import tqdm

from ddaebm_jax import progress
from ddaebm_jax.diagnostics import energy_gaps_by_t
from ddaebm_jax.errors import one_line
from ddaebm_jax.evaluation import plots
from ddaebm_jax.files import open_regular
from ddaebm_jax.training.processes import is_first_process

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
_LARGEST_METRICS = 2**30
_DRAWN_BYTES = 2**23  # Of metrics that are drawn: about 10,000 lines.


class Reports:
    """The reports of a run: means of the metrics between two of them, and figures.

    Only the first of several processes writes and logs them. Nothing that cannot be
    written ends the run: it is warned of once.
    """

    def __init__(
        self, workdir: Path, config: ml_collections.ConfigDict, holds_images: bool
    ) -> None:
        """Opens the event files; reports the rate of images too if there are any."""
        self._writes = is_first_process()
        self._path = workdir / METRICS_FILE
        self._every, self._total = config.train.report_every, config.train.num_steps
        self._images_per_step = config.data.batch_size if holds_images else None
        self._warned = False
        self._sums: dict[str, np.ndarray] = {}
        self._steps = 0
        self._clock = 0, time.monotonic()
        self._bar: tqdm | None = None  # From the step that `rewind` tells.
        self._tensorboard: Any | None = None
        if self._writes and config.train.tensorboard:
            self._open_tensorboard(workdir)

    def rewind(self, step: int, evaluated: int | None = None) -> None:
        """Continue from a restored step: drop everything that will be reported again.

        Args:
          step: of the checkpoint.
          evaluated: the last step whose evaluation is kept; None: that step.
        """
        self._sums, self._steps = {}, 0
        self._clock = step, time.monotonic()
        self._close_bar()
        self._bar = progress.run_bar(self._total, step)
        if self._writes and self._path.exists():
            try:
                _cut(self._path, step, step if evaluated is None else evaluated)
            except OSError as error:
                self._warn(error)

    def restart_clock(self, step: int) -> None:
        """Leave the time since the last report out of the next rate."""
        self._clock = step, time.monotonic()
        self._bar.unpause()

    def add(self, step: int, length: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Take up the mean metrics of the last `length` steps; report if it is due."""
        for name, value in metrics.items():
            added = np.asarray(value, np.float64) * length
            self._sums[name] = self._sums.get(name, 0.0) + added
        self._steps += length
        self._bar.update(length)
        if step % self._every == 0 or step == self._total:
            mean = {name: value / self._steps for name, value in self._sums.items()}
            self._sums, self._steps = {}, 0
            self._report(step, energy_gaps_by_t(mean))

    def _report(self, step: int, values: dict[str, float]) -> None:
        if not self._writes:
            return
        last_step, last_time = self._clock
        self._clock = step, time.monotonic()
        rate = (step - last_step) / max(self._clock[1] - last_time, 1e-9)
        rates = {"steps_per_second": rate}
        if self._images_per_step is not None:
            rates["images_per_second"] = rate * self._images_per_step
        self.write(step, {**values, **rates})
        both = values["energy/loss"], values["generator/loss"]
        losses = "energy {:+.3f}  generator {:+.3f}".format(*both)
        self._bar.set_postfix_str(losses)
        if self._bar.disable:
            left = progress.duration((self._total - step) / rate)
            share = f"{step}/{self._total} ({step / self._total:.0%})"
            text = "step %s  %.1f steps/s  %s left  %s"
            logging.info(text, share, rate, left, losses)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics, and its numbers to TensorBoard."""
        if not self._writes:
            return
        try:
            _append(self._path, json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            self._warn(error)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}

        def write(writer: Any) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        self._to_tensorboard(write)

    def show(
        self, step: int, files: Mapping[str, Path], histograms: Mapping[str, np.ndarray]
    ) -> None:
        """Show picture files and distributions in TensorBoard."""

        def write(writer: Any) -> None:
            from PIL import Image

            # A picture that could not be drawn is missing.
            for name, path in ((n, p) for n, p in files.items() if p.exists()):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                writer.add_image(name, pixels, step, dataformats="HWC")
            for name, numbers in histograms.items():
                writer.add_histogram(name, numbers, step)

        self._to_tensorboard(write)

    def draw_curves(self, title: str) -> None:
        """Draw all metrics so far; a failure is only warned of."""
        if self._writes:
            path = self._path.with_name(CURVES_FILE)
            plots.write(path, plots.plot_curves, lines_to_draw(self._path), title)

    def close(self) -> None:
        """Write out the event files, and leave the bar as it is."""
        self._close_bar()
        self._to_tensorboard(lambda writer: writer.close())

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logging.warning(
                "%s cannot be written (%s); training goes on without these lines",
                self._path,
                error.strerror,
            )

    def _open_tensorboard(self, workdir: Path) -> None:
        try:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir))
        except Exception as error:
            self._without_tensorboard(error)

    def _to_tensorboard(self, action: Callable[[Any], None]) -> None:
        """Write event files; after a failure, of whatever kind, there are none."""
        if self._tensorboard is None:
            return
        try:
            action(self._tensorboard)
        except Exception as error:
            self._without_tensorboard(error)

    def _without_tensorboard(self, error: Exception) -> None:
        self._tensorboard = None
        logging.warning(
            "no TensorBoard files from here on (%s); %s has everything",
            *(one_line(error), METRICS_FILE),
        )


def _append(path: Path, line: str) -> None:
    """Append a whole line, or nothing: a full disk may take a part of it."""
    data = line.encode()
    with path.open("ab", buffering=0) as file:
        size, written = os.fstat(file.fileno()).st_size, 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        finally:
            if written < len(data):
                os.ftruncate(file.fileno(), size)


def _cut(path: Path, step: int, evaluated: int) -> None:
    """Cut the file at the first line of a later step, final figures, or no line."""
    size = 0
    with open_regular(path, _LARGEST_METRICS) as file:
        for line in file:
            if not _is_kept(line, step, evaluated):
                break
            size += len(line)
    os.truncate(path, size)


def lines_to_draw(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a file, if there is one, without damaged lines.

    Of a large one all lines with figures of evaluations, and every n-th of the others.
    """
    if not path.exists():
        return
    every = 1 + path.stat().st_size // _DRAWN_BYTES
    with open_regular(path, _LARGEST_METRICS) as file:
        for number, line in enumerate(file):
            figures = b'"evaluation/' in line or b'"final/' in line
            if figures or number % every == 0:
                with contextlib.suppress(ValueError, RecursionError):
                    values = json.loads(line)
                    if isinstance(values, dict) and isinstance(values.get("step"), int):
                        yield values


def _is_kept(line: bytes, step: int, evaluated: int) -> bool:
    try:
        values = json.loads(line)
        kinds = {name.split("/")[0] for name in values}
        last = evaluated if "evaluation" in kinds else step
        return line.endswith(b"\n") and values["step"] <= last and "final" not in kinds
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def format_report(report: Mapping[str, Any]) -> str:
    """Return a report's figures as a two-column table."""
    rows = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}/{key}", item) for key, item in value.items()]
        else:
            rows.append((name, value))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_rounded(value)}" for name, value in rows)


def _rounded(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_rounded, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
