"""What the commands share: flags and errors of the user's end in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags, logging

from ddaebm_jax.errors import InputError


def fail(message: str, at_once: bool = False) -> NoReturn:
    """Prints `error: …` on one line and ends the program with status 2.

    Args:
      message: what is wrong.
      at_once: leave out what runs at a program's end, which may wait for processes
        that are gone.
    """
    # A recipe's own traceback may come along: its last line says what happened.
    parts = message.split("Traceback (most recent call last)")
    text = parts[0] if len(parts) == 1 else parts[-1].strip().splitlines()[-1]
    line = f"error: {' '.join(text.split())}"
    if at_once:
        leave(line, 2)
    print(line, file=sys.stderr)
    sys.exit(2)


def leave(line: str, status: int) -> NoReturn:
    """Prints a line and ends the program, without what runs at a program's end."""
    print(line, file=sys.stderr, flush=True)
    os._exit(status)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a bad one, a bad field of `--config` included, ends in one line."""
    try:
        remaining = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if config is not None:
            _ = config.items  # A recipe that could not be loaded fails here.
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")
    except (KeyError, AttributeError, TypeError) as error:
        fail(
            f"in --config or a --config.field override: {error.args[0]}; "
            "ddaebm_jax/config.py lists the fields"
        )
    except (OSError, ImportError, SyntaxError) as error:
        fail(f"--config: {error.__cause__ or error}")
    return remaining


def in_one_line(action: Callable[[], None]) -> None:
    """Runs an action; an error of the user's ends the program with one line."""
    try:
        action()
    except (InputError, OSError) as error:
        logging.debug("where it came from", exc_info=True)
        fail(str(error))
