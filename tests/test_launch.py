"""The launch scripts, with stand-ins for gcloud, srun and Python first on PATH."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cli import ROOT

LAUNCH = ROOT / "launch"
RUN = ("run", "--config=c.py", "--workdir=/mnt/a run")

# A slice's state is the file `state`; a line of `fails` names a call that fails, once.
_GCLOUD = """
echo "$*" >> "$FAKE/calls"
action=$4
[[ $* != *launch/main.py* ]] || action=command
if [[ $(head -n 1 "$FAKE/fails") == "$action" ]]; then
  sed -i 1d "$FAKE/fails"
  [[ $action != command ]] || echo PREEMPTED > "$FAKE/state"
  echo "ERROR: no capacity" >&2
  exit 1
fi
if [[ $action == command && $(head -n 1 "$FAKE/fails") == saved ]]; then
  sed -i 1d "$FAKE/fails"
  echo PREEMPTED > "$FAKE/state"
fi
case $action in
  describe)
    echo "WARNING: an update is available" >&2
    if [[ ! -e $FAKE/state ]]; then
      echo "ERROR: (gcloud) NOT_FOUND: Resource 'x' was not found" >&2
      exit 1
    fi
    cat "$FAKE/state"
    ;;
  create) echo READY > "$FAKE/state" ;;
  delete) rm "$FAKE/state" ;;
  scp) [[ -e $5 ]] ;;
esac
"""
_GIT = """
for one in "$@"; do
  [[ $one != --output=* ]] || touch "${one#--output=}"
done
"""


def _fake(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}")
    path.chmod(0o755)
    return path


def _run(
    script: str, *argv: str, path: Path, **env: str
) -> subprocess.CompletedProcess:
    unset = ("ZONE", "TPU_NAME", "SPOT", "ACCELERATOR", "VERSION", "PAUSE", "TRIES")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *argv],
        env={**kept, "PATH": f"{path}:{os.environ['PATH']}", **env},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class Pod:
    """`tpu_pod.sh` with its stand-ins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = folder / "bin"
        _fake(self._bin, "gcloud", _GCLOUD)
        _fake(self._bin, "git", _GIT)
        (folder / "fails").touch()
        (folder / "calls").touch()

    def __call__(self, *argv: str, **env: str) -> subprocess.CompletedProcess:
        settings = {"ZONE": "z", "ACCELERATOR": "v4-32", "PAUSE": "0"}
        found = _run(
            "tpu_pod.sh",
            *argv,
            path=self._bin,
            FAKE=str(self._folder),
            TMPDIR=str(self._folder),
            **{**settings, **env},
        )
        assert not list(self._folder.glob("tmp.*"))  # Nothing is left behind.
        return found

    def is_in(self, state: str) -> None:
        """Give the slice a state."""
        (self._folder / "state").write_text(state)

    def fails_in(self, *actions: str) -> None:
        """Let calls fail, one after the other.

        `command`: it is preempted; `saved`: likewise, and ends with 0.
        """
        (self._folder / "fails").write_text("".join(f"{one}\n" for one in actions))

    def text(self) -> str:
        """Return all calls as they were made."""
        return (self._folder / "calls").read_text()

    def calls(self) -> list[str]:
        """Return what was called, but for `describe`."""
        names = []
        # The command to install has several lines.
        for name, rest in re.findall(
            r"^compute tpus tpu-vm (\w+) (.*)", self.text(), re.M
        ):
            if name == "ssh":
                name = "command" if "launch/main.py" in rest else "install"
            if name != "describe":
                names.append(name)
        return names


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


NEW = ["create", "scp", "install", "command"]


def test_a_slice_is_made_and_installed_once_and_run_on(pod: Pod):
    for calls in (NEW, [*NEW, "command"]):
        found = pod(*RUN, SPOT="1", TPU_NAME="mine")
        assert found.returncode == 0, found.stderr
        assert pod.calls() == calls
    created = "create mine --zone=z --spot --accelerator-type=v4-32 --version="
    assert created in pod.text()
    assert "--config=c.py --workdir=/mnt/a\\ run --distributed" in pod.text()


@pytest.mark.parametrize("ending", ["command", "saved"])
@pytest.mark.parametrize("times", [1, 3])
def test_after_a_preemption_the_slice_is_made_again(pod: Pod, times: int, ending: str):
    pod.fails_in(*[ending] * times)
    found = pod(*RUN, TRIES="2")
    assert found.returncode == 0, found.stderr
    assert pod.calls() == [*NEW, *["delete", *NEW] * times]


@pytest.mark.parametrize(
    ("action", "message", "again"),
    [
        ("create", "cannot be made", ["create", *NEW]),
        ("describe", "is UNKNOWN", NEW),
        ("scp", "cannot be installed on", ["create", "scp", *NEW[1:]]),
    ],
)
def test_failed_calls_are_repeated_a_limited_number_of_times(
    pod: Pod, action: str, message: str, again: list[str]
):
    pod.fails_in(action)
    found = pod(*RUN)
    assert found.returncode == 0, found.stderr
    assert "no capacity" in found.stderr
    assert f"{message}; again in 0 s (1 of at most 60 times)" in found.stderr
    assert pod.calls() == again
    pod("delete")
    before = len(pod.calls())
    pod.fails_in(*[action] * 9)
    found = pod(*RUN, TRIES="4")
    assert found.returncode == 1
    assert f"{message}; given up after 4 times" in found.stderr.splitlines()[-1]
    assert pod.calls()[before:].count(action) == (0 if action == "describe" else 4)


