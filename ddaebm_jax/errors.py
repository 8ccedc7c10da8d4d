"""Errors that are the user's to mend; the command line prints them as one line."""


class InputError(ValueError):
    """Bad input: names the field or file, what was found, and what to try."""


class TrainingError(InputError):
    """Training cannot go on; the message says at which step and why."""


class OutOfStepError(TrainingError):
    """One process of several cannot go on with the others.

    It must end at once, without waiting for them; then they notice, and end too.
    """
