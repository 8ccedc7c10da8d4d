"""What is seen of long work: its phases in the log, and bars or lines of its loops.

Of several processes the first one shows them.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

_SHORT_SECONDS = 1.0  # A phase that takes less ends without a line, a loop has no bar.
_LINE_SECONDS = 30.0  # Between the lines of a loop, where there is no bar.
_open: set[tqdm] = set()  # Bars of loops.


@contextlib.contextmanager
def phase(text: str, hint: str = "") -> Iterator[None]:
    """Log what begins, for example "drawing pictures", and how long it took.

    A hint is logged at the beginning only, in brackets.
    """
    start = time.monotonic()
    log(f"{text} ({hint}) ..." if hint else f"{text} ...")
    yield
    if (seconds := time.monotonic() - start) >= _SHORT_SECONDS:
        log(f"{text}: done in {seconds:.1f} s")


def log(text: str, level: int = logging.INFO) -> None:
    """Log a line, clear of the bars."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode():
            logging.log(level, "%s", text)


def run_bar(num_steps: int, step: int) -> tqdm:
    """Return the bar of a training run from a step on; it stays when it is closed."""
    return tqdm(total=num_steps, initial=step, unit="step", leave=True, **_where())


@contextlib.contextmanager
def loop_bar(num: int, unit: str, what: str = "") -> Iterator[tqdm]:
    """Show how far a loop is, for example "drawing"; inside another loop nothing.

    On a terminal as a bar, which goes at the end; elsewhere as lines of the log.
    """
    where = _where() | {"delay": _SHORT_SECONDS}
    if where["disable"]:
        text = "{desc}: {n:,} of {total:,} {unit}s, {remaining} left"
        times = dict.fromkeys(("delay", "mininterval", "maxinterval"), _LINE_SECONDS)
        where = {"file": _LOG, "bar_format": text, "miniters": 1, **times}
    where["disable"] = bool(_open) or jax.process_index() != 0
    with tqdm(total=num, unit=unit, desc=what, leave=False, **where) as bar:
        _open.add(bar)
        try:
            yield bar
        finally:
            _open.discard(bar)


# A stream whose text goes to the log.
_LOG = SimpleNamespace(
    write=lambda text: log(text.strip()) if text.strip() else None, flush=lambda: None
)


def _where() -> dict[str, Any]:
    """Return tqdm's settings: a bar is shown on a terminal and in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    in_notebook = getattr(shell, "kernel", None) is not None
    # Notebooks show stderr in red.
    stream = sys.stdout if in_notebook else sys.stderr
    shown = (in_notebook or _is_terminal(stream)) and jax.process_index() == 0
    size = shutil.get_terminal_size()  # tqdm shows nothing where it is not known.
    lines = {"ncols": size.columns - 1, "nrows": size.lines}
    return {"file": stream, "disable": not shown, **lines}


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # There is none, or it is closed.
        return False


def duration(seconds: float) -> str:
    """Return a time as [hours:]minutes:seconds."""
    return tqdm.format_interval(seconds)
