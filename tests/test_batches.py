"""Batches: their order, their position, and readers that fail or skip."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
from faulty import Faulty
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax.data import records
from ddaebm_jax.data.batches import Batches, order
from ddaebm_jax.data.records import SkipUnusable
from ddaebm_jax.errors import InputError

NUMBER = 20
WORKERS = {"num_threads": 1, "prefetch": 1, "num_workers": 1}


def pixels(n):
    shape = (n, 4, 4, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fault(action):
    """The one-line message of an InputError."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(stream, length):
    """The records that a stream of `Faulty` delivers."""
    return stream.next(length)[..., 0, 0, 0]


@pytest.fixture
def closing():
    """Closes streams, and checks that closing takes a bounded time."""
    streams = []
    yield lambda stream: streams.append(stream) or stream
    start = time.monotonic()
    for stream in streams:
        stream.close()
    assert time.monotonic() - start < 15


# --- The order ------------------------------------------------------------------


def test_order_never_changes():
    """A run must resume in the same order under any version of NumPy."""
    assert order(7, 3, 0, 14).tolist() == [0, 1, 2, 5, 6, 4, 3, 5, 6, 3, 0, 1, 2, 4]


@given(st.integers(1, 40), st.integers(0, 2**64))
def test_every_epoch_is_a_permutation_of_the_records(num, seed):
    epochs = order(num, seed, 0, 3 * num).reshape(3, num)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num), (3, 1)))


@given(st.integers(0, 1000))
def test_epochs_of_a_seed_and_of_its_neighbour_all_differ(seed):
    epochs = np.concatenate([order(60, s, 0, 240) for s in (seed, seed + 1)])
    np.testing.assert_array_equal(order(60, seed, 100, 130), epochs[100:130])
    assert len(np.unique(epochs.reshape(8, 60), axis=0)) == 8


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 5))
def test_epochs_follow_one_another_without_a_gap(num, batch, length):
    stream = Batches(num, batch, 3)
    delivered = np.concatenate([stream.next(length), stream.next(1)])
    assert delivered.dtype == np.int32
    expected = order(num, 3, 0, (length + 1) * batch).reshape(length + 1, batch)
    np.testing.assert_array_equal(delivered, expected)
    stream.close()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_deliver_disjoint_parts_of_the_very_batch(count):
    data = pixels(50)
    whole = Batches(50, 8, 1, data).next(9)
    parts = [
        Batches(50, 8, 1, data, process_index=j, process_count=count).next(9)
        for j in range(count)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@given(st.integers(0, 9), st.sampled_from([(1, 1), (3, 8)]), st.integers(1, 3))
def test_position_survives_json_whatever_was_read_ahead(before, ahead, step):
    data = pixels(11)
    first = Batches(11, 4, 5, data, num_threads=ahead[0], prefetch=ahead[1])
    for _ in range(before):
        first.next(step)
    state = json.dumps(first.state())
    assert json.loads(state)["batches"] == before * step
    second = Batches(11, 4, 5, data)
    second.next(2)
    second.restore(json.loads(state))
    expected = first.next(4)
    np.testing.assert_array_equal(second.next(4), expected)
    first.restore(json.loads(state))
    np.testing.assert_array_equal(first.next(4), expected)
    for stream in (first, second):
        stream.close()


def test_state_of_another_stream_is_refused():
    state = Batches(10, 4, 0).state()
    for other in (Batches(11, 4, 0), Batches(10, 2, 0), Batches(10, 4, 1)):
        assert "the saved input position has" in fault(lambda o=other: o.restore(state))


def test_a_batch_that_processes_cannot_share_is_refused():
    message = fault(lambda: Batches(5, 6, 0, process_count=4))
    assert "data.batch_size is 6" in message and "4 processes" in message


# --- Errors ----------------------------------------------------------


def test_worker_processes_deliver_the_same_stream_and_may_die(closing):
    expected = Batches(NUMBER, 5, 0, Faulty(NUMBER)).next(60)
    before = set(multiprocessing.active_children())
    stream = closing(Batches(NUMBER, 5, 0, Faulty(NUMBER), **WORKERS))
    np.testing.assert_array_equal(stream.next(2), expected[:2])
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    message = fault(lambda: [stream.next(1) for _ in range(50)])
    assert "data.num_workers=1" in message and "exit code -9" in message
    # The same stream goes on with new workers.
    place = stream.state()["batches"]
    np.testing.assert_array_equal(stream.next(2), expected[place : place + 2])


@pytest.mark.parametrize("how", [{}, WORKERS], ids=["threads", "worker"])
@pytest.mark.parametrize(
    "error", [KeyError("one\nand two"), OSError(errno.EIO, "I/O error")]
)
def test_any_error_of_a_reader_names_the_batch_in_one_line(error, how, closing):
    data = SkipUnusable(Faulty(NUMBER, errors={7: error}), "the images")
    stream = closing(Batches(NUMBER, 5, 0, data, **how))
    assert f"cannot be read ({type(error).__name__}: " in fault(lambda: stream.next(4))
    assert stream.state()["batches"] == 0


# --- Unusable records -----------------------------------------------------------


@given(st.sets(st.integers(0, NUMBER - 1), max_size=9))
def test_unusable_records_are_replaced_by_the_next_usable_one(unusable):
    found = SkipUnusable(Faulty(NUMBER, unusable), "the images")
    usable = [i for i in range(2 * NUMBER) if i % NUMBER not in unusable]
    for index in range(NUMBER):
        expected = min(i for i in usable if i >= index) % NUMBER
        assert found[index].item() == expected
        assert pickle.loads(pickle.dumps(found))[index].item() == expected


def test_replacement_depends_on_no_thread_process_or_resume(closing):
    def skipping():
        return SkipUnusable(Faulty(NUMBER, {3, 4, 19}), "the images")

    expected = read(Batches(NUMBER, 4, 5, skipping()), 10)
    assert not {3, 4, 19} & set(expected.ravel().tolist())
    resumed = closing(Batches(NUMBER, 4, 5, skipping(), **WORKERS))
    resumed.restore({"batches": 4, "num_records": NUMBER, "batch_size": 4, "seed": 5})
    np.testing.assert_array_equal(read(resumed, 6), expected[4:])
    parts = [
        read(Batches(NUMBER, 4, 5, skipping(), process_index=j, process_count=2), 10)
        for j in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("number,most", [(20, 10), (1_000, 10), (4_000, 40)])
def test_a_share_of_unusable_records_is_warned_of_once_and_more_is_refused(
    number, most, caplog
):
    def load(count):
        return SkipUnusable(Faulty(number, range(count)), "the images")

    found = load(most)
    with caplog.at_level("WARNING", logger="absl"):
        assert found[0].item() == found[0].item() == most
    assert [f"record {i} is" in r.message for i, r in enumerate(caplog.records)] == (
        [True] * most
    )
    message = fault(lambda: load(most + 1)[0])
    assert f"{most + 1} of {number} records" in message and "skip_corrupt" in message
    few = SkipUnusable(Faulty(4, range(4)), "the images")
    assert "none of the 4 records is usable" in fault(lambda: few[1])


@given(st.integers(0, 30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_held_out_part_is_disjoint_and_covers_all(num, share, seed):
    if not 1 <= round(num * share) < num:
        with pytest.raises(InputError, match=r"these: data\.test_fraction"):
            records.hold_out(num, share, seed, "these")
        return
    split = records.hold_out(num, share, seed, "these")
    assert len(split.test) == round(num * share)
    assert sorted([*split.train, *split.test]) == list(range(num))
