"""The flag --config: a recipe file, and --config.section.field=value to change it.

ml_collections.config_flags reads both. Added here: `none` for optional fields, and an
error in one line that names every problem found.
"""

import re
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path, tuple_parser

from ddaebm_jax.config import fields, recipes
from ddaebm_jax.config.base import base
from ddaebm_jax.config.checks import ConfigError, problems
from ddaebm_jax.paths import user_path

_RECIPE = re.compile(r"--?config(=|$)")
_FROM_HOME = re.compile(r"(--?config=)(~[^:]*|file:/[^:]*)")
_CHANGE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


class _OrNone(flags.ArgumentParser):
    """Parser of `none`, and of what another parser takes."""

    def __init__(self, parser: flags.ArgumentParser) -> None:
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if str(argument).lower() == "none" else self._parser.parse(argument)


_PARSERS = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: _OrNone(flags.FloatParser()),
    tuple: _OrNone(tuple_parser.TupleParser()),
    str: flags.ArgumentParser(),
}
# The arguments in which config_flags looks for changes; `parse` sets them.
_arguments: list[str] = []


def define_config_flag(
    values: flags.FlagValues = flags.FLAGS,
    help_text: str = "The recipe; --config.section.field=value changes a field.",
) -> flags.FlagHolder:
    """Define --config, whose value is the changed config of a recipe, or None."""
    for kind in (float, tuple):
        config_flags.register_flag_parser_for_type(kind, _PARSERS[kind])
    return config_flags.DEFINE_config_file(
        "config", None, help_text, values, sys_argv=_arguments
    )


def recipe_name() -> str:
    """Return the file name of the recipe given by --config, without its suffix."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return Path(path.partition(":")[0]).stem


def parse(argv: list[str]) -> list[str]:
    """Parse a command as `flags.FLAGS(argv)` does; return the arguments left over.

    Raises:
      ConfigError: for a recipe that makes no config or a change that it cannot take.
      absl.flags.Error: for other flags.
    """
    if "config" not in flags.FLAGS:
        return flags.FLAGS(argv)
    given = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    before = ["", *given]
    given = [_recipe_found(a, b) for a, b in zip(given, before, strict=False)]
    wrong = {a: told for a in given if (told := _change_problem(a))}
    _arguments[:] = [argv[0], *(a for a in given if a not in wrong)]
    following = zip(given, [*given[1:], ""], strict=False)
    recipe = [a.partition("=")[2] or b for a, b in following if _RECIPE.match(a)]
    change = next(filter(_CHANGE.fullmatch, given), None)
    if change and not recipe:
        raise ConfigError(f"{change} changes a field of a recipe: name that, too")
    try:
        remaining = flags.FLAGS(_arguments)
        config = flags.FLAGS["config"].value if recipe else base()
        if not hasattr(config, "to_dict"):  # Or what config_flags put off is raised.
            raise TypeError("get_config() must return a config, as configs/digits.py")
    except Exception as error:  # Whatever the code of a recipe may raise.
        if not (told := _recipe_problem(error, recipe[-1] if recipe else "")):
            raise
        raise ConfigError("; ".join([*wrong.values(), told])) from error
    if wrong:
        raise ConfigError("; ".join([*wrong.values(), *problems(config)]))
    return remaining


def parse_value(field: str, text: str) -> Any:
    """Return the value that a text gives a field; a ValueError if it gives none."""
    return _PARSERS[config_path.get_type(field, base())].parse(text)


def _recipe_found(argument: str, before: str = "") -> str:
    """Return an argument with the path of a recipe, given as a path or by its name.

    `before` is the argument before it, which may be `--config`.
    """
    flag, _, name = argument.rpartition("=")
    if name in recipes.names() and not Path(name).is_file():
        path = f"{recipes.folder() / name}.py"
        if _RECIPE.fullmatch(f"{flag}="):
            return f"--config={path}"
        if not flag and _RECIPE.fullmatch(before):
            return path
    if not (start := _FROM_HOME.match(argument)):
        return argument
    return f"{start[1]}{user_path(start[2], '--config')}{argument[start.end() :]}"


def _change_problem(argument: str) -> str | None:
    """Return what is wrong with an argument that changes a field; None: nothing."""
    if not (change := _CHANGE.fullmatch(argument)):
        return None
    (field, text), default = change.groups(), dict(fields.leaves(base()))
    if field not in default:
        return f"--config.{fields.unknown(field, default)}"
    try:
        if text is not None:
            parse_value(field, text)
    except ValueError:
        return fields.problem(field, text, default[field])
    return None


def _recipe_problem(error: BaseException, recipe: str) -> str | None:
    """Return where and why a recipe failed; None if the error is not the recipe's."""
    chain, path = [error], recipe.partition(":")[0]
    if not Path(path).is_file():
        known = ", ".join(recipes.names())
        return recipe and f"--config={recipe}: no such file or recipe; recipes: {known}"
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for raised in chain:
        frames = traceback.extract_tb(raised.__traceback__)
        lines = [(f.lineno, f.line) for f in frames if f.filename == path]
        if isinstance(raised, SyntaxError) and raised.filename == path:
            lines.append((raised.lineno, (raised.text or "").strip()))
        if lines:
            break
    if not lines and isinstance(error, flags.Error) and "--config=" not in str(error):
        return None
    where = ", line {} (`{}`)".format(*lines[-1]) if lines else ""
    reason = raised.args[0] if len(raised.args) == 1 else raised
    reason = reason.args[0] if isinstance(reason, KeyError) else reason
    return f"--config={recipe}{where}: {type(raised).__name__}: {reason}".rstrip(": ")
