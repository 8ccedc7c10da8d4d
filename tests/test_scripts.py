"""Shell scripts pass shellcheck, and a short soak finds nothing."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli import ROOT, environment

SCRIPTS = (
    "launch/tpu_pod.sh",
    "launch/slurm.sbatch",
    "launch/local_processes.sh",
    ".ci/run",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str):
    path = [sysconfig.get_path("scripts"), *sys.path]
    tool = shutil.which("shellcheck", path=":".join(path)) or shutil.which("shellcheck")
    assert tool is not None, "pip install -e '.[test]' brings shellcheck"
    result = subprocess.run(
        [tool, str(ROOT / script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "launch" in name])
def test_each_script_tells_its_usage_on_top(script: str):
    head = (ROOT / script).read_text().splitlines()[:20]
    assert head[0].startswith("#!")
    assert any(Path(script).name in line for line in head if line.startswith("#"))


def test_a_short_soak():
    """benchmarks/RESULTS.md has a long one."""
    result = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--cycles=4", "--longest=6"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (compared,) = re.findall(r"checkpoints compared +(\d+)", result.stdout)
    assert int(compared) > 0
