"""What a run leaves for people: metrics, a progress line, pictures.

`metrics.jsonl` is always written; TensorBoard event files (clu) where TensorFlow is
installed.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ddaebm_jax.errors import InputError
from ddaebm_jax.files import open_regular, write_text_atomically

_LARGEST_METRICS = 2**30
# Most lines that travel with a checkpoint; more would make it too large to be read.
_MOST_WAITING = 10_000


class MetricsFile:
    """`metrics.jsonl`: one JSON object a report, in the order of steps.

    Lines that cannot be written, as on a full disk, are kept and written with the next;
    a checkpoint takes them along, in case the run is killed before.
    """

    def __init__(
        self, path: Path, resume_step: int, waiting: Sequence[Any] = ()
    ) -> None:
        """Opens the file for a run that goes on from `resume_step`.

        Lines of later steps, the final figures, and a line cut short by a crash are
        dropped: the run will write them again. Lines are never written twice.

        Args:
          path: the file.
          resume_step: the step of the restored state, 0 for a new run.
          waiting: what `flush` returned when that state was saved.
        """
        self._path = path
        self._waiting = _cut(path, resume_step) if path.exists() else []
        self._take_up(waiting, resume_step)
        self._file = path.open("ab", buffering=0)
        self._write_waiting()

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Appends a line: the step, then the values."""
        failing = bool(self._waiting)
        self._waiting.append(_line({"step": step, **values}))
        error = self._write_waiting()
        if error is not None and not failing:
            logging.warning(
                "%s cannot be written (%s); its lines are kept and tried again",
                self._path,
                error.strerror,
            )
        elif error is None and failing:
            logging.warning("%s is whole again", self._path)

    def flush(self) -> list[dict[str, Any]]:
        """Tries once more to write what waits, and syncs; returns what still waits."""
        if self._waiting and self._write_waiting() is None:
            logging.warning("%s is whole again", self._path)
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        return [json.loads(line) for line in self._waiting[:_MOST_WAITING]]

    def _take_up(self, waiting: Sequence[Any], step: int) -> None:
        """Takes lines up that waited, but for those that were written since."""
        lines = [_line(one) for one in waiting]
        written = set(self._waiting)
        if lines and self._path.exists():
            written.update(line + b"\n" for line in _read_lines(self._path))
        self._waiting += [
            line for line in lines if _is_kept(line, step) and line not in written
        ]

    def rewind(self, step: int) -> None:
        """Drops lines of later steps, written or waiting; needs no room on the disk."""
        self._waiting = [line for line in self._waiting if _is_kept(line, step)]
        try:
            self._waiting = _cut(self._path, step) + self._waiting
            file = self._path.open("ab", buffering=0)
        except (OSError, InputError) as error:
            logging.warning(
                "lines after step %d cannot be dropped (%s); they may come twice",
                step,
                error,
            )
            return
        self._file.close()
        self._file = file

    def close(self) -> None:
        """Closes the file; says how many lines could not be written."""
        self.flush()
        self._file.close()
        if self._waiting:
            logging.error(
                "%d lines of %s could not be written", len(self._waiting), self._path
            )

    def _write_waiting(self) -> OSError | None:
        """Writes what waits, line by line; returns what kept it from that."""
        whole = None
        try:
            whole = os.fstat(self._file.fileno()).st_size
            while self._waiting:
                _write_all(self._file, self._waiting[0])
                whole += len(self._waiting.pop(0))
        except OSError as error:
            if whole is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), whole)  # No line cut short.
            return error
        return None


def _cut(path: Path, step: int) -> list[bytes]:
    """Drops lines of later steps, final figures, and what is no line.

    They are the end of the file, which is cut off; that needs no room on the disk. A
    file damaged elsewhere is written anew.

    Returns:
      Lines that found no room when it was.
    """
    with open_regular(path, _LARGEST_METRICS) as file:
        data = file.read()
    kept = [line + b"\n" for line in data.split(b"\n") if _is_kept(line, step)]
    text = b"".join(kept)
    if data.startswith(text):
        os.truncate(path, len(text))
        return []
    try:
        write_text_atomically(path, text.decode())
        return []
    except OSError:
        whole = 0
        while kept and data.startswith(kept[0], whole):
            whole += len(kept.pop(0))
        os.truncate(path, whole)
        return kept


def _is_kept(text: bytes, step: int) -> bool:
    """Whether a run that goes on from a step keeps a line."""
    line = _parse(text)
    return (
        line is not None
        and line["step"] <= step
        and not any(name.startswith("final/") for name in line)
    )


