"""Recipes: files that make a config, and the changes to one that a command asks for."""

import ast
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from ddaebm_jax import config as config_lib
from ddaebm_jax.config import checks as validation
from ddaebm_jax.errors import InputError


class Recipe(NamedTuple):
    """A config and the file it is from."""

    path: Path
    config: ml_collections.ConfigDict


def load(named: str) -> Recipe:
    """Runs a recipe file, and its `get_config`.

    Args:
      named: the file; `file.py:text` calls `get_config("text")`.

    Raises:
      InputError: if there is no such file, or it makes no config; the message names
        the file and, where its code fails, the line and why.
    """
    path, arguments = Path(named), []
    file, colon, argument = named.rpartition(":")
    if colon and not path.exists():
        path, arguments = Path(file), [argument]
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--config={path}: the recipe cannot be read ({error.strerror}); "
            "configs/ holds some"
        ) from error
    names: dict[str, Any] = {"__name__": "recipe", "__file__": str(path)}
    try:
        exec(compile(text, str(path), "exec"), names)
        config = names["get_config"](*arguments) if "get_config" in names else None
    except Exception as error:  # Whatever the file's code may raise.
        raise InputError(_told(error, path)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"--config={path}: a function get_config() is needed that returns a "
            "config, as in configs/gaussians25.py"
        )
    return Recipe(path, config.lock())


def _told(error: Exception, path: Path) -> str:
    """Says in which line of a recipe something went wrong, and what."""
    lines = [
        (frame.lineno, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    reason: object = error.args[0] if len(error.args) == 1 else error
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [(error.lineno, (error.text or "").strip())]
        reason = error.msg
    elif isinstance(reason, KeyError):  # So ml_collections names its fields.
        reason = reason.args[0]
    where = f", line {lines[-1][0]} (`{lines[-1][1]}`)" if lines else ""
    told = f"{type(error).__name__}: {reason}".rstrip(": ")
    return f"--config={path}{where}: {told}"


def change(config: ml_collections.ConfigDict, changes: dict[str, str]) -> list[str]:
    """Changes fields of a config in place.

    A value that is not of the field's type is set as it was written: `config.validate`
    says what is wanted.

    Returns:
      A line for each field that there is not.
    """
    default, given = (dict(validation.leaves(c)) for c in (config_lib.base(), config))
    problems = []
    for field, text in changes.items():
        if field not in default:
            problems.append(f"--config.{validation.unknown(field, default)}")
        elif field in given:
            *sections, name = field.split(".")
            section, like = config, config_lib.base()
            for part in sections:
                section, like = section[part], like[part]
            with section.ignore_type(), section.unlocked():
                section[name] = _value(text, like.get_type(name))
    return problems


def _value(text: str, kind: type) -> Any:
    """Reads a value; as text, if it cannot be one of that type."""
    if kind is not str and text.lower() == "none":
        return None
    try:
        return _READERS[kind](text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _tuple(text: str) -> tuple[Any, ...]:
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


_READERS = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    tuple: _tuple,
    str: str,
}
