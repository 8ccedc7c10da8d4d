"""Shell scripts pass shellcheck, and a short soak finds nothing."""

import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from cli import ROOT, python

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


def test_ci_tests_the_oldest_versions_that_are_allowed():
    text = (ROOT / "setup.py").read_text()
    needed = re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL)[1]
    bounds = dict(re.findall(r'"([\w-]+)>=([\w.]+)"', needed))
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert pins.pop("jaxlib") == bounds["jax"] and pins == bounds


def test_a_short_soak():
    """benchmarks/RESULTS.md has a long one."""
    result = python("benchmarks/soak.py", "--cycles=2", "--longest=6")
    assert result.code == 0, result.err
    (compared,) = re.findall(r"checkpoints compared +(\d+)", result.out)
    assert int(compared) > 0
