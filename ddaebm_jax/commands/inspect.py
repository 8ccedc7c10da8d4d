"""`--mode=inspect`: tell what a run holds, also while it trains; only reads."""

import contextlib
import datetime
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from ddaebm_jax import files
from ddaebm_jax.commands import common
from ddaebm_jax.errors import InputError
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import checkpoints as checkpoints_lib
from ddaebm_jax.training.checkpoints import BEST, DAMAGED, NEWEST, Checkpoints
from ddaebm_jax.training.run_directory import CONFIG_FILE, LOCK_FILE, read_config

# Bytes read of files that somebody else may have written.
_LARGEST_REPORT, _LARGEST_METRICS, _END_OF_METRICS = 2**20, 2**50, 2**16

_Row = tuple[str, str]


class Inspection(NamedTuple):
    """Text to print, and whether every checkpoint is intact."""

    text: str
    intact: bool


def inspect(workdir: str | Path) -> Inspection:
    """Describes a run and verifies its checkpoints; only reads.

    Raises:
      InputError: if it is not a run directory.
    """
    # Orbax asks JAX for its devices; no accelerator is to be taken from a run.
    jax.config.update("jax_platforms", "cpu")
    workdir = user_path(workdir, "--workdir")
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"--workdir={workdir} holds no {CONFIG_FILE}, so it is not a run "
            "directory; name one that --mode=train has made"
        )
    running, metrics = is_running(workdir), _last_metrics(workdir / "metrics.jsonl")
    checkpoints = _checkpoints(workdir, running)
    about = [("directory", str(workdir)), ("process", "running" if running else "none")]
    sections = {"run": about}
    try:
        config = read_config(workdir)
    except InputError as error:
        about.append(("config", f"unusable: {error}"))
    else:
        steps = [int(name.partition("/")[2]) for name in checkpoints]
        steps = f"{max([metrics.get('step', 0), *steps])} of {config.train.num_steps}"
        about += [("data", config.data.name), ("steps", steps)]
    sections["last metrics"] = _shown(metrics)
    sections["checkpoints"] = list(checkpoints.items())
    sections["set aside or unfinished"] = list(_leftovers(workdir, running))
    for path in sorted(workdir.glob("report*.json")):
        sections[path.name] = _report(path)
    intact = all(text.endswith("  intact") for text in checkpoints.values())
    return Inspection(_format(sections), intact)


def _format(sections: Mapping[str, list[_Row]]) -> str:
    filled = {title: rows for title, rows in sections.items() if rows}
    width = max(len(name) for rows in filled.values() for name, _ in rows)
    lines = []
    for title, rows in filled.items():
        lines += ["", title, *(f"  {name:<{width}}  {text}" for name, text in rows)]
    # What files say must not steer the terminal.
    return "\n".join(files.printable(line).rstrip() for line in lines[1:])


def is_running(workdir: Path) -> bool:
    """Whether a run holds the directory's lock."""
    try:
        with files.open_regular(workdir / LOCK_FILE, _LARGEST_REPORT) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, InputError) as error:  # Perhaps there is no lock to hold.
        return isinstance(error, BlockingIOError)
    return False


def _last_metrics(path: Path) -> dict[str, Any]:
    """Returns the last whole line of a metrics file; {} where there is none."""
    try:
        with files.open_regular(path, _LARGEST_METRICS) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_OF_METRICS))
            lines = file.read(_END_OF_METRICS).splitlines()
    except (OSError, InputError):
        return {}
    for text in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                return line
    return {}


def _shown(values: Mapping[str, Any]) -> list[_Row]:
    rows: list[_Row] = []
    for name, value in values.items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, item in inner.items():
            text = f"{item:.4g}" if isinstance(item, float) else str(item)[:200]
            rows.append((f"{name}/{key}" if key else str(name), text))
    return rows


def _report(path: Path) -> list[_Row]:
    try:
        report = json.loads(files.read_text(path, _LARGEST_REPORT))
        kept = {name: report[name] for name in ("step", "images") if name in report}
        return _shown({**kept, **report["figures"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [("unusable", str(error) or type(error).__name__)]


def _about(path: Path) -> str:
    try:
        size = sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())
        when = datetime.datetime.fromtimestamp(path.lstat().st_mtime)
    except OSError:
        return "gone meanwhile"
    return f"{size / 2**20:9.2f} MiB  {when:%Y-%m-%d %H:%M:%S}"


def _checkpoints(workdir: Path, running: bool) -> dict[str, str]:
    """Returns name → verdict; a running process deletes some, which are not shown."""
    rows = {}
    checkpoints = Checkpoints(workdir, read_only=True)
    for best, folder in ((False, NEWEST), (True, BEST)):
        for step in checkpoints.steps(best):
            verdict = "intact"
            try:
                checkpoints.verify(step, best)
            except checkpoints_lib.CheckpointError as error:
                time.sleep(0.5 if running else 0)  # It may be about to go.
                damaged = isinstance(error, checkpoints_lib.DamagedCheckpointError)
                verdict = f"{'DAMAGED' if damaged else 'NOT READ'}: {error}"
            if step in checkpoints.steps(best):
                about = _about(workdir / folder / str(step))
                rows[f"{folder}/{step}"] = f"{about}  {verdict}"
    return rows


def _leftovers(workdir: Path, running: bool) -> Iterator[_Row]:
    unfinished = "being written, or unfinished" if running else "unfinished"
    for folder in (NEWEST, BEST, DAMAGED):
        state = "set aside" if folder == DAMAGED else unfinished
        for path in sorted((workdir / folder).glob("*")):
            if not path.name.isdecimal():
                yield f"{folder}/{path.name}", f"{_about(path)}  {state}"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_workdir(values)


def run(values: flags.FlagValues) -> None:
    """Print what a run holds; end with status 1 unless its checkpoints are intact."""
    found = inspect(values.workdir)
    common.show(found.text)
    if not found.intact:
        sys.exit(1)
