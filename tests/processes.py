"""Starts real processes that work together, as on several machines."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

from cli import MAIN, ROOT, Result, environment

_FORKER = """
import importlib, json, os, sys, threading
sys.path[:0] = {paths!r}
module = importlib.import_module({module!r})

def read(end, into):
    with open(end, "rb", buffering=0) as file:
        into.append(file.read())

for line in sys.stdin:
    call, of_each, seconds = json.loads(line)
    children = []
    for arguments in of_each:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            try:
                getattr(module, call)(*arguments)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        os.close(theirs)
        children.append((pid, ours, []))
    readers = [
        threading.Thread(target=read, args=child[1:], daemon=True)
        for child in children
    ]
    for reader in readers:
        reader.start()
    timer = threading.Timer(seconds, lambda: [os.kill(c[0], 9) for c in children])
    timer.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(c[0], 0)[1]) for c in children]
    timer.cancel()
    for reader in readers:
        reader.join()
    said = [child[2][0].decode(errors="replace") for child in children]
    print(json.dumps(list(zip(codes, said))), flush=True)
"""


class Forked:
    """Calls a function of a test module in several processes, from one import.

    What they write goes into pipes, which a limit on the size of files leaves alone.
    """

    def __init__(self, module: str) -> None:
        paths = [str(ROOT), str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKER.format(paths=paths, module=module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )

    def __call__(
        self, function: str, *of_each: list, seconds: float = 60.0
    ) -> list[Result]:
        """Calls `function(number, port, *arguments)` in one process for each list.

        They are killed when they have not ended after so many seconds.
        """
        port = free_port()
        numbered = [[n, port, *arguments] for n, arguments in enumerate(of_each)]
        self._process.stdin.write(json.dumps([function, numbered, seconds]) + "\n")
        self._process.stdin.flush()
        results = json.loads(self._process.stdout.readline())
        return [Result(code, said, said) for code, said in results]

    def close(self) -> None:
        """Ends the child."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Started:
    """The command line in a process; what it says is read as it says it.

    One whose pipe is full would wait, and with it those that work with it.
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

    def until(
        self, true: Callable[[], bool], seconds: float = 240.0, every: float = 0.05
    ) -> None:
        """Waits until something is true; it is asked every so many seconds.

        Raises:
          AssertionError: if it has ended, or after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not true():
            assert self._process.poll() is None, f"it has ended: {self.ended(1.0)}"
            assert time.monotonic() < deadline, f"not after {seconds} s: {self._err}"
            time.sleep(every)

    def ended(self, seconds: float = 300.0) -> Result:
        """Waits for its end.

        Raises:
          AssertionError: after so many seconds, with where each of its threads was.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Python's own handler, which `environment` switches on, tells of threads.
            self._process.send_signal(signal.SIGABRT)
            self._read()
            raise AssertionError(f"not ended after {seconds} s: {self._err}") from None
        self._read()
        return Result(self._process.returncode, "".join(self._out), "".join(self._err))

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
      AssertionError: if they do not end, with what each of them said, and where each
        of its threads was.
    """
    with futures.ThreadPoolExecutor(len(processes)) as waiting:
        ends = [waiting.submit(process.ended) for process in processes]
    late = [str(end.exception()) for end in ends if end.exception()]
    assert not late, "\n\n".join(late)
    return [end.result() for end in ends]
