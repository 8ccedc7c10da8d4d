"""Import of the authors' PyTorch checkpoints of the image model as a run directory.

  python -m ddaebm_jax.interop --generator=netG.pth --energy=netD.pth \
      --posterior=netE.pth --config=configs/cifar10.py --workdir=runs/imported

`--mode=sample` and `--mode=score` read that directory, and `--mode=train` continues
from the imported weights. The files are state_dicts, or NPZ or safetensors files with
the same names (see `weights.read_weights`). A leading `module.` of data-parallel
training is dropped.

The generators of Denoising Diffusion GANs (Xiao et al. 2022, arXiv 2112.07804) are the
same U-Net with the same names. Without --energy or --posterior that network keeps its
initial weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ddaebm_jax import models, torch_layout, weights
from ddaebm_jax.config import choices
from ddaebm_jax.errors import InputError
from ddaebm_jax.models import Players
from ddaebm_jax.paths import user_path

Paths = dict[str, tuple[str, ...]]
"""PyTorch's name of a parameter → its path in Flax's `params`."""

_REMEDY = "give the config of these weights, and each file to its own flag"


# PyTorch's names.


def _layer(name: str, *path: str, weight: str = "kernel", bias: bool = True) -> Paths:
    paths = {f"{name}.weight": (*path, weight)}
    if bias:
        paths[f"{name}.bias"] = (*path, "bias")
    return paths


def _norm(name: str, *path: str) -> Paths:
    return _layer(name, *path, weight="scale")


def _residual_block(name: str, has_skip: bool, is_adaptive: bool, *path: str) -> Paths:
    paths = _layer(f"{name}.Dense_0", *path, "time")
    for i in range(2):
        paths |= _layer(f"{name}.Conv_{i}", *path, f"conv_{i}")
        if is_adaptive:
            norm = f"{name}.GroupNorm_{i}.style"
            paths |= _layer(norm, *path, f"norm_{i}", "style")
        else:
            paths |= _norm(f"{name}.GroupNorm_{i}", *path, f"norm_{i}")
    if has_skip:
        paths |= _layer(f"{name}.Conv_2", *path, "skip")
    return paths


def _attention(name: str, *path: str) -> Paths:
    paths = _norm(f"{name}.GroupNorm_0", *path, "norm")
    for i, part in enumerate(("query", "key", "value", "out")):
        paths[f"{name}.NIN_{i}.W"] = (*path, part, "kernel")
        paths[f"{name}.NIN_{i}.b"] = (*path, part, "bias")
    return paths


def _unet_modules(unet: Any, side: int) -> Iterator[tuple[str, str]]:
    """Yield (kind, Flax's name) of the U-Net's modules as `all_modules` lists them."""
    last = len(unet.ch_mult) - 1
    yield from (("layer", "time_0"), ("layer", "time_1"), ("layer", "conv_in"))
    for level in range(last + 1):
        has_attention = (side >> level) in unet.attn_resolutions
        for i in range(unet.num_res_blocks):
            yield "block", f"down_{level}_block_{i}"
            if has_attention:
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
    yield from (("norm", "norm_out"), ("layer", "conv_out"))


def _unet_paths(unet: Any, side: int, params: Any) -> Paths:
    """Return the paths of the energy's or, if it embeds a latent, generator's U-Net."""
    is_adaptive = "latent_0" in params
    paths: Paths = {}
    for i, (kind, module) in enumerate(_unet_modules(unet, side)):
        name, path = f"all_modules.{i}", ("trunk", module)
        match kind:
            case "layer":
                paths |= _layer(name, *path)
            case "pyramid":
                paths |= _layer(f"{name}.Conv2d_0", *path)
            case "norm":
                paths |= _norm(name, *path)
            case "attention":
                paths |= _attention(name, *path)
            case "block":
                has_skip = "skip" in params["trunk"][module]
                paths |= _residual_block(name, has_skip, is_adaptive, *path)
    if is_adaptive:
        for i in range(unet.n_mlp + 1):
            paths |= _layer(f"z_transform.{2 * i + 1}", f"latent_{i}")
    return paths


def _conv_encoder_paths(side: int) -> Paths:
    depth = side.bit_length() - 2
    paths: Paths = {}
    for i in range(depth):
        paths |= _layer(f"conv{i + 1}", f"conv_{i}", bias=False)
        paths |= _layer(f"dense_t{i + 1}", f"time_{i}")
    paths |= _layer(f"conv{depth + 1}1", "mu")
    return paths | _layer(f"conv{depth + 1}2", "logvar")


def _residual_encoder_paths() -> Paths:
    paths = _layer("start_conv.conv", "conv_in")
    for i in range(6):
        name, block = f"conv{i + 1}", f"block_{i}"
        paths |= _layer(f"{name}.conv1.0.conv", block, "conv_0")
        paths |= _layer(f"{name}.conv2.0.conv", block, "conv_1")
        paths |= _layer(f"{name}.dense_t1", block, "time")
        paths |= _layer(f"{name}.skip.0.conv", block, "skip", bias=False)
    paths |= _layer("final_conv.conv", "conv_out")
    paths |= _layer("end_linear_mean", "mu")
    return paths | _layer("end_linear_logvar", "logvar")


def parameter_paths(model: Any, side: int, params: Players) -> Players:
    """Return each network's PyTorch names with their paths in Flax's parameters.

    Args:
      model: the config's `model` section.
      side: of the images.
      params: the networks' parameters, or their shapes.
    """
    time = _layer("t_embed.main.0", "time", "dense_0")
    time |= _layer("t_embed.main.2", "time", "dense_1")
    is_residual = side >= choices.RESIDUAL_FROM
    posterior = _residual_encoder_paths() if is_residual else _conv_encoder_paths(side)
    return Players(
        energy=_unet_paths(model.unet, side, params.energy),
        generator=_unet_paths(model.unet, side, params.generator),
        posterior=time | posterior,
    )


# Import.


def to_params(
    state_dict: weights.Arrays, paths: Paths, shapes: Any, origin: str
) -> dict:
    """Return a state_dict as Flax's parameters.

    Args:
      state_dict: PyTorch's names → arrays.
      paths: PyTorch's names → paths in the parameters; see `parameter_paths`.
      shapes: the parameters, or their shapes.
      origin: name of the file in error messages.

    Raises:
      InputError: naming parameters that are missing, unknown, of another shape, or not
        finite.
    """
    arrays = torch_layout.select_float32(state_dict, paths, origin, _REMEDY)
    return torch_layout.to_flax(arrays, paths, shapes, origin, _REMEDY)


def read_variables(config: Any, files: Players) -> Players:
    """Return the variables of a config's networks, read from files.

    Args:
      config: an image recipe.
      files: path of each network's state_dict; None: no file, and no variables.

    Raises:
      InputError: if the recipe is not one of images, has a reference density or
        patches, or a file does not fit it.
    """
    if config.model.name != "ncsnpp":
        raise InputError(
            f"model.name is '{config.model.name}'; weights are imported for image "
            "recipes ('ncsnpp'), for example --config=configs/cifar10.py"
        )
    if config.model.reference:
        raise InputError(
            f"model.reference is {config.model.reference}; imported energies have no "
            "reference density: set --config.model.reference=0"
        )
    if config.model.unet.patch_size > 1:
        raise InputError(
            f"model.unet.patch_size is {config.model.unet.patch_size}; the authors' "
            "networks have no patches: set --config.model.unet.patch_size=1"
        )
    side = config.data.image_size
    networks = models.build(config.model, (side, side, config.data.channels))
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    shapes = Players(*(variables["params"] for variables in shapes))
    paths = parameter_paths(config.model, side, shapes)

    def read(file: str | Path | None, *target: Any) -> dict | None:
        if file is None:
            return None
        arrays = weights.read_weights(file)
        arrays = {name.removeprefix("module."): a for name, a in arrays.items()}
        return {"params": jax.device_put(to_params(arrays, *target, str(file)))}

    return Players(*map(read, files, paths, shapes))


def import_run(config: Any, files: Players, workdir: str | Path) -> None:
    """Create a run directory at step 0 with imported weights.

    Args:
      config: an image recipe.
      files: path of each network's state_dict; None: it keeps its initial weights.
      workdir: the directory.

    Raises:
      InputError: as `read_variables`, or if the directory is not empty; nothing has
        been written then.
    """
    from ddaebm_jax import config as config_lib
    from ddaebm_jax import experiment as experiment_lib
    from ddaebm_jax.training import run_directory, trained_run
    from ddaebm_jax.training.checkpoints import Checkpoints

    workdir = user_path(workdir, "--workdir")
    config_lib.validate(config)
    config = config_lib.with_absolute_paths(config)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} exists already; name a new directory")
    variables = read_variables(config, files)
    untrained = [name for name, one in variables._asdict().items() if one is None]
    experiment = experiment_lib.build(config, workdir, open_images=False)

    def init(key: jax.Array) -> Players:
        initial = experiment.networks.init(key) if untrained else variables
        pairs = zip(variables, initial, strict=True)
        return Players(*(new or old for new, old in pairs))

    networks = experiment.networks._replace(init=init)
    state = experiment_lib.init_state(experiment._replace(networks=networks))
    workdir.mkdir(parents=True, exist_ok=True)
    run_directory.write_config(workdir, config)
    checkpoints = Checkpoints(workdir)
    try:
        info = {"config": config.to_dict(), "data": None, "input": None}
        checkpoints.save(state, {**info, "untrained": untrained})
        checkpoints.wait()
    finally:
        checkpoints.close()
    trained_run.warn_of_untrained(untrained)


def main(words: list[str]) -> None:
    """Import what the flags name."""
    from ddaebm_jax.commands import common

    common.run(_run, words)


def _run(values: Any) -> None:
    files = Players(values.energy, values.generator, values.posterior)
    import_run(values.config, files, values.workdir)
    from ddaebm_jax.commands import common

    common.show(values.workdir)


def _parse(argv: list[str]) -> list[str]:
    from absl import flags

    from ddaebm_jax.commands import common
    from ddaebm_jax.config import flags as config_flags

    config_flags.define_config_flag(help_text="An image recipe.")
    for name, text in (
        ("generator", "The generator's weights, netG_*.pth."),
        ("energy", "The energy's weights, netD_*.pth. Default: initial ones."),
        ("posterior", "The encoder's weights, netE_*.pth. Default: initial ones."),
        ("workdir", "The run directory to create."),
    ):
        common.define_path(flags.FLAGS, name, text)
    flags.mark_flags_as_required(["config", "generator", "workdir"])
    with common.user_errors():
        return config_flags.parse(argv)


if __name__ == "__main__":
    from absl import app

    app.run(main, flags_parser=_parse)