@pytest.mark.parametrize(
    ("state", "fails", "message", "calls"),
    [
        ("PREEMPTED", ["delete"] * 9, "cannot be deleted; given up", ["delete"] * 3),
        ("STOPPED", [], "is 'STOPPED'; start or delete it", []),
        ("CREATING", [], "is CREATING; given up", []),
    ],
)
def test_an_unusable_slice_is_reported(
    pod: Pod, state: str, fails: list[str], message: str, calls: list[str]
):
    pod.is_in(state)
    pod.fails_in(*fails)
    found = pod(*RUN, TRIES="3")
    assert found.returncode == 1 and message in found.stderr
    assert pod.calls() == calls


def test_a_command_that_fails_is_not_repeated(pod: Pod, tmp_path: Path):
    pod.is_in("READY")
    script = _GCLOUD.replace("echo PREEMPTED", "echo READY")
    _fake(tmp_path / "bin", "gcloud", script)
    pod.fails_in("command")
    found = pod(*RUN)
    assert found.returncode == 1 and "the command failed on a slice" in found.stderr
    assert pod.calls() == ["command"]


# --- Slurm ------------------------------------------------------------------------


def _submit(tmp_path: Path, *argv: str, code: int = 0) -> subprocess.CompletedProcess:
    _fake(tmp_path / "bin", "srun", f'printf "%s\\n" "$@"; exit {code}')
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    return _run(
        "slurm.sbatch",
        *argv,
        path=tmp_path / "bin",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_CPUS_PER_TASK="5",
        VENV="venv",
    )


def test_a_task_sees_all_gpus_of_its_node_and_runs_the_command(tmp_path: Path):
    """JAX takes the GPU of the task's number on its node: Slurm must bind none."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in lines
        if "=" in line and line.startswith("#SBATCH")
    )
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    result = _submit(tmp_path, "--config=c.py", "--workdir=/shared/a run")
    assert result.returncode == 0, result.stderr
    options = result.stdout.splitlines()
    assert "--gpu-bind=none" in options and "--cpus-per-task=5" in options
    assert not any("per-task" in o for o in (*asked, *options) if "gpu" in o)
    command = ["launch/main.py", "--config=c.py", "--workdir=/shared/a run"]
    assert options[-5:] == ["python", *command, "--distributed"]


def test_a_failed_task_fails_the_job_and_so_does_a_missing_run_directory(
    tmp_path: Path,
):
    assert _submit(tmp_path, "--workdir=/shared/run", code=3).returncode == 3
    result = _submit(tmp_path, "--config=c.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert "give --workdir=" in result.stderr


# --- Processes on this machine ----------------------------------------------------

_PYTHON = """
echo "$JAX_PLATFORMS $XLA_FLAGS $*"
case $* in
  *--process_id=1*)
    until [[ $CODE == 0 || -e $READY ]]; do sleep 0.1; done
    exit "$CODE"
    ;;
  *)
    [[ $CODE == 0 ]] && exit
    # Loses the first signal, as one that is only being started may.
    trap 'trap - TERM' TERM
    touch "$READY"
    while true; do sleep 0.1; done
    ;;
esac
"""


@pytest.mark.parametrize("code", [0, 3])
def test_processes_are_started_and_the_first_failure_ends_all(
    tmp_path: Path, code: int
):
    python = _fake(tmp_path / "bin", "fake_python", _PYTHON)
    found = _run(
        "local_processes.sh",
        "2",
        "--workdir=a run",
        path=tmp_path / "bin",
        PYTHON=str(python),
        CODE=str(code),
        READY=str(tmp_path / "ready"),
        DEVICES="4",
        XLA_FLAGS="",
    )
    assert found.returncode == code, found.stderr
    lines = sorted(found.stdout.splitlines())
    assert len(lines) == 2
    for line in lines:
        process = line[1]
        assert line.startswith(f"[{process}] cpu ")
        assert line.endswith(
            "--workdir=a run --distributed --coordinator=localhost:9876 "
            f"--num_processes=2 --process_id={process}"
        )
        assert "device_count=4" in line


# --- Usage ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "first", "argv"),
    [
        ("tpu_pod.sh", "Trains on a TPU pod slice", argv)
        for argv in ([], ["bogus"], ["--help"], ["run", "--a"])
    ]
    + [
        ("local_processes.sh", "Starts N processes", argv)
        for argv in ([], ["--help"], ["0", "--a"], ["2"])
    ],
)
def test_the_usage_needs_no_settings(
    tmp_path: Path, script: str, first: str, argv: list[str]
):
    found = _run(script, *argv, path=tmp_path)
    helped = argv == ["--help"]
    assert found.returncode == (0 if helped else 2)
    text = found.stdout if helped else found.stderr
    assert text.startswith(first) and "set -e" not in text
