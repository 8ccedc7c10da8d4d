"""`--mode=export`: a trained run as programs for jax, numpy and flatbuffers alone."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import traverse_util
from jax import export as jax_export
from jaxtyping import Array

from ddaebm_jax import colour, density, files, sampling
from ddaebm_jax.commands import common, model_card, run_exported
from ddaebm_jax.data.tabular import Standardizer
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.training.trained_run import TrainedRun, load_run

PLATFORMS = ("cpu", "cuda", "tpu")
Tree = dict[str, Any]

# Of products with the whitening: fewer bits, a GPU's default, would show.
_EXACT = jax.lax.Precision.HIGHEST


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    text = "ZIP to write. Default: a new model.zip in --workdir."
    common.define_path(values, "output", text)


def run(values: flags.FlagValues) -> None:
    """Export, and print the path of the ZIP."""
    with common.out_of_memory_advice():
        path = export(values.workdir, values.output, values.checkpoint)
    common.show(str(path))


def export(
    workdir: str | Path, output: str | Path | None = None, checkpoint: str = "latest"
) -> Path:
    """Write a run's sampler, energy and generator as a ZIP, and return its path.

    The ZIP holds `sample.bin`, `energy.bin` and `predict.bin`, each a serialized
    `jax.export.Exported` of a function that `functions` returns, for any batch size and
    all of `PLATFORMS`; `variables.safetensors`; `model_card.md`; and `run.py`, which
    loads and calls them.

    Raises InputError for a run that cannot be loaded, or a bad output path.
    """
    import safetensors.numpy

    output = common.check_output(output, ".zip")
    loaded = load_run(workdir, checkpoint=checkpoint)
    variables = flat_variables(loaded)
    found = programs(loaded.experiment, variables)
    contents = {f"{name}.bin": program for name, program in found.items()}
    contents["variables.safetensors"] = safetensors.numpy.save(variables)
    contents["model_card.md"] = model_card.model_card(loaded, PLATFORMS)
    contents["run.py"] = Path(run_exported.__file__).read_text()
    path = output or common.claimed(loaded.workdir / "model.zip")
    with (
        files.written_atomically(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, content in contents.items():
            archive.writestr(name, content)
    logging.info("wrote step %d of %s to %s", loaded.step, loaded.workdir, path)
    return path


def flat_variables(loaded: TrainedRun) -> dict[str, np.ndarray]:
    """Return what the exported functions read, float32 on the host, by name.

    Names are `energy/params/…`, `generator/params/…`, `standardizer/mean`, ….
    """
    tree = {name: getattr(loaded.variables, name) for name in ("energy", "generator")}
    table = loaded.experiment.source.table
    if table is not None:
        tree["standardizer"] = standardizer_arrays(table.standardizer)
    if (std := loaded.experiment.source.colour) is not None:
        tree["standardizer"] = {"colour": std}
    flat = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    return {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}


def standardizer_arrays(standardizer: Standardizer) -> dict[str, np.ndarray]:
    """Return what standardises; `mean_low` is what `mean` lacks of float64."""
    mean, std, whitening = standardizer
    high = mean.astype(np.float32)
    arrays = {"mean": high, "mean_low": mean - high, "std": std}
    if whitening is None:
        return arrays
    return arrays | {"whitening": whitening, "unwhitening": np.linalg.inv(whitening)}


def standardized(own: Tree | None, x: Array) -> Array:
    """Return rows of a table in the networks' units; images and points as they are."""
    if own is None:
        return x
    if "colour" in own:
        return colour.whitened(own["colour"], x)
    # Near the mean the first difference is exact, so that no digit is lost to it.
    x = (x - own["mean"][None] - own["mean_low"][None]) / own["std"][None]
    if "whitening" in own:
        x = jnp.matmul(x, own["whitening"], precision=_EXACT)
    return x


def unstandardized(own: Tree | None, x: Array) -> Array:
    """Undo `standardized`."""
    if own is None:
        return x
    if "colour" in own:
        return colour.coloured(own["colour"], x)
    if "unwhitening" in own:
        x = jnp.matmul(x, own["unwhitening"], precision=_EXACT)
    return x * own["std"][None] + own["mean_low"][None] + own["mean"][None]


def functions(experiment: Experiment) -> dict[str, Callable[..., Array]]:
    """Return the functions to export, pure functions of nested `flat_variables`.

    - sample: (variables, seed, rows [n]) → x [n, *shape] in the data's own units; that
      of row i is a function of (seed, i), as in `inference.draw_samples`.
    - energy: (variables, x [n, *shape] in the data's own units) → f(x, 0) [n], nats.
    - predict: (variables, x_{t+1} [n, *shape], t [n], z [n, nz]) → x̂_0 [n, *shape],
      rows of a table standardised, images with white noise.

    Images are float32, with pixels in [−1, 1].
    """
    networks, latent = experiment.networks, experiment.game.latent

    def sample(variables: Tree, seed: Array, rows: Array) -> Array:
        # Whatever the default of the machine that exports.
        key = jax.random.key(seed, impl="threefry2x32")
        model = experiment.schedule, networks, variables["generator"]
        x = sampling.sample(*model, key, rows.shape[0], latent, rows)
        return unstandardized(variables.get("standardizer"), x)

    def energy(variables: Tree, x: Array) -> Array:
        x = standardized(variables.get("standardizer"), x)
        return density.energy_at_data(networks, variables["energy"], x)

    def predict(variables: Tree, x_next: Array, t: Array, z: Array) -> Array:
        z = z if latent else jnp.zeros_like(z)
        return networks.generator(variables["generator"], x_next, t, z)

    return {"sample": sample, "energy": energy, "predict": predict}


def programs(
    experiment: Experiment, variables: dict[str, np.ndarray]
) -> dict[str, bytearray]:
    """Return each of `functions`, of variables by name, exported and serialized.

    Energy and x̂_0 can be differentiated once.
    """
    spec = jax.ShapeDtypeStruct
    (n,) = jax_export.symbolic_shape("n")
    x = spec((n, *experiment.networks.event_shape), jnp.float32)
    z = spec((n, experiment.networks.nz), jnp.float32)
    seed, whole = spec((), jnp.uint32), spec((n,), jnp.int32)
    inputs = {"sample": (seed, whole), "energy": (x,), "predict": (x, whole, z)}
    shapes = {name: spec(leaf.shape, leaf.dtype) for name, leaf in variables.items()}

    def program(name: str, function: Callable[..., Array]) -> bytearray:
        def of_flat(flat: Tree, *args: Array) -> Array:
            return function(traverse_util.unflatten_dict(flat, sep="/"), *args)

        exported = jax_export.export(jax.jit(of_flat), platforms=PLATFORMS)
        order = 0 if name == "sample" else 1
        return exported(shapes, *inputs[name]).serialize(vjp_order=order)

    found = functions(experiment).items()
    return {name: program(name, function) for name, function in found}
