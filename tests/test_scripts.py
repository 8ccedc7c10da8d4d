"""Shell scripts, and the package as it is installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli import ROOT

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


def test_a_wheel_holds_the_recipes_and_the_command(tmp_path: Path):
    """Built beside the checkout, and imported from where it was unpacked."""
    copy = tmp_path / "copy"
    for name in ("ddaebm_jax", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    (points,) = tmp_path.glob("site/*.dist-info/entry_points.txt")
    assert "ddaebm = ddaebm_jax.commands.cli:main" in points.read_text()
    code = "import ddaebm_jax as d; assert 'site' in d.__file__; d.recipe('table')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", check=True)
