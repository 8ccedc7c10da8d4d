"""What several commands share: flags, error lines, joined processes, output paths."""

import contextlib
import logging as std_logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging

from ddaebm_jax import sharding as parallel
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference
from ddaebm_jax.experiment import Experiment

# Errors and ends.


def fail(message: str) -> NoReturn:
    """Print `error: …` on one line, and end the program with status 2."""
    leave(_error_line(message), 2, at_once=jax.distributed.is_initialized())


def leave(line: str, status: int, at_once: bool = True) -> NoReturn:
    """Print a line among the errors, and end the program.

    Args:
      line: what is printed.
      status: the program's exit status.
      at_once: skip what runs at a program's end: saves under way, and JAX's wait of
        minutes for other processes. Those notice the missing heartbeat.
    """
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")  # In one piece: other threads may write there.
    sys.stderr.flush()
    if at_once:
        os._exit(status)
    sys.exit(status)


def _error_line(message: str) -> str:
    return f"error: {' '.join(message.split())}"


def run(action: Callable[[], None]) -> None:
    """Run an action; an error of the user's ends the program with one line."""
    logging.get_absl_handler().addFilter(_is_for_users)
    try:
        action()
    except (InputError, OSError) as error:
        logging.debug("raised here", exc_info=True)
        fail(str(error))
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        leave(traceback.format_exc(), 1)


def _is_for_users(record: std_logging.LogRecord) -> bool:
    """Drop the information that libraries log: Orbax writes 50 lines a save."""
    ours = Path(record.pathname).is_relative_to(Path(__file__).parents[1])
    return ours or record.levelno > std_logging.INFO


@contextlib.contextmanager
def out_of_memory_advice(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors into input errors that say what to try."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"out of memory ({reason}); {advice}") from error


@contextlib.contextmanager
def advice_for_trained_run(workdir: str) -> Iterator[None]:
    """Give out-of-memory advice for commands that use a trained run."""
    with out_of_memory_advice(
        "use a larger device or, with JAX_PLATFORMS=cpu, the host's memory; images are "
        f"processed evaluation.batch_size of {workdir}/config.json at a time"
    ):
        yield


# Flags.


def define_workdir(values: flags.FlagValues) -> None:
    """Define --workdir, which must be given."""
    flags.DEFINE_string("workdir", None, "The run directory.", flag_values=values)
    flags.register_validator(
        "workdir",
        bool,
        "this mode needs --workdir, a run directory that --mode=train has made",
        flag_values=values,
    )


def define_checkpoint(values: flags.FlagValues) -> None:
    """Define --checkpoint."""
    flags.DEFINE_string(
        "checkpoint",
        "latest",
        "`latest`, `best` (lowest FID), or the step of a checkpoint.",
        flag_values=values,
    )


def define_skip_corrupt(values: flags.FlagValues) -> None:
    """Define --skip_corrupt."""
    flags.DEFINE_bool(
        "skip_corrupt", False, "Skip unusable images of a folder.", flag_values=values
    )


def define_inception_weights(values: flags.FlagValues) -> None:
    """Define --inception_weights; see `inception_settings`."""
    flags.DEFINE_string(
        "inception_weights",
        None,
        "Measure images by Inception features, with the weights of this .pth, .npz or "
        ".safetensors file; `published`: the published weights, downloaded once; "
        "`none`: skip these figures.",
        flag_values=values,
    )


def inception_settings(weights: str | None) -> dict[str, Any]:
    """Return what --inception_weights sets in the config's evaluation section."""
    if weights is None:
        return {}
    if weights == "none":
        return {"inception": False, "inception_weights": ""}
    path = "" if weights == "published" else weights
    return {"inception": True, "inception_weights": path}


# Several processes.

_OF_DISTRIBUTED = (
    "coordinator",
    "num_processes",
    "process_id",
    "heartbeat_timeout",
    "join_timeout",
)


def define_distributed(values: flags.FlagValues) -> None:
    """Define the flags that `join_processes` reads."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Run several processes, found through a cluster (TPU pod, Slurm) or the next "
        "three flags. All get the same command, except for --process_id.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "host:port of process 0, where no cluster tells it.",
        flag_values=values,
    )
    for name, text, default, least, most in (
        ("num_processes", "Number of processes.", None, 1, None),
        ("process_id", "Number of this process, from 0.", None, 0, None),
        (
            "heartbeat_timeout",
            "Seconds of silence after which a process counts as dead, and the others "
            "end.",
            100,
            1,
            None,
        ),
        # JAX aborts after 300 s.
        ("join_timeout", "Seconds to wait at the start for the others.", 270, 1, 290),
    ):
        flags.DEFINE_integer(
            name,
            default,
            text,
            lower_bound=least,
            upper_bound=most,
            flag_values=values,
        )


def join_processes(values: flags.FlagValues) -> None:
    """Join the processes of a --distributed command; must precede any use of devices.

    Raises:
      InputError: for flags that do not fit together.
    """
    if not values.distributed:
        for name in _OF_DISTRIBUTED:
            if values[name].present:
                raise InputError(f"--{name} is for --distributed; give that too")
        return
    # JAX itself would abort with a stack trace.
    line = _error_line(
        f"--distributed: not all processes have come within {values.join_timeout} s "
        "(--join_timeout); one has failed, see its output, was not started, or was "
        "given another --coordinator or --num_processes: start all of them again"
    )
    deadline = threading.Timer(values.join_timeout, leave, (line, 2))
    deadline.daemon = True
    deadline.start()
    try:
        parallel.join(
            parallel.Processes(
                values.coordinator,
                values.num_processes,
                values.process_id,
                values.heartbeat_timeout,
            )
        )
    finally:
        deadline.cancel()


# Outputs.


def free_path(path: Path, *companions: str) -> Path:
    """Return `path`, or with -1, -2, … before its suffix if it exists.

    Args:
      path: the preferred path.
      companions: suffixes ("" of a folder) that must be free for the same stem.
    """
    candidate, count = path, 0
    while any(
        name.exists()
        for name in (candidate, *(candidate.with_suffix(s) for s in companions))
    ):
        count += 1
        candidate = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return candidate


def check_output(output: str | None, *suffixes: str) -> None:
    """Check that --output, if given, names a new file.

    Raises:
      InputError: if it exists, or has another suffix or no directory.
    """
    if not output:
        return
    path = Path(output)
    if path.suffix not in suffixes:
        raise InputError(
            f"--output={path} ends in '{path.suffix}'; allowed: {', '.join(suffixes)}"
        )
    if path.exists():
        raise InputError(f"--output={path} exists already; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--output={path}: {path.parent} is not a directory")


def circumstances(experiment: Experiment, started: float) -> dict[str, Any]:
    """Return what every report says about how it was made, as JSON values."""
    mesh = inference.evaluation_mesh(experiment)
    return {
        "seconds": time.monotonic() - started,
        "device": f"{mesh.size} × {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__},
    }
