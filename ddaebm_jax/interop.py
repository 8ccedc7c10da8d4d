"""Brings the authors' PyTorch checkpoints of the image model into a run directory.

  python -m ddaebm_jax.interop --generator=netG.pth --energy=netD.pth \
      --posterior=netE.pth --config=configs/cifar10.py --workdir=runs/imported

`--mode=sample` and `--mode=score` then work from that directory, and `--mode=train`
goes on from the imported weights. Files are PyTorch state_dicts (`.pth`, `.pt`; read
without torch, and no pickle in them is executed) or NPZ files with the same names. A
leading `module.` of data-parallel training is dropped.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddaebm_jax import torch_files
from ddaebm_jax.config.choices import RESIDUAL_FROM
from ddaebm_jax.data.npz_files import NpzFile
from ddaebm_jax.errors import InputError
from ddaebm_jax.models import Players

FlaxPath = tuple[str, ...]


def _as_is(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def _channels_last(array: np.ndarray) -> np.ndarray:
    """OIHW → HWIO."""
    return array.transpose(2, 3, 1, 0)


class Target(NamedTuple):
    """Where a PyTorch parameter goes.

    Attributes:
      path: of the parameter in Flax's tree, under `params`.
      convert: from PyTorch's layout to Flax's.
      ndim: axes of the PyTorch array, which `convert` relies on.
    """

    path: FlaxPath
    convert: Callable[[np.ndarray], np.ndarray]
    ndim: int


Names = dict[str, Target]


def _dense(prefix: str, path: FlaxPath) -> Names:
    return {
        f"{prefix}.weight": Target((*path, "kernel"), _transposed, 2),
        f"{prefix}.bias": Target((*path, "bias"), _as_is, 1),
    }


def _conv(prefix: str, path: FlaxPath, bias: bool = True) -> Names:
    names = {f"{prefix}.weight": Target((*path, "kernel"), _channels_last, 4)}
    if bias:
        names[f"{prefix}.bias"] = Target((*path, "bias"), _as_is, 1)
    return names


def _norm(prefix: str, path: FlaxPath) -> Names:
    return {
        f"{prefix}.weight": Target((*path, "scale"), _as_is, 1),
        f"{prefix}.bias": Target((*path, "bias"), _as_is, 1),
    }


def _block(prefix: str, path: FlaxPath, skip: bool, adaptive: bool) -> Names:
    names: Names = {}
    for i in range(2):
        norm = (*path, f"norm_{i}")
        if adaptive:
            names |= _dense(f"{prefix}.GroupNorm_{i}.style", (*norm, "style"))
        else:
            names |= _norm(f"{prefix}.GroupNorm_{i}", norm)
        names |= _conv(f"{prefix}.Conv_{i}", (*path, f"conv_{i}"))
    names |= _dense(f"{prefix}.Dense_0", (*path, "time"))
    if skip:
        names |= _conv(f"{prefix}.Conv_2", (*path, "skip"))
    return names


def _attention(prefix: str, path: FlaxPath) -> Names:
    names = _norm(f"{prefix}.GroupNorm_0", (*path, "norm"))
    for i, part in enumerate(("query", "key", "value", "out")):
        # These are kept as [in, out] in PyTorch too.
        names[f"{prefix}.NIN_{i}.W"] = Target((*path, part, "kernel"), _as_is, 2)
        names[f"{prefix}.NIN_{i}.b"] = Target((*path, part, "bias"), _as_is, 1)
    return names


def _unet_layers(unet: Any, side: int) -> Iterator[tuple[str, str]]:
    """Yields (kind, name) of the U-Net's layers, in the order of PyTorch's list."""
    last = len(unet.ch_mult) - 1
    yield from (("dense", "time_0"), ("dense", "time_1"), ("conv", "conv_in"))
    for level in range(last + 1):
        attended = (side >> level) in unet.attn_resolutions
        for i in range(unet.num_res_blocks):
            yield "block", f"down_{level}_block_{i}"
            if attended:
                yield "attention", f"down_{level}_attention_{i}"
        if level < last:
            yield "block", f"down_{level}_resample"
            if unet.progressive_input == "residual":
                yield "pyramid", f"down_{level}_pyramid"
    yield "block", "middle_block_0"
    yield "attention", "middle_attention"
    yield "block", "middle_block_1"
    for level in range(last, -1, -1):
        for i in range(unet.num_res_blocks + 1):
            yield "block", f"up_{level}_block_{i}"
        if (side >> level) in unet.attn_resolutions:
            yield "attention", f"up_{level}_attention"
        if level > 0:
            yield "block", f"up_{level}_resample"
    yield from (("norm", "norm_out"), ("conv", "conv_out"))


def unet_names(model: Any, side: int, params: Any, adaptive: bool) -> Names:
    """Returns where every parameter of the energy or the generator goes.

    Args:
      model: the config's `model` section.
      side: of the images.
      params: the network's parameters, or their shapes.
      adaptive: whether this is the generator.
    """
    names: Names = {}
    for i, (kind, name) in enumerate(_unet_layers(model.unet, side)):
        prefix, path = f"all_modules.{i}", ("trunk", name)
        if kind == "block":
            names |= _block(prefix, path, "skip" in params["trunk"][name], adaptive)
        elif kind == "attention":
            names |= _attention(prefix, path)
        elif kind == "pyramid":
            names |= _conv(f"{prefix}.Conv2d_0", path)
        else:
            make = {"dense": _dense, "conv": _conv, "norm": _norm}[kind]
            names |= make(prefix, path)
    if adaptive:
        for i in range(model.unet.n_mlp + 1):
            names |= _dense(f"z_transform.{2 * i + 1}", (f"latent_{i}",))
    return names


def posterior_names(side: int) -> Names:
    """Returns where every parameter of the posterior goes, by the images' side."""
    names: Names = {}
    for i in range(2):
        names |= _dense(f"t_embed.main.{2 * i}", ("time", f"dense_{i}"))
    if side >= RESIDUAL_FROM:
        names |= _conv("start_conv", ("conv_in",))
        for i in range(6):
            prefix, path = f"conv{i + 1}", (f"block_{i}",)
            for j in range(2):
                names |= _conv(f"{prefix}.conv{j + 1}.0.conv", (*path, f"conv_{j}"))
            names |= _dense(f"{prefix}.dense_t1", (*path, "time"))
            names |= _conv(f"{prefix}.skip.0.conv", (*path, "skip"), bias=False)
        names |= _conv("final_conv.conv", ("conv_out",))
        names |= _dense("end_linear_mean", ("mu",))
        names |= _dense("end_linear_logvar", ("logvar",))
        return names
    depth = side.bit_length() - 2
    for i in range(depth):
        names |= _conv(f"conv{i + 1}", (f"conv_{i}",), bias=False)
        names |= _dense(f"dense_t{i + 1}", (f"time_{i}",))
    names |= _conv(f"conv{depth + 1}1", ("mu",))
    names |= _conv(f"conv{depth + 1}2", ("logvar",))
    return names


