"""What several commands share: flags, error lines, joined processes, output paths."""

import contextlib
import itertools
import logging as std_logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging

from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.evaluation import inference
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import preemption, processes

# Errors and ends.


def fail(message: str, at_once: bool = False) -> NoReturn:
    """Print `error: …` on one line, and end the program with status 2."""
    at_once = at_once or jax.distributed.is_initialized()
    leave(f"error: {' '.join(message.split())}", 2, at_once)


def leave(line: str, status: int, at_once: bool = True) -> NoReturn:
    """Print a line among the errors, and end the program with a status.

    `at_once` skips what runs at a program's end: saves under way, and JAX's wait of
    minutes for other processes. Those notice the missing heartbeat.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Gone, or None.
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{line}\n")  # In one piece: other threads may write there.
        sys.stderr.flush()
    if at_once:
        os._exit(status)
    sys.exit(status)


def show(text: str) -> None:
    """Print text to stdout, with escapes for characters that its encoding lacks.

    A reader that has left, as of `| head`, or a full disk fails no finished command.
    """
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            logging.warning("stdout cannot be written: %s", error)
        # Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Let an error of the user's end the program with one line."""
    try:
        yield
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")
    except (InputError, OSError) as error:
        logging.debug("raised here", exc_info=True)
        fail(str(error))
    except preemption.Stopped as stopped:
        logging.info("%s", stopped)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        leave("interrupted; what is saved is kept", 130)
    except UnicodeError as error:
        fail(f"{error}; save that text as UTF-8, or set PYTHONUTF8=1")
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        leave(traceback.format_exc(), 1)


def run(command: Callable[[flags.FlagValues], None], words: list[str]) -> None:
    """Run a command; `words` are the program's name and arguments that are no flags."""
    logging.get_absl_handler().addFilter(_is_for_users)
    sys.unraisablehook = _log_unraisable
    warnings.showwarning = _log_warning
    jax.config.update("jax_enable_x64", False)  # Models are float32.
    # Notebooks hand theirs to every program; matplotlib and TensorFlow fail without it.
    os.environ.pop("MPLBACKEND", None)
    with user_errors():
        if words[1:]:
            raise InputError(f"unexpected argument {words[1]!r}; flags start with --")
        command(flags.FLAGS)


def _log_unraisable(unraisable: Any) -> None:
    """Log what threads cannot raise; TensorStore's do hundreds after a failed save."""
    logging.debug("ignored in %r: %r", unraisable.object, unraisable.exc_value)


def _log_warning(message: Warning, *_: Any) -> None:
    """Log a library's warning in one line: scikit-learn's, pandas', Pillow's, …."""
    logging.warning("%s", one_line(message))


def _is_for_users(record: std_logging.LogRecord) -> bool:
    """Drop the information that libraries log: Orbax writes 50 lines a save.

    And stack traces: after a failed save dozens, of which one line of ours tells.
    """
    ours = Path(record.pathname).is_relative_to(Path(__file__).parents[1])
    return ours or (record.levelno > std_logging.INFO and not record.exc_info)


# For commands that use a trained run.
_USE_LESS_MEMORY = (
    "use a larger device or, with JAX_PLATFORMS=cpu, the host's memory; images are "
    "processed evaluation.batch_size of the config.json in --workdir at a time"
)


