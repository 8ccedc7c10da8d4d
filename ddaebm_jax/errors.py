"""Errors that the user can mend, in one line, and helpers that keep them short."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: names the field or file, what was found, and what to try."""


class TrainingError(InputError):
    """Training cannot go on; the message says at which step and why."""


class OutOfStepError(TrainingError):
    """One process of several cannot go on with the others.

    It must end at once, without waiting for them; then they notice, and end too.
    """


class LostProcessError(OutOfStepError):
    """Another process of the run is gone."""

    def __init__(self, error: Exception) -> None:
        """Says what it is known by."""
        lines = str(error).strip().splitlines()
        known_by = lines[0][:200] if lines else type(error).__name__
        super().__init__(
            f"the other processes cannot be reached any more ({known_by}); one of them "
            "has ended or hangs: see its output. Start all of them again with the same "
            "command: the run goes on from its newest checkpoint"
        )


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns an error's type and text as one short line, to be part of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'…' * (len(text) > limit)}"


def shown(value: str) -> str:
    """Returns text quoted and escaped as part of a message, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…'"


def listed(values: Iterable[Any], limit: int = 12) -> str:
    """Returns the first values, separated by commas, and how many more there are."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more
