"""The text of --help, all modes and their flags on one screen, and of unknown flags."""

import difflib
import re
import textwrap
from collections.abc import Mapping
from types import ModuleType

from absl import flags

from ddaebm_jax.config import base, fields

_WIDTH = 80
_USAGE = "usage: ddaebm, or python launch/main.py, [--mode=MODE] --FLAG=VALUE …"
_END = "--mode=MODE --help explains a mode's flags; --helpfull adds those of libraries."
_INDENT = {"initial_indent": "  ", "subsequent_indent": "    "}


def overview(commands: Mapping[str, ModuleType]) -> str:
    """Return the flags of all modes; those of several modes are explained once."""
    of_modes = {mode: _flags_of(command) for mode, command in commands.items()}
    every = [pair for found in of_modes.values() for pair in found.items()]
    shared = {name: text for name, text in every if every.count((name, text)) > 1}
    lines = [_USAGE, ""]
    for mode, found in of_modes.items():
        lines.append((commands[mode].__doc__ or "").splitlines()[0].replace("`", ""))
        own = {n: text for n, text in found.items() if shared.get(n) != text}
        lines += map(_line, own, own.values())
        others = " ".join(f"--{name}" for name in found if name not in own)
        lines += textwrap.wrap(others and f"and {others}", _WIDTH, **_INDENT)
    lines += ["Of several modes", *map(_line, shared, shared.values()), ""]
    return "\n".join(lines + textwrap.wrap(_END, _WIDTH))


def unknown_flag(name: str, mode: str, commands: Mapping[str, ModuleType]) -> str:
    """Return an error message on a flag that a mode does not have."""
    of_modes = {one: _flags_of(command) for one, command in commands.items()}
    modes = [f"--mode={one}" for one, found in of_modes.items() if name in found]
    if modes:
        return f"--{name} is for {' or '.join(modes)}, not for --mode={mode}"
    known = {*flags.FLAGS}.union(*of_modes.values())
    known |= {f"config.{field}" for field in dict(fields.leaves(base()))}
    close = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"; did you mean --{close[0]}?" if close else ""
    return f"--{name} is not a flag{hint}; --help lists the flags"


def _flags_of(command: ModuleType) -> dict[str, str]:
    values = flags.FlagValues()
    command.define_flags(values)
    return {name: values[name].help for name in values}


def _line(name: str, text: str) -> str:
    """Return a flag with as many of its text's clauses as fit."""
    line = f"  --{name:<18}{text}"
    if len(line) > _WIDTH:
        line = re.match("(.*)(?<!Default)[.:;] ", line[:_WIDTH])[1]
    return line
