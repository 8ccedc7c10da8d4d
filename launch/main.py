"""Trains a DDAEBM, or samples, scores and evaluates with a trained one.

python launch/main.py --config=configs/gaussians25.py
python launch/main.py --config=configs/gaussians25.py --config.game.gamma=0.01
python launch/main.py --mode=sample --workdir=runs/gaussians25/… --num_samples=1000
python launch/main.py --mode=score --workdir=… --input=rows.csv
python launch/main.py --mode=score --workdir=… --input=folder_of_images
python launch/main.py --mode=evaluate --workdir=…
"""

import logging as std_logging
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from ddaebm_jax import command_line
from ddaebm_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, for --mode=train; --config.a.b=c changes a field."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory. Default: runs/<config>/<time>."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "sample", "score", "evaluate"], "What to do."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "How many samples to draw. Default: 10000, of images 100."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**31 - 1
)
_INPUT = flags.DEFINE_string(
    "input", None, "What to score: CSV or NPZ rows; a folder or an NPZ of images."
)
_SKIP_CORRUPT = flags.DEFINE_bool(
    "skip_corrupt", False, "Leave images to score out that are of no use."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write. Default: in --workdir.")


# Flags that only some modes read; elsewhere they would be ignored.
_MODES_OF_FLAG = {
    "config": ("train",),
    "num_samples": ("sample",),
    "seed": ("sample",),
    "input": ("score",),
    "skip_corrupt": ("score",),
    "output": ("sample", "score"),
}


def _check_flags() -> None:
    for name, modes in _MODES_OF_FLAG.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            raise InputError(
                f"--{name} is for --mode={' or '.join(modes)}; --mode={_MODE.value} "
                "would ignore it: leave it out"
            )


def _run() -> None:
    _check_flags()
    from ddaebm_jax import modes, train, writers

    if _MODE.value == "train":
        if _CONFIG.value is None:
            raise InputError(
                "--mode=train needs --config, for example "
                "--config=configs/gaussians25.py"
            )
        workdir = _WORKDIR.value or _new_workdir()
        report = train.train(_CONFIG.value, workdir)
        print(f"{workdir}\n{writers.format_report(report)}")
        return
    if not _WORKDIR.value:
        raise InputError(f"--mode={_MODE.value} needs --workdir, a run directory")
    if _MODE.value == "sample":
        print(
            modes.sample(_WORKDIR.value, _NUM_SAMPLES.value, _SEED.value, _OUTPUT.value)
        )
    elif _MODE.value == "score":
        if not _INPUT.value:
            raise InputError(
                "--mode=score needs --input: a CSV or NPZ of rows, or a folder or NPZ "
                "of images"
            )
        print(
            modes.score(
                _WORKDIR.value, _INPUT.value, _OUTPUT.value, _SKIP_CORRUPT.value
            )
        )
    else:
        print(writers.format_report(modes.evaluate(_WORKDIR.value)))


def _new_workdir() -> str:
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return str(Path("runs") / recipe / time.strftime("%Y%m%d-%H%M%S"))


def _without_chatter(record: std_logging.LogRecord) -> bool:
    """Drops libraries' notes on their insides; warnings pass, but for one."""
    if "Given directory is read only" in record.getMessage():
        return False  # Reading is all that was asked for.
    if "Setting work unit notes" in record.getMessage():
        return False  # clu's progress; our own line says the same.
    return "orbax" not in record.pathname or record.levelno > std_logging.INFO


def main(argv: list[str]) -> None:
    """Runs the chosen mode."""
    if len(argv) > 1:
        command_line.fail(f"what is {argv[1]!r}? Flags start with --")
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
    if logging.get_verbosity() == logging.INFO:
        logging.get_absl_handler().addFilter(_without_chatter)
    command_line.in_one_line(_run)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