@contextlib.contextmanager
def out_of_memory_advice(advice: str = _USE_LESS_MEMORY) -> Iterator[None]:
    """Turn out-of-memory errors into input errors that say what to try."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        raise InputError(f"out of memory ({one_line(error)}); {advice}") from error


# Flags.


def define_trained_run(values: flags.FlagValues) -> None:
    """Define --workdir and --checkpoint."""
    define_workdir(values)
    text = "`latest`, `best` (lowest FID) or a checkpoint's step."
    flags.DEFINE_string("checkpoint", "latest", text, values)


class _PathParser(flags.ArgumentParser):
    """Parser of a path; see `paths.user_path`."""

    def parse(self, argument: str) -> str:
        return argument and str(user_path(argument))


def define_path(values: flags.FlagValues, name: str, text: str) -> None:
    """Define the flag of a path, which every flag of a file or a directory is."""
    parser, serializer = _PathParser(), flags.ArgumentSerializer()
    flags.DEFINE(parser, name, None, text, values, serializer)


def define_data_path(values: flags.FlagValues) -> None:
    """Define --data_path; see `trained_run.load_run`."""
    text = "Where the run's data lie now: its folder of images, or TFDS's directory."
    define_path(values, "data_path", text)


def define_workdir(values: flags.FlagValues) -> None:
    """Define --workdir, which must be given."""
    define_path(values, "workdir", "The run directory.")
    require(values, "workdir", "a run directory that --mode=train has made")


def require(values: flags.FlagValues, name: str, what: str) -> None:
    """Make a flag required."""
    text = f"this mode needs --{name}, {what}"
    flags.register_validator(name, bool, text, values)


def define_seed(values: flags.FlagValues, text: str) -> None:
    """Define --seed."""
    flags.DEFINE_integer("seed", 0, text, 0, 2**31 - 1, values)


def define_skip_corrupt(values: flags.FlagValues) -> None:
    """Define --skip_corrupt."""
    text = "Skip unusable images of a folder."
    flags.DEFINE_bool("skip_corrupt", False, text, values)


def define_inception_weights(values: flags.FlagValues) -> None:
    """Define --inception_weights; see `inception_settings`."""
    text = "Measure images by Inception features: a .pth, .npz or .safetensors file of "
    text += "weights; `published`, downloaded once; or `none`: skip these figures."
    define_path(values, "inception_weights", text)


def inception_settings(weights: str | None) -> dict[str, Any]:
    """Return what --inception_weights sets in the config's evaluation section."""
    if weights is None:
        return {}
    if weights == "none":
        return {"inception": False, "inception_weights": ""}
    path = "" if weights == "published" else weights
    return {"inception": True, "inception_weights": path}


# Several processes.


def define_distributed(values: flags.FlagValues) -> None:
    """Define the flags that `join_processes` reads."""
    text = "Run several processes; a cluster (TPU pod, Slurm) or the next three flags "
    text += "tell which. All get the same command, except for --process_id."
    flags.DEFINE_bool("distributed", False, text, values)
    text = "host:port of process 0, where no cluster tells it."
    flags.DEFINE_string("coordinator", "", text, values)
    text = "Number of processes."
    flags.DEFINE_integer("num_processes", None, text, 1, None, values)
    text = "Number of this process, from 0."
    flags.DEFINE_integer("process_id", None, text, 0, None, values)
    text = "Seconds of silence after which a process counts as dead."
    flags.DEFINE_integer("heartbeat_timeout", 100, text, 1, None, values)
    text = "Seconds to wait at the start for the others."
    # JAX itself aborts after 300.
    flags.DEFINE_integer("join_timeout", 270, text, 1, 290, values)


def join_processes(values: flags.FlagValues) -> None:
    """Join the processes of a --distributed command, before any use of devices."""
    names = "coordinator", "num_processes", "process_id", "heartbeat_timeout"
    if not values.distributed:
        for name in (*names, "join_timeout"):
            if values[name].present:
                raise InputError(f"--{name} is for --distributed; give that too")
        return
    # JAX itself would abort with a stack trace.
    message = (
        f"--distributed: not all processes have come within {values.join_timeout} s "
        "(--join_timeout); one has failed, see its output, was not started, or was "
        "given another --coordinator or --num_processes: start all of them again"
    )
    deadline = threading.Timer(values.join_timeout, fail, (message, True))
    deadline.daemon = True
    deadline.start()
    try:
        processes.join(processes.Processes(*(values[name].value for name in names)))
    finally:
        deadline.cancel()


# Outputs.


def claimed(path: Path, *companions: str, folder: bool = False) -> Path:
    """Make a new, empty file or folder, and return its path.

    It is `path`, or with -1, -2, … before its suffix if that exists; the same stem with
    the suffixes of `companions` ("": a folder) is free, too. Of processes that claim at
    once each gets another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count():
        number = f"-{count}" if count else ""
        candidate = path.with_name(f"{path.stem}{number}{path.suffix}")
        if any(candidate.with_suffix(suffix).exists() for suffix in companions):
            continue
        with contextlib.suppress(FileExistsError):
            candidate.mkdir() if folder else candidate.touch(exist_ok=False)
            return candidate


def check_output(output: str | Path | None, *suffixes: str) -> Path | None:
    """Return --output, if given; raise InputError unless it can be a new file."""
    if not output:
        return None
    path = user_path(output, "--output")
    if path.suffix not in suffixes:
        raise InputError(
            f"--output={path} ends in '{path.suffix}'; allowed: {', '.join(suffixes)}"
        )
    if path.exists():
        raise InputError(f"--output={path} exists already; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--output={path}: {path.parent} is not a directory")
    return path


def circumstances(experiment: Experiment, started: float) -> dict[str, Any]:
    """Return what every report says about how it was made, as JSON values."""
    mesh = inference.evaluation_mesh(experiment)
    return {
        "seconds": time.monotonic() - started,
        "device": f"{mesh.size} × {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__},
    }
