"""Errors for the user to fix; the command line prints each as one line."""


class InputError(ValueError):
    """Bad input: the message names the field or file, the value, and what to try."""


class TrainingError(InputError):
    """Training cannot continue; the message says at which step and why."""


class LostProcessError(TrainingError):
    """Another process of the run has ended or hangs."""

    def __init__(self, error: Exception) -> None:
        """Quotes the first line of the error that revealed it."""
        lines = str(error).strip().splitlines()
        symptom = lines[0][:200] if lines else type(error).__name__
        super().__init__(
            f"the other processes cannot be reached any more ({symptom}); one of them "
            "has ended or hangs: see its output. Start all of them again with the same "
            "command: the run continues from its newest checkpoint"
        )
