"""Commands that work together in several processes, as on several machines."""

import contextlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

from cli import MAIN, ROOT, Result, environment


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Started:
    """A command in a process of its own, whose output is read as it comes.

    A process whose pipe is full would wait, and with it those that work with it.
    """

    def __init__(self, *flags: str, devices: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(MAIN), *flags],
            env=environment(devices),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._out: list[str] = []
        self._err: list[str] = []
        self._readers = [
            threading.Thread(target=into.extend, args=[pipe], daemon=True)
            for pipe, into in (
                (self._process.stdout, self._out),
                (self._process.stderr, self._err),
            )
        ]
        for reader in self._readers:
            reader.start()
        self.pid = self._process.pid
        self.send_signal = self._process.send_signal

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._read()

    @property
    def log(self) -> str:
        """What it has written to stderr so far."""
        return "".join(self._err)

    def limit_files(self, num_bytes: int) -> None:
        """Let no file of the process grow beyond a size, as on a full disk."""
        most = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (num_bytes, most))

    def until(
        self, true: Callable[[], bool], seconds: float = 240.0, every: float = 0.05
    ) -> None:
        """Waits until a condition holds.

        Raises:
          AssertionError: if the process has ended, or after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not true():
            assert self._process.poll() is None, f"ended: {self.ended(1.0)}"
            assert time.monotonic() < deadline, f"not after {seconds} s: {self._err}"
            time.sleep(every)

    def ended(self, seconds: float = 300.0) -> Result:
        """Waits for the process's end.

        Raises:
          AssertionError: after `seconds`, with the stack of each thread.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Python's own handler, switched on by `environment`, prints the stacks.
            self._process.send_signal(signal.SIGABRT)
            self._read()
            raise AssertionError(f"not ended after {seconds} s: {self._err}") from None
        self._read()
        return Result(self._process.returncode, "".join(self._out), self.log)

    def _read(self) -> None:
        self._process.wait(10)
        for reader in self._readers:
            reader.join(10)


@contextlib.contextmanager
def started(
    flags: list[str], *of_each: list[str], devices: int = 2
) -> Iterator[list[Started]]:
    """Starts the command line, one process for each list of additional flags.

    None of them outlives the block.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Started(
                    *flags,
                    *own,
                    "--distributed",
                    f"--coordinator=localhost:{port}",
                    f"--num_processes={len(of_each)}",
                    f"--process_id={number}",
                    devices=devices,
                )
            )
            for number, own in enumerate(of_each)
        ]


def results_of(flags: list[str], *of_each: list[str], devices: int = 2) -> list[Result]:
    """Starts the command line as `started` does, and waits for all processes."""
    with started(flags, *of_each, devices=devices) as processes:
        return ended(processes)


def ended(processes: list[Started]) -> list[Result]:
    """Waits for processes that work together.

    Raises:
      AssertionError: if they do not end, with the output of each.
    """
    with futures.ThreadPoolExecutor(len(processes)) as waiting:
        ends = [waiting.submit(process.ended) for process in processes]
    late = [str(end.exception()) for end in ends if end.exception()]
    assert not late, "\n\n".join(late)
    return [end.result() for end in ends]
