"""Starts real processes that work together, as on several machines."""

import json
import socket
import subprocess
import sys
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


def start(
    flags: list[str], *of_each: list[str], devices: int = 2
) -> list[subprocess.Popen]:
    """Starts the command line, one process for each list of additional flags."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(MAIN),
                *flags,
                *own,
                "--distributed",
                f"--coordinator=localhost:{port}",
                f"--num_processes={len(of_each)}",
                f"--process_id={number}",
            ],
            env=environment(devices),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number, own in enumerate(of_each)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for processes; returns exit code, output and errors of each."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        results.append((process.returncode, out, err))
    return results
