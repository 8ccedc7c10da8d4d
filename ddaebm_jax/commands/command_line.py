"""What the commands share: flags and errors of the user's end in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags, logging

from ddaebm_jax.config import ConfigError
from ddaebm_jax.config import flags as config_flags
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


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags; a bad one or a bad config ends the program in one line."""
    try:
        return config_flags.parse(argv)
    except ConfigError as error:
        fail(str(error))
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")


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
