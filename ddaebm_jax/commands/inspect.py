"""What a run directory holds, told without an accelerator and without writing.

It may be asked while the run is training in another process.
"""

import datetime
import fcntl
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags

from ddaebm_jax import config as config_lib
from ddaebm_jax import files
from ddaebm_jax.commands import common
from ddaebm_jax.errors import InputError
from ddaebm_jax.training import checkpoint_files, locking
from ddaebm_jax.training import checkpoints as checkpointing
from ddaebm_jax.training.run_directory import CONFIG_FILE, read_config

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Of files that somebody else may have written, at most so many bytes are read.
_LARGEST_REPORT = 2**20
_END_OF_METRICS, _LARGEST_METRICS = 2**16, 2**50
# Seconds that deleting a checkpoint may take once its files go.
_DELETION = 0.5

_Row = tuple[str, str]


class Inspection(NamedTuple):
    """What was found.

    Attributes:
      text: for people.
      intact: whether every checkpoint was found to be what was once saved.
    """

    text: str
    intact: bool


def inspect(workdir: str | Path) -> Inspection:
    """Looks at a run, and verifies its checkpoints; only reads.

    Args:
      workdir: the run directory.

    Raises:
      InputError: if it is not a run directory.
    """
    # Orbax asks JAX for its devices; no accelerator is to be taken from a run.
    jax.config.update("jax_platforms", "cpu")
    workdir = Path(workdir)
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"--workdir={workdir} holds no {CONFIG_FILE}, so it is not a run "
            "directory; name one that --mode=train has made"
        )
    process = running_process(workdir)
    checkpoints, intact = _checkpoints(workdir, process is not None)
    config, problem = _config(workdir)
    sections = {"run": [("directory", str(workdir)), ("process", process or "none")]}
    if config is None:
        sections["run"].append(("config", f"of no use: {problem}"))
    else:
        recipe, changed = _recipe(config, workdir)
        sections["run"] += [
            ("recipe", recipe),
            ("data", config.data.name),
            ("steps", f"{_reached(workdir)} of {config.train.num_steps}"),
        ]
        sections["fields changed"] = changed
    sections["last metrics"] = _shown(_last_metrics(workdir / "metrics.jsonl"))
    sections["checkpoints"] = checkpoints
    sections["set aside or unfinished"] = list(_leftovers(workdir, process is not None))
    for path in sorted(workdir.glob("report*.json")):
        sections[path.name] = _report(path)
    sections["pictures"] = list(_pictures(workdir))
    return Inspection(_formatted(sections), intact)


def _formatted(sections: Mapping[str, list[_Row]]) -> str:
    filled = {title: rows for title, rows in sections.items() if rows}
    width = max(len(name) for rows in filled.values() for name, _ in rows)
    lines = []
    for title, rows in filled.items():
        lines += ["", title, *(f"  {name:<{width}}  {text}" for name, text in rows)]
    # What files say is not to steer the terminal.
    plain = ("".join(c if c.isprintable() else "?" for c in line) for line in lines[1:])
    return "\n".join(line.rstrip() for line in plain)


def running_process(workdir: Path) -> str | None:
    """Returns who holds a run directory, in words; None: nobody, as far as is told."""
    try:
        file = files.open_regular(workdir / locking.LOCK_FILE, _LARGEST_REPORT)
    except (OSError, InputError):
        return None
    with file:
        content = file.read(4096)
        if not content:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            return None
        except BlockingIOError:
            return _holder(content)
        except OSError:  # A file system without locks.
            return f"unknown; {_holder(content)} was the last"


def _holder(content: bytes) -> str:
    try:
        found = json.loads(content)
        return f"{found['pid']} on {found['host']}, since {found['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "one that does not say which"


# Config and recipe.


def _config(
    workdir: Path,
) -> tuple[ml_collections.ConfigDict | None, str]:
    try:
        return read_config(workdir), ""
    except InputError as error:
        return None, str(error)


def _recipes() -> dict[str, ml_collections.ConfigDict]:
    """Returns the configs of this project's own recipes, by name."""
    found = {}
    for path in sorted(_CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.get_config()
    return found


def _recipe(config: ml_collections.ConfigDict, workdir: Path) -> tuple[str, list[_Row]]:
    """Returns the recipe in words, and the fields in which the run differs from it.

    A run does not record its recipe. Its folder is named after it by default; else it
    is the one with the fewest differences among those of the same data and model.
    """
    differences = {
        name: config_lib.differences(recipe, config)
        for name, recipe in _recipes().items()
    }
    named = workdir.resolve().parent.name
    alike = {
        name: changed
        for name, changed in differences.items()
        if not {"data.name", "model.name"} & changed.keys()
    }
    if named in differences:
        told, changed = f"{named}, by the folder's name", differences[named]
    elif alike:
        nearest = min(alike, key=lambda name: len(alike[name]))
        told, changed = f"{nearest} is the most similar", alike[nearest]
    else:
        changed = config_lib.differences(config_lib.base(), config)
        told = "unknown; compared with config.base()"
    rows = [(name, f"{old!r} → {new!r}") for name, (old, new) in changed.items()]
    return f"{told} ({len(rows)} fields changed)", rows


# Metrics, reports, pictures.


def _last_metrics(path: Path) -> dict[str, Any]:
    """Returns the last whole line of a metrics file; {} where there is none."""
    try:
        with files.open_regular(path, _LARGEST_METRICS) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_OF_METRICS))
            lines = file.read(_END_OF_METRICS).splitlines()
    except (OSError, InputError):
        return {}
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            return line
    return {}


