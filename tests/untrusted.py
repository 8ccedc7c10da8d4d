"""What tests of files from outside share: damage, and refusals within bounds."""

import struct
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from ddaebm_jax.errors import InputError

MEGABYTE = 2**20
FUZZ = hypothesis.settings(
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def refused(action, *parts):
    """Returns the one-line message of a refusal that allocates little."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and "Type-check" not in message, message
    for part in parts:
        assert part in message, message
    assert peak < 32 * MEGABYTE, f"{peak} bytes for {message}"
    return message


def read_or_refused(action):
    """Runs a reader: a value, or one line; whatever else it raises fails the test."""
    try:
        action()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2_000


@st.composite
def mutations(draw, content):
    """Bytes of a file with a few faults: bytes, gaps, copies, cuts, large numbers."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 16))
        match draw(st.sampled_from(("byte", "gap", "copy", "cut", "number", "insert"))):
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "gap":
                del data[at : at + length]
            case "copy":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
            case "number":
                number = draw(st.sampled_from((0, 2**31 - 1, 2**32 - 1, 2**63, 2**40)))
                data[at : at + 8] = struct.pack("<Q", number)
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)
