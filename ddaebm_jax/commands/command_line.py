"""The recipe's flag, and changes to its fields."""

import collections
import re
from collections.abc import Iterable
from typing import Any

from absl import flags

from ddaebm_jax.commands.common import fail
from ddaebm_jax.errors import InputError


class _RecipeParser(flags.ArgumentParser):
    """Reads the recipe that a flag names."""

    syntactic_help = "A Python file that makes a config."

    def parse(self, argument: str) -> Any:
        from ddaebm_jax.config import recipes

        return recipes.load(argument)

    def flag_type(self) -> str:
        return "recipe"


def define_config(
    help_text: str, values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines `--config`, whose value is a `recipes.Recipe`; see `parse_flags`."""
    return flags.DEFINE(_RecipeParser(), "config", None, help_text, flag_values=values)


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
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, InputError):  # The recipe's.
            fail(str(error.__context__))
        raise
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
