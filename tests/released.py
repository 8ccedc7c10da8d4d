"""The released recipes, and PyTorch's layout of their weights."""

import importlib.util
from typing import Any

import ml_collections
import numpy as np
from cli import ROOT

from ddaebm_jax import config as config_lib
from ddaebm_jax import interop

# What the README of the reference numbers calls the networks.
LETTERS = {"energy": "D", "generator": "G", "posterior": "E"}


def recipe(name: str) -> ml_collections.ConfigDict:
    """Returns the config of configs/{name}.py."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def reference_config() -> ml_collections.ConfigDict:
    """Returns the recipe of the reference numbers, with the released game."""
    config = config_lib.base()
    config.data.name = "folder"
    config.data.path = "none"
    config.data.batch_size = 3
    config.diffusion.min_posterior_var = 1e-4
    config.model.name = "ncsnpp"
    config.model.nz = 10
    config.model.unet.nf = 16
    config.model.unet.ch_mult = (1, 2)
    config.model.unet.num_res_blocks = 1
    config.model.unet.dropout = 0.0
    config.model.unet.z_emb_dim = 16
    config.model.encoder.ngf = 4
    config.model.encoder.t_emb_dim = 16
    config.game.recon = "mse"
    config.game.recon_latent = "prior"
    config.game.recon_floor = None
    return config


def torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """Returns Flax's array in PyTorch's layout: HWIO → OIHW, [in, out] → [out, in].

    The 1×1 layers of attention (`W`) are [in, out] in both.
    """
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2 and name.endswith(".weight"):
        return array.T
    return array


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns what lies at a path of a nested dict."""
    for part in path:
        tree = tree[part]
    return tree


def state_dict(names: interop.Names, params: Any) -> dict[str, np.ndarray]:
    """Returns Flax's parameters, or gradients, as PyTorch would hold them."""
    return {
        name: torch_layout(name, np.asarray(at(params, target.path)))
        for name, target in names.items()
    }
