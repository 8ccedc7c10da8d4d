"""Steps on the devices: where dispatches end."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax.training import dispatching


@given(
    st.integers(0, 200),
    st.integers(1, 50),
    st.integers(1, 300),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_dispatches_stop_at_every_interval_whatever_the_start(
    start: int, per_dispatch: int, total: int, intervals: list[int]
):
    """A run resumed at a stop of the unbroken one has the stops that follow it."""

    def stops(step: int) -> list[int]:
        found = []
        while step < total:
            step = dispatching.next_stop(step, per_dispatch, total, intervals)
            found.append(step)
        return found

    unbroken = stops(0)
    assert unbroken[-1] == total
    assert np.diff([0, *unbroken]).max() <= per_dispatch
    for every in filter(None, intervals):
        assert set(range(every, total + 1, every)) <= set(unbroken)
    if start in unbroken:
        assert stops(start) == unbroken[unbroken.index(start) + 1 :]
