"""Commands and functions in processes forked from one import, and tiny recipes.

A server that has imported everything, but has not yet started a device, forks for each
call; so a command costs its own work and not the seconds of the imports.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import quick

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "launch" / "main.py"

# Fields of recipes so small that they train in a second.
TINY = {
    "model.mlp.hidden": (8, 8),
    "model.mlp.x_widths": (4, 4),
    "data.batch_size": 8,
    "train.num_steps": 40,
    "train.steps_per_dispatch": 10,
    "train.report_every": 10,
    "train.picture_every": 0,
    "train.checkpoint_every": 20,
    "train.tensorboard": False,
    "evaluation.num_samples": 64,
    "evaluation.num_particles": 200,
    "evaluation.num_runs": 2,
}
TINY_UNET = {
    "model.reference": 0,
    "model.nz": 4,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.num_res_blocks": 1,
    "model.unet.attn_resolutions": (),
    "model.unet.z_emb_dim": 8,
    "model.unet.n_mlp": 0,
    "model.encoder.ngf": 4,
    "model.encoder.t_emb_dim": 8,
}

MODES = "train sample score restore evaluate ood export inspect ablate".split()
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([f"ddaebm_jax.commands.{mode}" for mode in MODES])

# Names of files that a program may read as something else than a name.
BAD_CHARACTERS = ["seed[0]", "hidden=[32,32],lr=5e-4", "a*b?", "[!x", "{a}", " a b"]
BAD_CHARACTERS += ["%s%", "é漢🙂", "new\nline", "-dash"]
BAD_CHARACTERS += ["a~b", "a~", "#a", "$HOME", "q'\""]


class Result(NamedTuple):
    """Exit status and output of a process."""

    code: int
    out: str
    err: str


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment of a child with virtual devices.

    It compiles fast, not to fast programs.
    """
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if "host_platform_device_count" not in flag
    ]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    flags.append(quick.flags())
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


def call(
    function: Callable[..., None],
    *argument_lists: list[Any],
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    seconds: float = 300.0,
) -> list[Result]:
    """Call a function of a module at once in one process per list of arguments.

    Output goes into pipes, which a limit on the size of files leaves alone. Processes
    that have not ended after `seconds` are killed.
    """
    processes, readers = [], []
    for arguments in argument_lists:
        out, err = (_server.Pipe(duplex=False) for _ in range(2))
        own = (out[1], err[1]), dict(env or environment()), cwd
        processes.append(
            _server.Process(target=_in_child, args=(*own, function, arguments))
        )
        processes[-1].start()
        out[1].close()
        err[1].close()
        readers += [out[0], err[0]]
    with futures.ThreadPoolExecutor(len(readers)) as pool:
        texts = pool.map(_read, readers)
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        return [Result(code, next(texts), next(texts)) for code in codes]


def _in_child(
    outputs: tuple[Connection, ...],
    env: dict[str, str],
    cwd: Path,
    function: Callable[..., None],
    arguments: list[Any],
) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    function(*arguments)


def _read(pipe: Connection) -> str:
    with pipe, open(pipe.fileno(), errors="replace", closefd=False) as file:
        return file.read()


def python(*argv: str) -> Result:
    """Run Python to its end, from nothing imported."""
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def main(*argv: str) -> None:
    """Run `launch/main.py` in this process."""
    sys.argv = [str(MAIN), *argv]
    runpy.run_path(str(MAIN), run_name="__main__")


def run(*argv: object, **kwargs: Any) -> Result:
    """Run one command to its end."""
    (result,) = call(main, [str(argument) for argument in argv], **kwargs)
    return result


def succeed(*argv: object, **kwargs: Any) -> Result:
    """Run one command, which must succeed."""
    result = run(*argv, **kwargs)
    assert result.code == 0, result.err
    return result


def error_of(result: Result) -> str:
    """Return the one error line of a command that failed."""
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err, result.err
    return errors[0]


def assert_error(result: Result, *words: str) -> None:
    """Assert that a command failed with one line that holds these words."""
    error = error_of(result)
    for expected in words:
        assert expected in error


def dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by their names in the config; `a__b` stands for `a.b`."""
    return {name.replace("__", "."): value for name, value in fields.items()}


def flags_of(fields: Mapping[str, Any]) -> list[str]:
    """Return flags that change fields of a config."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def tiny(recipe: str, **fields: object) -> list[str]:
    """Return the flags of a recipe that is made tiny, and then changed."""
    return [f"--config={recipe}", *flags_of(TINY | dotted(fields))]


def report(workdir: Path, name: str = "report.json") -> dict[str, Any]:
    """Return a report of a run."""
    return json.loads((workdir / name).read_text())


def files(workdir: Path) -> dict[Path, tuple[bytes, int]]:
    """Return what all files hold, and when they were written."""
    paths = (path for path in workdir.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
