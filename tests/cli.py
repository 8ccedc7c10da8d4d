"""The command line, run many times from one import.

A child that has imported everything, but has not yet started a device, forks for each
command; so a command costs its own work and not the seconds of the imports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import quick

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "launch" / "main.py"

_FORKER = """
import json, os, runpy, sys, tempfile
sys.path.insert(0, {root!r})
from ddaebm_jax.commands import evaluate, inspect, ood, sample, score, train
for line in sys.stdin:
    argv = json.loads(line)
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = [{main!r}, *argv]
        runpy.run_path({main!r}, run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out.seek(0)
    err.seek(0)
    print(json.dumps([code, out.read(), err.read()]), flush=True)
"""


class Result(NamedTuple):
    """Exit status and output of a command."""

    code: int
    out: str
    err: str


def assert_error(result: Result, *words: str) -> None:
    """Assert that a command failed with one line that holds these words."""
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    for expected in words:
        assert expected in errors[0]


class CommandLine:
    """`launch/main.py`; see the module."""

    def __init__(self, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKER.format(root=str(ROOT), main=str(MAIN))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment() if env is None else env,
        )

    def __call__(self, *argv: object) -> Result:
        """Run one command to its end."""
        argv = tuple(map(str, argv))
        self._process.stdin.write(json.dumps(argv) + "\n")
        self._process.stdin.flush()
        return Result(*json.loads(self._process.stdout.readline()))

    def succeed(self, *argv: object) -> Result:
        """Run one command, which must succeed."""
        result = self(*argv)
        assert result.code == 0, result.err
        return result

    def __enter__(self) -> "CommandLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a child with so many virtual devices.

    It compiles fast, not to fast programs.
    """
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if "host_platform_device_count" not in flag
    ]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    flags.append(quick.FLAGS)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


def tiny(config: str, **fields: object) -> list[str]:
    """Return flags of a recipe made so small that it trains in a second."""
    small = {
        "model.mlp.hidden": "(8,8)",
        "model.mlp.x_widths": "(4,4)",
        "data.batch_size": 8,
        "train.num_steps": 40,
        "train.steps_per_dispatch": 10,
        "train.report_every": 10,
        "train.picture_every": 0,
        "train.checkpoint_every": 20,
        "train.tensorboard": False,
        "evaluation.num_samples": 100,
        "evaluation.num_projections": 10,
    }
    small.update({name.replace("__", "."): value for name, value in fields.items()})
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    return [f"--config={config}", *flags]
