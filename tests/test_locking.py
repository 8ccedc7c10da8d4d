"""Two runs in one directory, where locks reach other hosts and where they do not."""

import errno
import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from ddaebm_jax.training.locking import LOCK_FILE, lock

from ddaebm_jax.errors import InputError
from ddaebm_jax.training import locking

_TABLE = """\
1 1 0:1 / / rw shared:1 - ext4 /dev/a rw
2 1 0:2 / /mnt/my\\040bucket rw - fuse.gcsfuse gcsfuse rw,user_id=0
3 2 0:3 / /mnt/my\\040bucket/disk rw - ext4 /dev/b rw
4 1 0:4 / /nfs rw - nfs4 server:/x rw,vers=4.2,local_lock=none
5 1 0:5 / /odd rw - nfs server:/y rw,vers=3,local_lock=all
6 1 0:6 / /lustre rw - lustre a@tcp:/z rw,localflock
7 1 0:7 / /covered rw - ext4 /dev/c rw
8 1 0:8 / /covered rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("directory", "reaches"),
    [
        ("/home/run", True),
        ("/mnt/my bucket/run", False),
        ("/mnt/my bucket/disk/run", True),
        ("/nfs/run", True),
        ("/odd/run", False),
        ("/lustre/run", False),
        ("/covered/run", False),
    ],
)
def test_mounts_are_told_apart(directory: str, reaches: bool, tmp_path: Path):
    table = tmp_path / "mountinfo"
    table.write_text(_TABLE)
    assert locking._reaches_others(Path(directory), table) is reaches
    assert locking._reaches_others(Path(directory), tmp_path / "missing")


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system without locks between hosts; the list's end is this host."""
    names = ["first"]
    monkeypatch.setattr(locking, "_reaches_others", lambda _: False)
    monkeypatch.setattr(locking, "_BEAT", 0.05)
    monkeypatch.setattr(locking, "_WATCH", 1.0)
    monkeypatch.setattr(locking.socket, "gethostname", lambda: names[-1])
    return names


def _unseen(monkeypatch: pytest.MonkeyPatch, error: int | None) -> None:
    """Lets nobody see locks; with an error, the system says so."""

    def flock(*_: object) -> None:
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("error", [None, errno.ENOLCK])
def test_a_run_that_lives_on_another_host_is_seen(
    hosts: list[str],
    error: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    _unseen(monkeypatch, error)
    with lock(tmp_path):
        assert "do not reach other hosts" in caplog.text
        hosts.append("second")
        with pytest.raises(InputError, match=r"in use by process \d+ on first"):
            with lock(tmp_path):
                pass
        assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "first"
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_one_that_was_killed_is_not_in_the_way(
    hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / LOCK_FILE).write_bytes(locking._own_content())
    started = time.monotonic()
    with lock(tmp_path):  # The same host's lock is seen here.
        assert time.monotonic() - started < locking._WATCH
    (tmp_path / LOCK_FILE).write_bytes(locking._own_content())
    hosts.append("second")
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "second"
        assert time.monotonic() - started > locking._WATCH


def test_a_lock_that_leads_elsewhere_is_not_written_through(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(outside)
    with pytest.raises(InputError, match="cannot be written"), lock(tmp_path / "run"):
        pass
    assert outside.read_text() == "mine"
