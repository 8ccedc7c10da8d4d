"""The recipes that come with the package: the files of `configs/`, by name."""

import importlib.util
from pathlib import Path
from typing import Any

from ddaebm_jax.config.checks import ConfigError


def folder() -> Path:
    """Return the folder of the recipes, of an installed package or of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in folder().glob("[a-z]*.py"))


def load(name: str) -> Any:
    """Return a recipe's config, by its name.

    Raises:
      ConfigError: if there is no such recipe.
    """
    if name not in names():
        raise ConfigError(f"no recipe is called {name!r}; there are: {names()}")
    path = folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ddaebm_jax_recipe_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
