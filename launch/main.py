"""Trains a DDAEBM, or samples, scores, evaluates and detects with a trained one.

python launch/main.py --config=configs/gaussians25.py
python launch/main.py --config=configs/gaussians25.py --config.game.gamma=0.01
python launch/main.py --mode=sample --workdir=runs/gaussians25/… --num_samples=1000
python launch/main.py --mode=score --workdir=… --input=rows.csv
python launch/main.py --mode=score --workdir=… --input=folder_of_images
python launch/main.py --mode=evaluate --workdir=… --checkpoint=best
python launch/main.py --mode=evaluate --workdir=… --inception_weights=weights.pth
python launch/main.py --mode=ood --workdir=… --in=test --out=svhn_cropped,cifar100
python launch/main.py --mode=inspect --workdir=…
"""

import contextlib
import functools
import logging as std_logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from ddaebm_jax.commands import command_line
from ddaebm_jax.config import flags as config_flags
from ddaebm_jax.errors import InputError, OutOfStepError

_CONFIG = config_flags.define_config_flag(
    "The recipe, for --mode=train; --config.a.b=c changes a field."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory. Default: runs/<config>/<time>."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "score", "evaluate", "ood", "inspect"],
    "What to do. inspect: tell what a run holds, and verify its checkpoints.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "`latest`, `best` (by FID), or the step of one."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    None,
    "How many samples to draw. Default: 10000, of images 100; in evaluation the "
    "config's.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the samples, or of what --mode=ood draws.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train with several processes, which a cluster (TPU pod, Slurm) or the next three "
    "flags tell of each other. All get the same command, but for --process_id.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0, where no cluster tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds after which a silent process is taken for dead, and the others end.",
    lower_bound=1,
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout",
    270,
    "Seconds for which a process waits at its start for the others.",
    lower_bound=1,
    upper_bound=290,  # JAX aborts at 300.
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "What to score: CSV or NPZ rows; a folder or an NPZ of images. Of evaluate: "
    "images to measure in the place of samples.",
)
_INCEPTION_WEIGHTS = flags.DEFINE_string(
    "inception_weights",
    None,
    "Measure images by Inception's features, with weights of this .pth, .npz or "
    ".safetensors file; `published`: the published ones, downloaded once; `none`: "
    "leave it out.",
)
_PREPROCESSING = flags.DEFINE_enum(
    "preprocessing",
    None,
    ["tf", "pytorch_fid"],
    "What goes into Inception. Default: the config's.",
)
_REFERENCE = flags.DEFINE_enum(
    "reference",
    None,
    ["train", "test"],
    "Images that samples are held against. Default: the config's.",
)
_REFERENCE_PATH = flags.DEFINE_string(
    "reference_path", None, "File of their statistics, made where it is not there."
)
_IN = flags.DEFINE_string(
    "in", "test", "Inliers: `test`, or as in --out (of one name)."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Outliers, separated by commas: names of built-in sets (inverted, shuffled, "
    "noise, photos, digits, held_out_classes), folders, NPZ files, TFDS names.",
)
_BASELINES = flags.DEFINE_bool(
    "baselines", False, "Fit four standard detectors to the training pixels, too."
)
_NUM_DRAWS = flags.DEFINE_integer(
    "num_draws", 10, "Noise draws of the energy over t.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer(
    "limit", 10_000, "Most images of a set; 0: all.", lower_bound=0
)
_SKIP_CORRUPT = flags.DEFINE_bool(
    "skip_corrupt", False, "Leave images to score out that are of no use."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write. Default: in --workdir.")


# Flags that only some modes read; elsewhere they would be ignored.
_MODES_OF_FLAG = {
    "config": ("train",),
    "distributed": ("train", "evaluate", "ood"),
    "coordinator": ("train", "evaluate", "ood"),
    "num_processes": ("train", "evaluate", "ood"),
    "process_id": ("train", "evaluate", "ood"),
    "heartbeat_timeout": ("train", "evaluate", "ood"),
    "join_timeout": ("train", "evaluate", "ood"),
    "checkpoint": ("sample", "score", "evaluate", "ood"),
    "num_samples": ("sample", "evaluate"),
    "seed": ("sample", "ood"),
    "input": ("score", "evaluate"),
    "skip_corrupt": ("score", "evaluate", "ood"),
    "output": ("sample", "score"),
    "inception_weights": ("train", "evaluate"),
    "preprocessing": ("evaluate",),
    "reference": ("evaluate",),
    "reference_path": ("evaluate",),
    "in": ("ood",),
    "out": ("ood",),
    "baselines": ("ood",),
    "num_draws": ("ood",),
    "limit": ("ood",),
}


def _check_flags() -> None:
    for name, modes in _MODES_OF_FLAG.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            raise InputError(
                f"--{name} is for --mode={' or '.join(modes)}; --mode={_MODE.value} "
                "would ignore it: leave it out"
            )
    if _MODE.value != "evaluate":
        return
    # Images from elsewhere are of no checkpoint, and there are as many as there are.
    ignored = ("num_samples", "checkpoint") if _INPUT.value else ("skip_corrupt",)
    for name in ignored:
        if flags.FLAGS[name].present:
            raise InputError(
                f"--{name} has no meaning {'with' if _INPUT.value else 'without'} "
                "--input: leave it out"
            )


def _join_processes() -> None:
    names = (
        "coordinator",
        "num_processes",
        "process_id",
        "heartbeat_timeout",
        "join_timeout",
    )
    given = [name for name in names if flags.FLAGS[name].present]
    if not _DISTRIBUTED.value:
        if given:
            raise InputError(f"--{given[0]} is for --distributed; give that too")
        return
    if _MODE.value == "train" and not _WORKDIR.value:
        raise InputError("--distributed needs --workdir, the same for all processes")
    from ddaebm_jax import sharding as parallel

    # JAX itself would abort, with a trace of its insides.
    line = command_line.error_line(
        f"--distributed: not all processes have come within {_JOIN_TIMEOUT.value} s "
        "(--join_timeout); one has failed, see its output, was not started, or was "
        "given another --coordinator or --num_processes: start all of them again"
    )
    deadline = threading.Timer(_JOIN_TIMEOUT.value, command_line.leave, (line, 2))
    deadline.daemon = True
    deadline.start()
    try:
        parallel.join(
            parallel.Processes(
                _COORDINATOR.value,
                _NUM_PROCESSES.value,
                _PROCESS_ID.value,
                _HEARTBEAT_TIMEOUT.value,
            )
        )
    finally:
        deadline.cancel()


def _run() -> None:
    _check_flags()
    if _MODE.value == "inspect":
        _inspect()
        return
    if _MODE.value == "train":
        _train(_checked_config())
        return
    _join_processes()
    if not _WORKDIR.value:
        raise InputError(f"--mode={_MODE.value} needs --workdir, a run directory")
    advice = (
        "use a larger device or, with JAX_PLATFORMS=cpu, the host's memory; of images, "
        f"evaluation.batch_size of {_WORKDIR.value}/config.json are taken at a time"
    )
    with _memory_suffices(advice):
        _use(_WORKDIR.value)


def _use(workdir: str) -> None:
    """Runs a mode that uses what has been trained."""
    from ddaebm_jax import sharding as parallel
    from ddaebm_jax.commands import modes
    from ddaebm_jax.commands import ood as detection
    from ddaebm_jax.training import reports

    checkpoint = _CHECKPOINT.value
    if _MODE.value == "sample":
        print(
            modes.sample(
                workdir, _NUM_SAMPLES.value, _SEED.value, _OUTPUT.value, checkpoint
            )
        )
    elif _MODE.value == "score":
        if not _INPUT.value:
            raise InputError(
                "--mode=score needs --input: a CSV or NPZ of rows, or a folder or NPZ "
                "of images"
            )
        output, skip = _OUTPUT.value, _SKIP_CORRUPT.value
        print(modes.score(workdir, _INPUT.value, output, skip, checkpoint))
    elif _MODE.value == "evaluate":
        report = modes.evaluate(
            workdir,
            checkpoint,
            _INPUT.value,
            _SKIP_CORRUPT.value,
            num_samples=_NUM_SAMPLES.value,
            preprocessing=_PREPROCESSING.value,
            reference=_REFERENCE.value,
            reference_path=_REFERENCE_PATH.value,
            **_inception_settings(),
        )
        if parallel.is_first_process():
            print(reports.format_report(report))
    else:
        folder = detection.detect(
            workdir,
            [name.strip() for name in (_OUT.value or "").split(",") if name.strip()],
            _IN.value,
            checkpoint,
            _SEED.value,
            _NUM_DRAWS.value,
            _BASELINES.value,
            _LIMIT.value,
            _SKIP_CORRUPT.value,
        )
        if parallel.is_first_process():
            print(f"{folder}\n{(folder / 'report.txt').read_text().rstrip()}")


def _checked_config() -> Any:
    """Returns the config to train by; it is checked before anything is waited for."""
    if _CONFIG.value is None:
        raise InputError(
            "--mode=train needs --config, for example --config=configs/gaussians25.py"
        )
    from ddaebm_jax import config as config_lib

    config = _CONFIG.value
    config.evaluation.update(_inception_settings())
    config_lib.validate(config)
    return config


def _train(config: Any) -> None:
    """Trains, and prints where to and the figures."""
    _join_processes()
    from ddaebm_jax import sharding as parallel
    from ddaebm_jax.training import loop as train
    from ddaebm_jax.training import preemption as interruption
    from ddaebm_jax.training import reports

    workdir = _WORKDIR.value or _new_workdir()
    advice = (
        f"lower data.batch_size ({config.data.batch_size}), or keep it and raise "
        f"optimizer.accumulate ({config.optimizer.accumulate}), or on images set "
        f"model.remat to blocks ({config.model.remat}), or narrow the networks"
    )
    try:
        with _memory_suffices(advice):
            report = train.train(config, workdir)
    except OutOfStepError as error:
        command_line.fail(str(error), at_once=True)
    except interruption.Interrupted as error:
        logging.info("%s", error)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        command_line.leave("left at once; the newest checkpoint is kept", 130)
    if parallel.is_first_process():
        print(f"{workdir}\n{reports.format_report(report)}")


# Seconds for which a process that fails waits for the others to fail, too.
_GRACE = 10


def _fail_among_others(message: str) -> NoReturn:
    """Ends one of several processes with an error.

    What one of them meets, mostly all meet: then they part in order. Otherwise this one
    leaves after a moment, and the others learn of it as of any that is lost.
    """
    command_line.say(command_line.error_line(message))
    parting = threading.Thread(target=_part, daemon=True)
    parting.start()
    parting.join(_GRACE)
    sys.stdout.flush()
    os._exit(2)


def _part() -> None:
    import jax

    with contextlib.suppress(Exception):  # That they cannot be reached is known.
        jax.distributed.shutdown()


@contextlib.contextmanager
def _memory_suffices(advice: str) -> Iterator[None]:
    """Makes an input error of one that comes of too little memory.

    Args:
      advice: what to try.
    """
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        raise InputError(
            f"memory does not suffice ({' '.join(str(error).split())[:200]}); {advice}"
        ) from error


def _inspect() -> None:
    """Prints what a run holds; ends with status 1 unless all are intact."""
    if not _WORKDIR.value:
        raise InputError("--mode=inspect needs --workdir, a run directory")
    from ddaebm_jax.commands import inspect as inspection

    found = inspection.inspect(_WORKDIR.value)
    print(found.text)
    if not found.intact:
        raise SystemExit(1)


def _inception_settings() -> dict[str, Any]:
    """What --inception_weights says of the config's evaluation section."""
    if _INCEPTION_WEIGHTS.value is None:
        return {}
    if _INCEPTION_WEIGHTS.value == "none":
        return {"inception": False, "inception_weights": ""}
    published = _INCEPTION_WEIGHTS.value == "published"
    path = "" if published else _INCEPTION_WEIGHTS.value
    return {"inception": True, "inception_weights": path}


def _new_workdir() -> str:
    return str(
        Path("runs") / config_flags.recipe_name() / time.strftime("%Y%m%d-%H%M%S")
    )


def _without_chatter(record: std_logging.LogRecord) -> bool:
    """Drops libraries' notes on their insides; warnings pass, but for these."""
    message = record.getMessage()
    if "Given directory is read only" in message:
        return False  # Reading is all that was asked for.
    if "Setting work unit notes" in message:
        return False  # clu's progress; our own line says the same.
    if "exception was never retrieved" in message:
        return False  # Dozens, of Orbax, after one failed save.
    if "orbax" in record.pathname and record.exc_info:
        return False  # Pages for each failed save, of which one line of ours tells.
    return "orbax" not in record.pathname or record.levelno > std_logging.INFO


def _without_late_ones(hook: Callable[[Any], object], unraisable: Any) -> None:
    """Prints an error that nobody can catch; not TensorStore's after a failed save.

    Its threads report, hundreds of times, to a loop that Orbax has closed by then.

    Args:
      hook: prints it.
      unraisable: see `sys.unraisablehook`.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def main(argv: list[str]) -> None:
    """Runs the chosen mode."""
    if len(argv) > 1:
        command_line.fail(f"what is {argv[1]!r}? Flags start with --")
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
    if logging.get_verbosity() == logging.INFO:
        logging.get_absl_handler().addFilter(_without_chatter)
        sys.unraisablehook = functools.partial(_without_late_ones, sys.unraisablehook)
    end = _fail_among_others if _DISTRIBUTED.value else command_line.fail
    command_line.in_one_line(_run, end)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
