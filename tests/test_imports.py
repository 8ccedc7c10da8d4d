"""The core needs jax, flax, optax, jaxtyping and numpy, and nothing else."""

import subprocess
import sys

from cli import ROOT, environment

_CORE = (
    "diffusion objective game step sampling density sharding models models.mlp "
    "models.ncsnpp models.encoder models.resample data.synthetic data.tabular "
    "data.images evaluation.plane evaluation.digits evaluation.fid "
    "evaluation.detectors evaluation.outlier_sets evaluation.inception "
    "evaluation.inception_weights weights interop"
).split()

_CHECK = f"""
import sys
blocked = "tensorflow clu orbax ml_collections matplotlib PIL sklearn grain torch"
for name in blocked.split():
    sys.modules[name] = None
import importlib
for name in {_CORE!r}:
    importlib.import_module("ddaebm_jax." + name)
"""


def test_the_core_imports_without_the_rest():
    result = subprocess.run(
        [sys.executable, "-c", _CHECK],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
