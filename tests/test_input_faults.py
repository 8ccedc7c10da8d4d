"""Faults of the input: each ends in a clear line, or is passed over as configured."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli import ROOT, environment
from faulty import Faulty
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddaebm_jax.commands import modes
from ddaebm_jax.commands import ood as detection
from ddaebm_jax.data import (
    Source,
    batches,
    image_files,
    image_sets,
    images,
    open_source,
    records,
)
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.data.records import UnusableRecord, SkipUnusable
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures
from ddaebm_jax.models import Players

NUMBER = 20
NO_PLAYERS = Players({}, {}, {})
WORKERS = {"num_threads": 1, "prefetch": 1, "num_workers": 2}


def fault(action):
    """The one-line message of an InputError."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings(**changes):
    """A config's data section."""
    fields = {
        "name": "folder",
        "path": "",
        "image_size": 8,
        "channels": 1,
        "crop": None,
        "test_fraction": 0.25,
        "skip_corrupt": False,
        "timeout": 7,
        "limit": 0,
        "held_out_classes": (),
        "on_device": True,
        "flip": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def read(stream, length):
    """The records that a stream delivers."""
    return stream.next(length)[..., 0, 0, 0]


@pytest.fixture
def closing():
    """Closes streams, and sees to it that closing takes a bounded time."""
    streams = []
    yield lambda stream: streams.append(stream) or stream
    start = time.monotonic()
    for stream in streams:
        stream.close()
    assert time.monotonic() - start < 15


@pytest.fixture
def warnings(monkeypatch):
    """The lines that records warn of."""
    lines = []
    monkeypatch.setattr(
        records.logging, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


# --- Stalls ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"num_threads": 0}, {"prefetch": 0}, {"num_threads": 2, "prefetch": 3}],
    ids=["own thread", "nothing ahead", "threads"],
)
def test_stall_ends_after_the_time_out_with_a_message(how, closing):
    data = Faulty(NUMBER, stalled=7)
    stream = closing(Batches(NUMBER, 5, 0, data, timeout=0.2, **how))
    place = int(np.flatnonzero(batches.order(NUMBER, 0, 0, NUMBER) == 7)[0])
    message = fault(lambda: stream.next(4))
    assert "no batch came for 0.2 s" in message and "data.timeout" in message
    assert f"batch {place // 5} (" in message and "records " in message
    assert "file system" in message and "worker" in message
    # The stream stays, and goes on when the stall is over.
    assert stream.state()["batches"] == 0
    data.stalled = None
    assert sorted(read(stream, 4).ravel()) == list(range(NUMBER))


def test_stall_of_a_worker_process_ends_and_leaves_no_process(closing):
    before = set(multiprocessing.active_children())
    data = Faulty(NUMBER, stalled=7)
    stream = closing(Batches(NUMBER, 5, 0, data, timeout=2, **WORKERS))
    start = time.monotonic()
    assert "no batch came for 2 s" in fault(lambda: stream.next(10))
    assert time.monotonic() - start < 40
    assert set(multiprocessing.active_children()) <= before


_STALLED = """
import faulty
from ddaebm_jax.data.batches import Batches
Batches(20, 5, 0, faulty.Faulty(20, stalled=3), timeout=0.2).next(4)
"""


def test_program_ends_though_its_threads_are_stalled():
    result = subprocess.run(
        [sys.executable, "-c", _STALLED],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "InputError: no batch came" in result.stderr


def test_loading_that_stalls_is_given_up():
    message = fault(
        lambda: records.stack(Faulty(NUMBER, stalled=7), None, "faces", timeout=0.2)
    )
    assert "faces: no progress for 0.2 s" in message and "data.timeout" in message


@pytest.fixture
def timeouts(monkeypatch):
    """The time-outs with which records are loaded."""
    found = []

    def loaded(function, num, progress_name="", timeout=None):
        found.append(timeout)
        return [function(index) for index in range(num)]

    monkeypatch.setattr(records, "in_parallel", loaded)
    monkeypatch.setattr(image_files, "in_parallel", loaded)
    return found


def image_set(**fields):
    """Images whose labels are 0 and 1, 2, or 3."""
    labels = np.arange(NUMBER) % 4
    return records.ImageSet(
        name="digits",
        event_shape=(1, 1, 1),
        train=Faulty(NUMBER),
        test=Faulty(NUMBER),
        train_labels=labels,
        test_labels=labels,
        content="",
        **fields,
    )


def test_training_data_are_loaded_with_the_configs_time_out(monkeypatch, timeouts):
    monkeypatch.setattr(image_sets, "load_digits", lambda *args: image_set())
    data = settings(name="digits", image_size=1, held_out_classes=(3,))
    source = open_source(data, 0)
    assert timeouts == [7] * 3  # The classes left out, and what is on the device.
    source.held_out(5, 0)
    assert timeouts == [7] * 4


def test_evaluation_loads_with_the_configs_time_out(monkeypatch, timeouts):
    def drawn(experiment, variables, num):
        yield np.zeros((num, 1, 1, 1), np.uint8)

    monkeypatch.setattr(figures, "draw_images", drawn)
    monkeypatch.setattr(figures, "energies", lambda *args: np.zeros(3))
    monkeypatch.setattr(figures.digits, "evaluate_digits", lambda *args: {})
    source = Source("digits", (1, 1, 1), None, None, image_set=image_set(), timeout=7)
    config = SimpleNamespace(data=settings(), seed=0)
    experiment = SimpleNamespace(source=source, config=config)
    figures._evaluate_images(experiment, NO_PLAYERS, 5, None)
    assert timeouts == [7] * 3


def test_detection_loads_with_the_configs_time_out(monkeypatch, timeouts):
    found = image_set(left_out=np.zeros((3, 1, 1, 1), np.uint8))
    source = Source("digits", (1, 1, 1), None, None, image_set=found)
    config = SimpleNamespace(data=settings())
    experiment = SimpleNamespace(source=source, config=config)
    run = modes.Run(Path(), experiment, NO_PLAYERS, 0)
    for name in (detection.HELD_OUT, detection.HELD_OUT_CLASSES):
        detection._open(run, name, None, 0, 3)
    monkeypatch.setattr(detection.ood, "fit_baselines", lambda *args: {})
    detection._scorer(run, 0, 1, baselines=True)
    assert timeouts == [7] * 3


def test_images_from_outside_are_read_with_the_time_out(folder, timeouts):
    image_files.read_images(folder, (2, 2, 1), timeout=7)
    assert timeouts == [7] * 2


# --- Workers and the end of the stream ------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_that_is_killed_is_told_of_within_seconds(workers, closing):
    how = {**WORKERS, "num_workers": workers}
    stream = closing(Batches(NUMBER, 5, 0, Faulty(NUMBER), **how))
    before = {child.pid for child in multiprocessing.active_children()}
    expected = Batches(NUMBER, 5, 0, Faulty(NUMBER)).next(60)
    np.testing.assert_array_equal(stream.next(2), expected[:2])
    children = [c for c in multiprocessing.active_children() if c.pid not in before]
    assert len(children) == workers
    os.kill(children[0].pid, signal.SIGKILL)
    start = time.monotonic()
    message = fault(lambda: [stream.next(1) for _ in range(50)])
    assert time.monotonic() - start < 20
    assert f"data.num_workers={workers}) was killed by SIGKILL" in message
    assert "memory" in message and "start the run again" in message
    # The same stream goes on with new workers.
    place = stream.state()["batches"]
    np.testing.assert_array_equal(stream.next(2), expected[place : place + 2])


@pytest.mark.parametrize("how", [{"num_threads": 0}, {"num_threads": 2}, WORKERS])
def test_any_error_of_a_reader_names_the_record_in_one_line(how, closing):
    data = Faulty(NUMBER, errors={7: KeyError("one\nand two")})
    message = fault(lambda: closing(Batches(NUMBER, 5, 0, data, **how)).next(4))
    assert message.startswith("record 7 (counted from 0) cannot be read (KeyError: ")


@pytest.mark.parametrize("how", [{"num_threads": 0}, {"num_threads": 2}])
def test_stop_iteration_of_a_record_is_no_end_of_the_data(how, closing):
    data = Faulty(NUMBER, errors={7: StopIteration()})
    stream = closing(Batches(NUMBER, 5, 0, data, **how))
    assert "record 7 (counted from 0) cannot be read" in fault(lambda: stream.next(4))


@pytest.mark.parametrize("processes", [False, True])
def test_stream_that_ends_is_an_error(processes, monkeypatch, closing):
    import grain

    class Ending:
        def __init__(self):
            self.left = iter([np.zeros((5, 1, 1, 1), np.uint8)] * 3)

        def next(self):
            return next(self.left)

        def close(self):
            pass

    def opened(self):
        if not processes:
            return Ending()
        ending = grain.MapDataset.range(3).map(np.atleast_1d).to_iter_dataset()
        return batches._Workers(ending, 0)

    monkeypatch.setattr(Batches, "_open", opened)
    stream = closing(Batches(NUMBER, 5, 0, Faulty(NUMBER)))
    stream.next(2)
    message = fault(lambda: stream.next(2))
    assert "the stream of batches ended at batch 3 (" in message
    assert stream.state()["batches"] == 2


# --- Records of no use ----------------------------------------------------------


@given(st.sets(st.integers(0, NUMBER - 1), max_size=9))
def test_unusable_records_are_replaced_by_the_next_usable_one(unusable):
    found = SkipUnusable(Faulty(NUMBER, unusable), "the images")
    usable = [i for i in range(2 * NUMBER) if i % NUMBER not in unusable]
    for index in range(NUMBER):
        expected = min(i for i in usable if i >= index) % NUMBER
        assert found[index].item() == expected
        assert pickle.loads(pickle.dumps(found))[index].item() == expected


def test_replacement_depends_on_no_thread_process_or_resume(closing):
    data = SkipUnusable(Faulty(NUMBER, {3, 4, 19}), "the images")
    expected = read(Batches(NUMBER, 4, 5, data), 10)
    assert not {3, 4, 19} & set(expected.ravel().tolist())
    for how in ({"num_threads": 0}, {"num_threads": 3}, WORKERS):
        stream = closing(Batches(NUMBER, 4, 5, data, **how))
        np.testing.assert_array_equal(read(stream, 4), expected[:4])
        state = stream.state()
        fresh = SkipUnusable(Faulty(NUMBER, {3, 4, 19}), "the images")
        resumed = closing(Batches(NUMBER, 4, 5, fresh, **how))
        resumed.restore(state)
        np.testing.assert_array_equal(read(resumed, 6), expected[4:])
    parts = [
        read(Batches(NUMBER, 4, 5, data, process_index=j, process_count=2), 10)
        for j in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


def test_each_unusable_record_is_warned_of_once_and_counted(warnings):
    found = SkipUnusable(Faulty(NUMBER, {3, 4}), "the images")
    for _ in range(3):
        records.stack(found)
    assert len(warnings) == 2
    assert any("record 3 is of no use (" in line for line in warnings)
    assert "the images: left out" in warnings[1] and "(2 so far, " in warnings[1]


@pytest.mark.parametrize("number,most", [(20, 10), (1_000, 10), (4_000, 40)])
def test_more_than_a_share_of_unusable_records_is_refused(number, most, warnings):
    def load(count):
        return SkipUnusable(Faulty(number, range(count)), "the images")[0]

    assert load(most).item() == most
    message = fault(lambda: load(most + 1))
    assert f"{most + 1} of {number} records" in message and "skip_corrupt" in message
    few = SkipUnusable(Faulty(4, range(4)), "the images")
    assert "none of the 4 records is of use" in fault(lambda: few[1])


def test_faults_of_the_file_system_are_not_passed_over():
    data = Faulty(NUMBER, errors={3: OSError(errno.EIO, "Input/output error")})
    stream = Batches(NUMBER, NUMBER, 0, SkipUnusable(data, "the images"))
    assert "Input/output error" in fault(lambda: stream.next(1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve files that are read again whenever they are wanted."""
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def open_folder(path, skip_corrupt):
    data = settings(path=str(path), skip_corrupt=skip_corrupt, timeout=600)
    return images.open_images(data, 0)


@pytest.mark.parametrize("skip", [False, True])
def test_file_that_goes_bad_in_training(folder, skip, warnings):
    opened = open_folder(folder, skip)
    train = images.stack(opened.train)[:, 0, 0, 0]
    (folder / f"{train[2]:02d}.png").write_bytes(b"damaged")
    stream = Batches(len(train), len(train), 0, opened.train)
    if not skip:
        assert fault(lambda: stream.next(1)).startswith(f"{train[2]:02d}.png: cannot")
        return
    delivered = sorted(stream.next(1)[0, :, 0, 0, 0])
    # By a training image, not by the one held out that may come next.
    assert delivered == sorted([*np.delete(train, 2), train[3]])
    assert len(warnings) == 1


def test_file_that_goes_away_in_training_is_an_error(folder):
    opened = open_folder(folder, True)
    (folder / f"{opened.train[2].flat[0]:02d}.png").unlink()
    stream = Batches(len(opened.train), len(opened.train), 0, opened.train)
    assert "FileNotFoundError" in fault(lambda: stream.next(1))


def test_unusable_records_cross_processes_whole():
    error = pickle.loads(pickle.dumps(UnusableRecord("7.png: no image")))
    assert isinstance(error, UnusableRecord) and str(error) == "7.png: no image"
