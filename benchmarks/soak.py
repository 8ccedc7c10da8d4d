"""Kills a small run again and again, and compares it with one that was left alone.

  python benchmarks/soak.py --cycles=200

Each cycle starts the run, or goes on with it, and sends SIGKILL, SIGTERM or SIGINT at
a random moment: one in five counted from the start of the process, the others from when
it trains, so that most hit steps and checkpoints. Whatever comes, every checkpoint must
hold, bit for bit, what the unbroken run held at that step. A run that has taken its
last step is let come to its end, and must have the same final figures; then the next
one begins.

A child that has imported everything forks for each cycle; so a cycle costs its own work
and not the seconds of the imports.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from timing import print_rows

from ddaebm_jax import config as config_lib
from ddaebm_jax.training import loop
from ddaebm_jax.training.checkpoints import NEWEST, Checkpoints
from ddaebm_jax.training.preemption import Stopped

_CYCLES = flags.DEFINE_integer("cycles", 200, "Signals sent.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and signals.")
_LONGEST = flags.DEFINE_float(
    "longest", 4.0, "Seconds after which a signal comes at the latest.", lower_bound=0.1
)

_PER_DISPATCH = 5
# Share of the signals whose moment counts from the start of the process.
_WHILE_STARTING = 0.2
# What a run prints before it compiles, or loads, its first steps.
_TRAINS = b"] compiling "
_SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.2, signal.SIGINT: 0.1}
# What each may end a run with. Before the first step SIGTERM is not caught: there is
# nothing to save. Where the run was through at that very moment it ends with 0.
_EXIT_CODES = {
    signal.SIGKILL: (-signal.SIGKILL, 0),
    signal.SIGTERM: (0, -signal.SIGTERM),
    signal.SIGINT: (130, 0),
}


def _config(checkpoint_every: int, keep: int):
    config = config_lib.base()
    config.update_from_flattened_dict(
        {
            "model.mlp.hidden": (8, 8),
            "model.mlp.x_widths": (4, 4),
            "data.batch_size": 8,
            "optimizer.ema_decay": 0.9,
            "train.num_steps": 400,
            "train.steps_per_dispatch": _PER_DISPATCH,
            "train.report_every": 20,
            "train.picture_every": 0,
            "train.checkpoint_every": checkpoint_every,
            "train.keep_checkpoints": keep,
            "train.tensorboard": False,
            "evaluation.num_samples": 100,
        }
    )
    return config


def _forked(action: Callable[[], None], log: Path) -> int:
    """Runs an action in a child; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        action()
        code = 0
    except Stopped as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _saved(workdir: Path) -> dict[int, dict[str, str]]:
    """Returns the checksums of all checkpoints, by step.

    They are read here without JAX, whose threads a process that forks must not have;
    runs verify them when they resume. A run that was killed may have begun to delete
    the oldest.
    """
    found = {}
    for step in Checkpoints(workdir, read_only=True).steps():
        path = workdir / NEWEST / str(step) / "info" / "metadata"
        if path.exists() or found:
            found[step] = json.loads(path.read_text())["checksums"]
    return found


def _reported(workdir: Path) -> list[dict]:
    """Returns the steps that were reported, and the final figures.

    Means of metrics are not compared: the first after a resume is of fewer steps.
    """
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith("final/")}
        for line in found
    ]


class _Soak:
    """The cycles and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def unbroken(self) -> None:
        """Trains without a signal, keeping a checkpoint of every dispatch."""
        workdir = self._folder / "unbroken"
        config = _config(_PER_DISPATCH, 10**6)
        pid = _forked(lambda: loop.train(config, workdir), self._log)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"the unbroken run failed:\n{self._log.read_text()}")
        self._expected, self._lines = _saved(workdir), _reported(workdir)
        self.counts["checkpoints of the unbroken run"] = len(self._expected)

    def cycle(self, run: int) -> bool:
        """Starts or goes on with a run and ends it; returns whether it is through.

        One that has taken all its steps is let come to its end, so that the next cycle
        finds one that trains.
        """
        workdir = self._folder / str(run)
        # Steps only: nothing is read while the run may be deleting it.
        before = max(Checkpoints(workdir, read_only=True).steps(), default=0)
        told = self._log.stat().st_size
        start: float | None = time.monotonic()
        pid = self._start(workdir)
        moment = self._random.uniform(0.05, _LONGEST.value)
        (kind,) = self._random.choices(list(_SIGNALS), list(_SIGNALS.values()))
        trains = False
        if self._random.random() > _WHILE_STARTING:
            start = None
        ended = 0
        while not ended and (start is None or time.monotonic() - start < moment):
            ended, status = os.waitpid(pid, os.WNOHANG)
            trains = trains or _TRAINS in self._log.read_bytes()[told:]
            if trains and start is None:
                start = time.monotonic()
            time.sleep(0.002)
        if not ended:
            os.kill(pid, kind)
            status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        by = "themselves" if ended else kind.name
        self.counts[f"ended by {by}, exit code {code}"] += 1
        self.counts["signals to runs that train"] += trains and not ended
        if code not in ((0,) if ended else _EXIT_CODES[kind]):
            raise RuntimeError(f"run {run} ended with {code}:\n{self._tail()}")
        reached = max(self._compare(workdir), default=0)
        self.counts["got further before they were ended"] += reached > before
        if reached < max(self._expected):
            return False
        if not ended and os.waitpid(self._start(workdir), 0)[1]:
            raise RuntimeError(f"run {run} could not be ended:\n{self._tail()}")
        self._compare(workdir)
        if _reported(workdir) != self._lines:
            raise RuntimeError(f"{workdir}: other steps or final figures were reported")
        self.counts["runs that reached their end, with their figures compared"] += 1
        return True

    def _start(self, workdir: Path) -> int:
        config = _config(_PER_DISPATCH, 3)
        return _forked(lambda: loop.train(config, workdir), self._log)

    def _compare(self, workdir: Path) -> dict[int, dict[str, str]]:
        """Returns what is saved; raises RuntimeError if some of it is another."""
        saved = _saved(workdir)
        for step, sums in saved.items():
            if sums != self._expected.get(step):
                raise RuntimeError(f"{workdir}: the state of step {step} is another")
        self.counts["checkpoints compared"] += len(saved)
        names = [path.name for path in (workdir / NEWEST).glob("*")]
        unfinished = not all(name.isdecimal() for name in names)
        self.counts["left a checkpoint unfinished"] += unfinished
        return saved

    def _tail(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-30:])


def main(argv: list[str]) -> None:
    """Soaks and prints; ends with an error at the first difference."""
    del argv
    logging.set_verbosity(logging.INFO)  # What runs print; see _TRAINS.
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        soak = _Soak(folder, _SEED.value)
        soak.unbroken()
        run = 0
        for _ in range(_CYCLES.value):
            if soak.cycle(run):
                shutil.rmtree(folder / str(run))
                run += 1
    rows = [("cycles", str(_CYCLES.value))]
    rows += [(name, str(count)) for name, count in soak.counts.items()]
    rows.append(("time", f"{time.monotonic() - start:.0f} s"))
    print_rows(rows)


if __name__ == "__main__":
    app.run(main)
