"""The command `ddaebm`, and launch/main.py: train a DDAEBM, or use a trained one.

ddaebm --config=gaussians25 --config.game.gamma=0.01
ddaebm --mode=sample --workdir=runs/gaussians25/... --num_samples=1000
ddaebm --mode=score --workdir=... --input=rows.csv
ddaebm --mode=restore --workdir=... --task=impute --input=rows.csv
ddaebm --mode=ood --workdir=... --in=test --out=svhn_cropped,cifar100

Each mode has flags of its own: --help lists them, --mode=sample --help explains those
of sampling.
"""

import sys

from absl import app, flags

from ddaebm_jax.commands import (
    ablate,
    common,
    evaluate,
    export,
    inspect,
    ood,
    restore,
    sample,
    score,
    train,
)
from ddaebm_jax.commands import help as help_lib
from ddaebm_jax.config import flags as config_flags
from ddaebm_jax.errors import InputError

_MODES = (train, sample, score, restore, evaluate, ood, export, inspect, ablate)
COMMANDS = {command.__name__.rpartition(".")[2]: command for command in _MODES}


def _define_mode(values: flags.FlagValues) -> None:
    modes = list(COMMANDS)
    flags.DEFINE_enum("mode", "train", modes, "What to do.", flag_values=values)


def _mode(argv: list[str]) -> flags.Flag:
    """Return the flag --mode of a command, whatever its other flags are."""
    values = flags.FlagValues()
    values.set_gnu_getopt()
    _define_mode(values)
    values(argv, known_only=True)
    return values["mode"]


def _parse(argv: list[str]) -> list[str]:
    """Define the flags of the mode that a command names, and parse them."""
    with common.user_errors():
        before = set(flags.FLAGS)
        flag = _mode(argv)
        mode, help_asked = flag.value, {"--help", "-help", "-h"}.intersection(argv)
        if help_asked and not flag.present:
            common.show(help_lib.overview(COMMANDS))
            sys.exit()
        _define_mode(flags.FLAGS)
        COMMANDS[mode].define_flags(flags.FLAGS)
        for name in set(flags.FLAGS) - before:  # --helpshort lists the key flags.
            flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[name])
        if help_asked:
            common.show(f"{COMMANDS[mode].__doc__}\n{flags.FLAGS.module_help(argv[0])}")
            sys.exit()
        try:
            return config_flags.parse(argv)
        except flags.UnrecognizedFlagError as error:
            told = help_lib.unknown_flag(error.flagname, mode, COMMANDS)
            raise InputError(told) from error


def main() -> None:
    """Run the mode that the command line chooses."""
    app.run(
        lambda words: common.run(COMMANDS[flags.FLAGS.mode].run, words),
        flags_parser=_parse,
    )
