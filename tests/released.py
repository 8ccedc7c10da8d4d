"""The released recipes, and the names in the authors' state_dicts.

Typed from those files and their descriptions, independently of `interop`.
"""

import itertools
import runpy
from typing import Any

import ml_collections
import numpy as np
from cli import ROOT

from ddaebm_jax import config as config_lib

# The networks' names in the reference numbers.
LETTERS = {"energy": "D", "generator": "G", "posterior": "E"}

Shapes = dict[str, tuple[int, ...]]

# The U-Nets' modules between the first three and the last two. i>o: residual block from
# i·nf to o·nf channels; r: resampling; a: attention of o·nf channels; p: convolution of
# the input pyramid; c: the image's channels.
UNETS = {
    "cifar10": """
        1>1 1>1 1>1r c>1p
        1>2 2>2a 2>2 2>2a 2>2r 1>2p
        2>2 2>2 2>2r 2>2p
        2>2 2>2
        2>2 2>2a 2>2
        4>2 4>2 4>2 2>2r
        4>2 4>2 4>2 2>2r
        4>2 4>2 3>2 2>2a 2>2r
        3>1 2>1 2>1""",
    "celeba64": """
        1>1 1>1 1>1r c>1p
        1>1 1>1 1>1r 1>1p
        1>2 2>2a 2>2 2>2a 2>2r 1>2p
        2>2 2>2 2>2r 2>2p
        2>4 4>4
        4>4 4>4a 4>4
        8>4 8>4 6>4 4>4r
        6>2 4>2 4>2 2>2r
        4>2 4>2 3>2 2>2a 2>2r
        3>1 2>1 2>1 1>1r
        2>1 2>1 2>1""",
    "lsun_church128": """
        1>1 1>1 1>1r
        1>2 2>2 2>2r
        2>2 2>2 2>2r
        2>4 4>4a 4>4 4>4a 4>4r
        4>4 4>4
        4>4 4>4a 4>4
        8>4 8>4 8>4 4>4r
        8>4 8>4 6>4 4>4a 4>4r
        6>2 4>2 4>2 2>2r
        4>2 4>2 3>2 2>2r
        3>1 2>1 2>1""",
    # DDGAN's (Xiao et al. 2022), whose CIFAR-10 generator has the modules of cifar10.
    "celebahq256": """
        1>1 1>1 1>1r c>1p  1>1 1>1 1>1r 1>1p
        1>2 2>2 2>2r 1>2p  2>2 2>2 2>2r 2>2p
        2>4 4>4a 4>4 4>4a 4>4r 2>4p  4>4 4>4
        4>4 4>4a 4>4
        8>4 8>4 8>4 4>4r  8>4 8>4 6>4 4>4a 4>4r
        6>2 4>2 4>2 2>2r  4>2 4>2 3>2 2>2r
        3>1 2>1 2>1 1>1r  2>1 2>1 2>1""",
    # Not released: one level at 8 × 8.
    "digits": "1>1 1>1a 1>1 1>1a 1>1 2>1 2>1 1>1a",
}


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """Return the shapes of a Dense layer or a convolution."""
    shapes = {f"{name}.weight": shape}
    return shapes | {f"{name}.bias": shape[:1]} if bias else shapes


def _block(name: str, i: int, o: int, nf: int, z: int, resamples: bool) -> Shapes:
    shapes = {}
    for number, width in enumerate((i, o)):
        if z:
            norm = f"{name}.GroupNorm_{number}.style"
            shapes |= _layer(norm, 2 * width, z)
        else:
            shapes |= _layer(f"{name}.GroupNorm_{number}", width)
    shapes |= _layer(f"{name}.Conv_0", o, i, 3, 3)
    shapes |= _layer(f"{name}.Dense_0", o, 4 * nf)
    shapes |= _layer(f"{name}.Conv_1", o, o, 3, 3)
    if resamples or i != o:
        shapes |= _layer(f"{name}.Conv_2", o, i, 1, 1)
    return shapes


def _attention(name: str, width: int) -> Shapes:
    shapes = _layer(f"{name}.GroupNorm_0", width)
    for number in range(4):
        shapes[f"{name}.NIN_{number}.W"] = (width, width)
        shapes[f"{name}.NIN_{number}.b"] = (width,)
    return shapes