def names_of(model: Any, side: int, shapes: Players) -> Players:
    """Returns the names of all three networks; `shapes` are of their variables."""
    return Players(
        energy=unet_names(model, side, shapes.energy["params"], adaptive=False),
        generator=unet_names(model, side, shapes.generator["params"], adaptive=True),
        posterior=posterior_names(side),
    )


def _shown(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def convert(
    state_dict: Mapping[str, np.ndarray], names: Names, shapes: Any, origin: str
) -> dict:
    """Converts a state_dict to Flax's parameters.

    Args:
      state_dict: PyTorch's names → arrays.
      names: where each goes.
      shapes: the parameters to be, or their shapes.
      origin: what the error messages call the file.

    Raises:
      InputError: naming parameters that are missing, unknown, of another shape, or
        not finite.
    """
    missing = [name for name in names if name not in state_dict]
    unknown = [name for name in state_dict if name not in names]
    if missing or unknown:
        faults = [
            f"{fault}: {_shown(listed)}"
            for fault, listed in (("missing", missing), ("unknown", unknown))
            if listed
        ]
        raise InputError(
            f"{origin} does not hold the parameters that the config describes; "
            f"{'; '.join(faults)}; give the config that these weights were trained "
            "with, and each file to its own flag"
        )
    params: dict = {}
    for name, target in names.items():
        array = np.asarray(state_dict[name])
        wanted: Any = shapes
        for part in target.path:
            wanted = wanted[part]
        fits = array.ndim == target.ndim
        converted = target.convert(array) if fits else array
        if not fits or converted.shape != wanted.shape:
            ours = "×".join(map(str, wanted.shape))
            raise InputError(
                f"{origin}: {name} has shape {'×'.join(map(str, array.shape))}, which "
                f"does not fit {'/'.join(target.path)} ({ours}); give the config that "
                "these weights were trained with"
            )
        converted = np.ascontiguousarray(
            torch_files.finite_float32(name, converted, origin, "use another file")
        )
        node = params
        for part in target.path[:-1]:
            node = node.setdefault(part, {})
        node[target.path[-1]] = converted
    return params


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    advice = "write it with numpy.savez(path, **arrays)"
    with NpzFile(path, torch_files.MAX_BYTES, advice) as file:
        return {name: file.read(array) for name, array in file.arrays.items()}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a `.pth` / `.pt` or `.npz` file of named weights.

    Raises:
      InputError: if it is not there, cannot be read, or holds anything but weights.
    """
    path = Path(path)
    torch = torch_files.read_state_dict
    readers = {".pth": torch, ".pt": torch, ".npz": _read_npz}
    if path.suffix not in readers:
        raise InputError(
            f"{path}: the suffix is '{path.suffix}'; allowed: {', '.join(readers)}"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    values = readers[path.suffix](path)
    return {name.removeprefix("module."): value for name, value in values.items()}


def import_variables(config: Any, files: Players) -> Players:
    """Reads three files into the variables of the networks that a config describes.

    Args:
      config: an image recipe.
      files: of each network, the path of its state_dict.

    Raises:
      InputError: for a recipe without images, or a file that does not fit.
    """
    from ddaebm_jax import models

    if config.model.name != "ncsnpp":
        raise InputError(
            f"model.name is '{config.model.name}'; weights are imported for image "
            "recipes ('ncsnpp'), for example --config=configs/cifar10.py"
        )
    side = config.data.image_size
    networks = models.build(config.model, (side, side, config.data.channels))
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    names = names_of(config.model, side, shapes)
    return Players(
        *(
            {
                "params": jax.tree.map(
                    jnp.asarray,
                    convert(read_state_dict(path), one, shape["params"], str(path)),
                )
            }
            for path, one, shape in zip(files, names, shapes, strict=True)
        )
    )


def import_run(config: Any, files: Players, workdir: str | Path) -> None:
    """Makes a run directory at step 0 with imported weights.

    Raises:
      InputError: as `import_variables`, or if the directory is not empty; nothing has
        been written then.
    """
    from ddaebm_jax import config as config_lib
    from ddaebm_jax import experiment as experiments
    from ddaebm_jax import game
    from ddaebm_jax.training import checkpoints as checkpointing
    from ddaebm_jax.training import run_directory

    workdir = Path(workdir)
    config_lib.validate(config)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} exists already; name a new directory")
    variables = import_variables(config, files)
    experiment = experiments.build(config, workdir, open_images=False)
    state = game.init_state(
        jax.random.key(0),
        experiment.networks._replace(init=lambda key: variables),
        experiment.optimizers,
        experiment.game,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    run_directory.write_config(workdir, config)
    checkpoints = checkpointing.Checkpoints(workdir)
    try:
        info = {"config": config.to_dict(), "data": None, "input": None}
        checkpoints.save(state, info)
        checkpoints.wait()
    finally:
        checkpoints.close()


def main(argv: list[str]) -> None:
    """Imports what the flags name."""
    from absl import flags

    from ddaebm_jax.commands import command_line

    values = flags.FLAGS
    if len(argv) > 1:
        command_line.fail(f"what is {argv[1]!r}? Flags start with --")
    files = Players(values.energy, values.generator, values.posterior)
    command_line.in_one_line(lambda: import_run(values.config, files, values.workdir))
    print(values.workdir)


if __name__ == "__main__":
    from absl import app, flags

    from ddaebm_jax.commands.command_line import parse_flags
    from ddaebm_jax.config.flags import define_config_flag

    define_config_flag("An image recipe.")
    flags.DEFINE_string("generator", None, "The generator's state_dict, netG_*.pth.")
    flags.DEFINE_string("energy", None, "The energy's state_dict, netD_*.pth.")
    flags.DEFINE_string("posterior", None, "The encoder's state_dict, netE_*.pth.")
    flags.DEFINE_string("workdir", None, "The run directory to make.")
    flags.mark_flags_as_required(
        ["config", "generator", "energy", "posterior", "workdir"]
    )
    app.run(main, flags_parser=parse_flags)
