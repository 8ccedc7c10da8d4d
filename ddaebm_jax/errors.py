"""Errors for the user to fix, each in one line, and helpers that keep them short."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: the message names the field or file, the value, and what to try."""


class TrainingError(InputError):
    """Training cannot continue; the message says at which step and why."""


class DivergedError(TrainingError):
    """A loss or gradient is not finite, again and again."""


class LostProcessError(TrainingError):
    """Another process of the run has ended or hangs."""

    def __init__(self, error: Exception) -> None:
        """Quotes the error that revealed it."""
        super().__init__(
            f"the other processes cannot be reached any more ({one_line(error)}); one "
            "of them has ended or hangs: see its output. Start all of them again with "
            "the same command: the run continues from its newest checkpoint"
        )


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an error's type and text as one short line, to be part of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'…' * (len(text) > limit)}"


def shown(value: str) -> str:
    """Return text quoted and escaped as part of a message, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…'"


def listed(values: Iterable[Any], limit: int = 12) -> str:
    """Return the first values, separated by commas, and how many more there are."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more
