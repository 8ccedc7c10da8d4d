"""The environment of all tests, set before JAX is first imported.

Subprocesses inherit all of it, the compilation cache included.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py set it up"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

# Caches per run, not per machine: a stale program must not make a test pass.
# pytest-xdist's workers share those of their controller.
_OWNS_CACHE = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNS_CACHE:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ddaebm-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/jax"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

jaxtyping.install_import_hook("ddaebm_jax", "typechecking.check_functions")

# Repeatable, and without a time limit that a busy machine would break.
hypothesis.settings.register_profile(
    "tests", max_examples=15, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("tests")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove this run's caches."""
    del config
    if _OWNS_CACHE:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of reference numbers."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small run of 24 steps."""
    import runs

    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    runs.train(runs.small(), workdir)
    return workdir
