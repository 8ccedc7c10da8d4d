"""What mathematics, networks and features need: jax, flax, optax, jaxtyping, numpy."""

import subprocess
import sys

from cli import ROOT, environment
from test_architecture import MATHEMATICS, MODULES

_ROOMS = (*MATHEMATICS, "sharding", "weights", "errors", "files")
_CORE = [
    name
    for name in MODULES
    if name == "ddaebm_jax"
    or name.split(".")[1] in _ROOMS
    or name in ("ddaebm_jax.evaluation.fid", "ddaebm_jax.evaluation.inception")
]
_CHECK = f"""
import importlib, sys
others = "PIL absl clu etils filelock grain lmdb matplotlib ml_collections orbax pandas"
others += " safetensors sklearn tensorboard tensorflow tensorflow_datasets torch"
needed = set(sys.modules)
import flax.linen, jax, jaxtyping, numpy, optax
needed = set(sys.modules) - needed
for name in others.split():
    if name not in needed:  # What those five bring is there anyway.
        sys.modules[name] = None
for name in {_CORE!r}:
    importlib.import_module(name)
"""


def test_the_core_imports_without_the_rest():
    assert len(_CORE) > 20
    result = subprocess.run(
        [sys.executable, "-c", _CHECK],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
