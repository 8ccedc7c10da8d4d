"""Errors that are the user's to mend; the command line prints them as one line."""


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