def _line(values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _read_lines(path: Path) -> list[bytes]:
    with open_regular(path, _LARGEST_METRICS) as file:
        return file.read().split(b"\n")


def _parse(text: bytes) -> dict[str, Any] | None:
    """Returns a line of a metrics file, or None if it is none."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if whole else None


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    """Writes all or raises OSError; a full disk may take a part first."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a metrics file; a line cut short is left out."""
    lines = map(_parse, _read_lines(path))
    return [line for line in lines if line is not None]


def open_tensorboard(directory: Path) -> Any | None:
    """Returns clu's TensorBoard writer, or None, said once, without TensorFlow.

    TensorFlow's own devices are hidden first, so that it never takes the memory of
    a GPU on which JAX trains.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or it logs at import
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
        from clu import metric_writers
    except ImportError as error:
        logging.warning("no TensorBoard files (%s); metrics.jsonl has all", error)
        return None
    return metric_writers.AsyncMultiWriter(
        [metric_writers.SummaryWriter(str(directory))]
    )


def _open_progress(tensorboard: Any | None, total_steps: int) -> Any | None:
    """Returns clu's periodic report of progress to TensorBoard, if that is there.

    By seconds: clu's actions by steps want to be called after every single step.
    """
    if tensorboard is None:
        return None
    from clu import periodic_actions

    return periodic_actions.ReportProgress(
        num_train_steps=total_steps,
        every_steps=None,
        every_secs=60.0,
        writer=tensorboard,
    )


class Writers:
    """All the places where a run reports: metrics file, TensorBoard, progress."""

    def __init__(
        self,
        workdir: Path,
        resume_step: int,
        total_steps: int,
        tensorboard: bool,
        images_per_step: int | None = None,
        waiting: Sequence[Any] = (),
    ) -> None:
        """Opens them.

        Args:
          workdir: the run directory.
          resume_step: the step from which the run goes on.
          total_steps: of the whole run, for the time left.
          tensorboard: whether to write event files.
          images_per_step: the global batch, where it is of images.
          waiting: what `flush` returned when the state was saved.
        """
        self._metrics = MetricsFile(workdir / "metrics.jsonl", resume_step, waiting)
        self._tensorboard = open_tensorboard(workdir) if tensorboard else None
        self._progress = _open_progress(self._tensorboard, total_steps)
        self._total = total_steps
        self._images_per_step = images_per_step
        self._clock = (resume_step, time.monotonic())
        self._interactive = sys.stderr.isatty()

    def rewind(self, step: int) -> None:
        """Forgets what was reported after a step, to which the run goes back."""
        self._metrics.rewind(step)
        self.restart_clock(step)

    def flush(self) -> list[dict[str, Any]]:
        """Tries once more to write the lines of metrics that wait.

        Returns:
          Those that still wait, as JSON values: a checkpoint is to keep them.
        """
        return self._metrics.flush()

    def restart_clock(self, step: int) -> None:
        """Leaves what was done since the last report out of the next rate."""
        self._clock = (step, time.monotonic())

    def report(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes a report of training, with its rate, and the progress line."""
        last_step, last_time = self._clock
        now = time.monotonic()
        rate = (step - last_step) / max(now - last_time, 1e-9)
        self._clock = (step, now)
        rates = {"steps_per_second": rate}
        if self._images_per_step is not None:
            rates["images_per_second"] = rate * self._images_per_step
        self.scalars(step, {**values, **rates})
        if self._progress is not None:
            self._to_tensorboard(lambda: self._progress(step))
        left = (self._total - step) / max(rate, 1e-9)
        line = (
            f"step {step}/{self._total} ({step / self._total:.0%})  "
            f"{rate:.1f} steps/s  {format_seconds(left)} left  "
            f"energy {values['energy/loss']:+.3f}  "
            f"generator {values['generator/loss']:+.3f}"
        )
        if self._interactive:
            end = "\n" if step >= self._total else ""
            sys.stderr.write(f"\r\x1b[K{line}{end}")
            sys.stderr.flush()
        else:
            logging.info(line)

    def message(self, text: str) -> None:
        """Logs a line, clear of the progress line."""
        if self._interactive:
            sys.stderr.write("\r\x1b[K")
        logging.info(text)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes values to the metrics file, and the numbers to TensorBoard."""
        self._metrics.write(step, values)
        if self._tensorboard is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._to_tensorboard(lambda: self._tensorboard.write_scalars(step, numbers))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Shows a picture file in TensorBoard as well."""
        if self._tensorboard is None:
            return
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        images = {name: pixels[None]}
        self._to_tensorboard(lambda: self._tensorboard.write_images(step, images))

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes the distributions of numbers to TensorBoard."""
        if self._tensorboard is not None and values:
            self._to_tensorboard(
                lambda: self._tensorboard.write_histograms(step, dict(values))
            )

    def close(self) -> None:
        """Flushes and closes everything."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._to_tensorboard(self._tensorboard.close)

    def _to_tensorboard(self, write: Callable[[], None]) -> None:
        """Writes event files; when that fails there are none from there on.

        TensorFlow tells of a full disk by errors of many kinds, and late.
        """
        try:
            write()
        except Exception as error:
            logging.warning(
                "no TensorBoard files from here on (%s); metrics.jsonl has all",
                str(error).strip().splitlines()[:1] or type(error).__name__,
            )
            self._tensorboard, self._progress = None, None


class Silent:
    """Stands for `Writers` in the processes that write nothing."""

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def flush(self) -> list[dict[str, Any]]:
        """Returns that nothing waits."""
        return []

    def restart_clock(self, step: int) -> None:
        """Does nothing."""

    def report(self, step: int, values: Mapping[str, float | int]) -> None:
        """Does nothing."""

    def message(self, text: str) -> None:
        """Logs a line."""
        logging.info(text)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Does nothing."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Does nothing."""

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def format_seconds(seconds: float) -> str:
    """Returns a duration as people read it: `45s`, `12m 30s`, `3h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_report(report: Mapping[str, Any]) -> str:
    """Returns a report's figures as a two-column table."""
    rows = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}/{key}", item) for key, item in value.items()]
        else:
            rows.append((name, value))
    shown = [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in rows
    ]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)