def _shown(values: Mapping[str, Any]) -> list[_Row]:
    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]

    rows: list[_Row] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += [(f"{name}/{key}", short(item)) for key, item in value.items()]
        else:
            rows.append((str(name), short(value)))
    return rows


def _reached(workdir: Path) -> int:
    directory = workdir / checkpoint_files.NEWEST
    usable = _unusable(directory) is None
    kept = checkpoint_files.steps_in(directory) if usable else []
    return max([*kept, _last_metrics(workdir / "metrics.jsonl").get("step", 0)])


def _report(path: Path) -> list[_Row]:
    try:
        report = json.loads(files.read_text(path, _LARGEST_REPORT))
        kept = {name: report[name] for name in ("step", "images") if name in report}
        return _shown({**kept, **report["figures"]})
    except InputError as error:
        return [("of no use", str(error))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [("of no use", type(error).__name__)]


def _pictures(workdir: Path) -> Iterator[_Row]:
    for folder in (workdir, workdir / "samples"):
        found = sorted(folder.glob("*.png"))
        if found:
            name = "beside the config" if folder == workdir else folder.name
            yield name, f"{len(found)}, the last by name {found[-1].name}"


# Checkpoints.


def _size(path: Path) -> str:
    size = checkpoint_files.size_of(path)
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(size.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024**power:.{1 if power else 0}f} {units[power]}"


def _about(path: Path) -> str:
    try:
        when = datetime.datetime.fromtimestamp(path.lstat().st_mtime)
    except OSError:
        return "gone meanwhile"
    return f"{_size(path):>10}  {when:%Y-%m-%d %H:%M:%S}"


def _checkpoints(workdir: Path, running: bool) -> tuple[list[_Row], bool]:
    """Returns a row a checkpoint, and whether all are intact.

    A run that goes on deletes old ones meanwhile. One that is gone is not told; one
    that lacks a part is damaged only where no newer one is complete.
    """
    rows, intact = [], True
    for folder in (checkpoint_files.NEWEST, checkpoint_files.BEST):
        directory = workdir / folder
        problem = _unusable(directory)
        if problem is not None:
            rows.append((folder, problem))
            intact = False
            continue
        for step in checkpoint_files.steps_in(directory):
            problem = checkpoint_files.verify(workdir, folder, step)
            if problem is not None and running:  # It may just be being deleted.
                time.sleep(_DELETION)
            verdict = _verdict(directory / str(step), problem)
            if step not in checkpoint_files.steps_in(directory):
                continue
            intact = intact and problem is None
            told = f"{_about(directory / str(step))}  {verdict}"
            rows.append((f"{folder}/{step}", told))
        complete = checkpoint_files.steps_in(directory)
        for step in checkpoint_files.incomplete_in(directory):
            lost = step > max(complete, default=-1)
            verdict = "DAMAGED: it lacks a part" if lost else "partly deleted"
            intact = intact and not lost
            told = f"{_about(directory / str(step))}  {verdict}"
            rows.append((f"{folder}/{step}", told))
    return rows, intact


def _unusable(directory: Path) -> str | None:
    """Returns why a folder of checkpoints cannot be looked into; None: it can."""
    try:
        checkpoint_files.steps_in(directory)
        there = directory.is_dir()
    except OSError as error:
        return f"NOT READ: {error.strerror}"
    if there or not os.path.lexists(directory):  # There may be none yet.
        return None
    return "DAMAGED: not a folder"


def _verdict(path: Path, problem: checkpoint_files.CheckpointError | None) -> str:
    """Returns what is to be said of a checkpoint that `verify` has just looked at."""
    if isinstance(problem, checkpoint_files.DamagedCheckpointError):
        return f"DAMAGED: {problem}"
    if isinstance(problem, checkpoint_files.CheckpointReadError):
        return f"NOT READ: {problem}"
    if problem is not None:
        return f"OF ANOTHER FORMAT: {problem}"
    try:
        info = checkpoint_files.read_info(path.resolve())
    except checkpoint_files.CheckpointError:
        return "gone meanwhile"
    if "checksums" not in info:
        return "readable; of an older version, without checksums"
    return "intact"


def _leftovers(workdir: Path, running: bool) -> Iterator[_Row]:
    for folder in (checkpoint_files.NEWEST, checkpoint_files.BEST):
        if _unusable(workdir / folder) is not None:
            continue
        for path in checkpoint_files.unfinished_in(workdir / folder):
            state = "being written, or unfinished" if running else "unfinished"
            yield f"{folder}/{path.name}", f"{_about(path)}  {state}"
    aside = workdir / checkpointing.DAMAGED
    if aside.is_dir():
        for path in sorted(aside.iterdir()):
            yield f"{aside.name}/{path.name}", f"{_about(path)}  set aside"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_workdir(values)


def run(values: flags.FlagValues) -> None:
    """Print what a run holds; end with status 1 unless its checkpoints are intact."""
    found = inspect(values.workdir)
    print(found.text)
    if not found.intact:
        sys.exit(1)