def unet_shapes(recipe: str, model: Any, channels: int, is_generator: bool) -> Shapes:
    """Return the names and shapes in netD_*.pth or netG_*.pth."""
    nf, z = model.unet.nf, model.unet.z_emb_dim if is_generator else 0
    shapes = _layer("all_modules.0", 4 * nf, nf)
    shapes |= _layer("all_modules.1", 4 * nf, 4 * nf)
    shapes |= _layer("all_modules.2", nf, channels, 3, 3)
    modules = UNETS[recipe].split()
    for number, module in enumerate(modules, 3):
        name = f"all_modules.{number}"
        before, after = module.rstrip("rap").split(">")
        i, o = channels if before == "c" else int(before) * nf, int(after) * nf
        match module[-1]:
            case "a":
                shapes |= _attention(name, o)
            case "p":
                shapes |= _layer(f"{name}.Conv2d_0", o, i, 3, 3)
            case kind:
                shapes |= _block(name, i, o, nf, z, resamples=kind == "r")
    shapes |= _layer(f"all_modules.{len(modules) + 3}", nf)
    shapes |= _layer(f"all_modules.{len(modules) + 4}", channels, nf, 3, 3)
    if is_generator:
        shapes |= _layer("z_transform.1", z, model.nz)
        for number in range(model.unet.n_mlp):
            shapes |= _layer(f"z_transform.{2 * number + 3}", z, z)
    return shapes


def posterior_shapes(recipe: str, model: Any, channels: int) -> Shapes:
    """Return the names and shapes in netE_*.pth."""
    nz, ngf, t = model.nz, model.encoder.ngf, model.encoder.t_emb_dim
    shapes = _layer("t_embed.main.0", t, t) | _layer("t_embed.main.2", t, t)
    if recipe in ("lsun_church128", "celebahq256"):
        shapes |= _layer("start_conv.conv", 2 * ngf, 2 * channels, 1, 1)
        widths = [ngf * multiple for multiple in (2, 4, 8, 8, 8, 8, 8)]
        for number, (i, o) in enumerate(itertools.pairwise(widths), 1):
            name = f"conv{number}"
            shapes |= _layer(f"{name}.conv1.0.conv", o, i, 3, 3)
            shapes |= _layer(f"{name}.conv2.0.conv", o, o, 3, 3)
            shapes |= _layer(f"{name}.dense_t1", o, t)
            shapes |= _layer(f"{name}.skip.0.conv", o, i, 1, 1, bias=False)
        shapes |= _layer("final_conv.conv", 8 * ngf, 8 * ngf + 1, 3, 3)
        shapes |= _layer("end_linear_mean", nz, 8 * ngf)
        return shapes | _layer("end_linear_logvar", nz, 8 * ngf)
    number = {"digits": 2, "cifar10": 4, "celeba64": 5}[recipe]
    shapes |= _layer("conv1", ngf, 2 * channels, 3, 3, bias=False)
    for i in range(1, number):
        o = ngf * 2**i
        shapes |= _layer(f"conv{i + 1}", o, o // 2, 4, 4, bias=False)
    for i in range(number):
        shapes |= _layer(f"dense_t{i + 1}", ngf * 2**i, t)
    width = ngf * 2 ** (number - 1)
    shapes |= _layer(f"conv{number + 1}1", nz, width, 4, 4)
    return shapes | _layer(f"conv{number + 1}2", nz, width, 4, 4)


def recipe(name: str) -> ml_collections.ConfigDict:
    """Return the config of configs/{name}.py, or the one docs/images.md describes."""
    if name == "celebahq256":
        config = recipe("celeba64")
        config.data.image_size = 256
        config.diffusion.update({"num_steps": 2, "max_beta": 0.9999})
        config.model.unet.update({"ch_mult": (1, 1, 2, 2, 4, 4), "n_mlp": 3})
        config_lib.validate(config)
        return config
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def reference_config() -> ml_collections.ConfigDict:
    """Return the recipe of the reference numbers, with the released game."""
    config = config_lib.base()
    config.data.update({"name": "folder", "path": "none", "batch_size": 3})
    config.diffusion.min_posterior_var = 1e-4
    config.model.update({"name": "ncsnpp", "nz": 10})
    unet = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.0}
    config.model.unet.update({**unet, "z_emb_dim": 16})
    config.model.encoder.update({"ngf": 4, "t_emb_dim": 16})
    config.game.update({"recon": "mse", "recon_latent": "prior"})
    config.game.recon_floor = None
    return config


def state_dict(paths: dict[str, tuple[str, ...]], params: Any) -> dict[str, np.ndarray]:
    """Return Flax's parameters or gradients by PyTorch's names, in its layout."""
    arrays = {}
    for name, path in paths.items():
        array = params
        for part in path:
            array = array[part]
        array = np.asarray(array)
        if array.ndim == 4:  # HWIO → OIHW
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2 and name.endswith(".weight"):
            array = array.T
        arrays[name] = array
    return arrays
