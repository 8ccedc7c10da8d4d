"""What the commands share: flags and errors of the user's end in one line."""

import collections
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from absl import flags, logging

from ddaebm_jax.errors import InputError


def fail(message: str, at_once: bool = False) -> NoReturn:
    """Prints `error: …` on one line and ends the program with status 2.

    Args:
      message: what is wrong.
      at_once: leave out what runs at a program's end, which may wait for processes
        that are gone.
    """
    if at_once:
        leave(error_line(message), 2)
    say(error_line(message))
    sys.exit(2)


def error_line(message: str) -> str:
    """Returns what is printed of an error."""
    return f"error: {' '.join(message.split())}"


def leave(line: str, status: int) -> NoReturn:
    """Prints a line and ends the program, without what runs at a program's end."""
    say(line)
    os._exit(status)


def say(line: str) -> None:
    """Prints a line among the errors in one piece: other threads may write there."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class _RecipeParser(flags.ArgumentParser):
    """Reads the recipe that a flag names."""

    syntactic_help = "A Python file that makes a config."

    def parse(self, argument: str) -> Any:
        from ddaebm_jax.config import recipes

        return recipes.load(argument)

    def flag_type(self) -> str:
        return "recipe"


def define_config(help_text: str) -> flags.FlagHolder:
    """Defines `--config`, whose value is a `recipes.Recipe`; see `parse_flags`."""
    return flags.DEFINE(_RecipeParser(), "config", None, help_text)


_CHANGE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)

# An argument that is a flag, not a negative number.
_FLAG = re.compile(r"-(?![\d.])")


def _split(argv: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Takes out of a command what changes fields of the recipe.

    Returns:
      The other arguments, and the changes: field → value as it was written.
    """
    others: list[str] = []
    changes: dict[str, str] = {}
    remaining = collections.deque(argv)
    while remaining:
        argument = remaining.popleft()
        match = _CHANGE.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        negated, field, value = match.groups()
        if (
            value is None
            and not negated
            and remaining
            and not _FLAG.match(remaining[0])
        ):
            value = remaining.popleft()
        if value is None:  # A switch; or a value was forgotten.
            value = str(not negated) if _is_switch(field) else ""
        changes[field] = value
    return others, changes


def _is_switch(field: str) -> bool:
    from ddaebm_jax import config
    from ddaebm_jax.config import checks as validation

    return isinstance(dict(validation.leaves(config.base())).get(field), bool)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, and makes the changes of `--config.section.field=value`.

    A flag that is bad, and fields that there are not, end the program in one line.
    """
    try:
        arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        arguments, changes = _split(arguments)
        remaining = flags.FLAGS([argv[0], *arguments])
    except flags.Error as error:
        if isinstance(error.__context__, InputError):  # The recipe's.
            fail(str(error.__context__))
        fail(f"{error}; --help lists the flags")
    if changes:
        _change_recipe(changes)
    return remaining


def _change_recipe(changes: dict[str, str]) -> None:
    recipe = flags.FLAGS["config"].value
    if recipe is None:
        fail(
            f"--config.{next(iter(changes))} changes a field of a recipe; name that, "
            "too: --config=configs/gaussians25.py"
        )
    from ddaebm_jax import config
    from ddaebm_jax.config import recipes

    unknown = recipes.change(recipe.config, changes)
    if unknown:
        fail("; ".join(unknown + config.problems(recipe.config)))


def in_one_line(
    action: Callable[[], None], end: Callable[[str], NoReturn] = fail
) -> None:
    """Runs an action; an error of the user's ends the program with one line.

    Args:
      action: what is to be done.
      end: ends the program, given the error's message.
    """
    try:
        action()
    except (InputError, OSError) as error:
        logging.debug("where it came from", exc_info=True)
        end(str(error))
