"""`--mode=restore`: repair noisy, incomplete or small images, and fill tables.

  --task=denoise --sigma=0.25    images with Gaussian noise
  --task=inpaint --mask=center:4 images with a hole; or random:0.5, hole.png
  --task=superres --factor=2     images of half the side
  --task=deblur --blur=1.0       images blurred by a Gaussian
  --task=impute                  rows with empty cells

The picture's columns: given, mean, three draws, uncertainty (two standard deviations),
and the truth, if it is given.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from jaxtyping import Bool, Float, UInt8

from ddaebm_jax import progress, restoration
from ddaebm_jax.commands import common
from ddaebm_jax.commands.impute import impute
from ddaebm_jax.config import choices
from ddaebm_jax.data import images
from ddaebm_jax.data.image_files import read_mask, write_images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import plots, reference_draws, restoring
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.files import written_atomically
from ddaebm_jax.models import Players
from ddaebm_jax.paths import user_path
from ddaebm_jax.training.trained_run import TrainedRun, load_run

TASKS = "denoise", "inpaint", "superres", "deblur", "impute"
# σ of tasks in which it is not given, as a share of the range of pixels.
_LITTLE_NOISE = 0.02
# Rows of the picture, particles of each draw, and images that are restored at a time.
_SHOWN, _PARTICLES, _GROUP = 8, 8, 256


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    common.define_data_path(values)
    text = "What to repair: folder or NPZ of images; CSV or NPZ of rows."
    common.define_path(values, "input", text)
    common.require(values, "input", "images, or a CSV or NPZ of rows")
    flags.DEFINE_enum("task", None, TASKS, "Kind of repair.", flag_values=values)
    common.require(values, "task", "one of " + ", ".join(TASKS))
    text = "NPZ (images) or CSV (rows) to write. Default: a new one in --workdir."
    common.define_path(values, "output", text)
    text = "Noise: its standard deviation as a share of the range of pixels, 0.001 to "
    text += f"1. Needed to denoise; otherwise {_LITTLE_NOISE}."
    flags.DEFINE_float("sigma", None, text, flag_values=values)
    text = "Hole to inpaint: center:SIDE, random:SHARE, or a PNG, black in the hole."
    flags.DEFINE_string("mask", None, text, flag_values=values)
    text = "Enlargement of superres: how much larger the model's sides are."
    flags.DEFINE_integer("factor", None, f"{text} Default: 2.", 2, None, values)
    text = "Blur to undo: a Gaussian's standard deviation, pixels."
    flags.DEFINE_float("blur", None, f"{text} Default: 1.", 0.1, 10.0, values)
    text = "How draws of images are made; direct is to denoise only. "
    text += "Default: averaged, or noise_space for runs without a reference density "
    text += "of full covariances."
    flags.DEFINE_enum("method", None, restoring.METHODS, text, flag_values=values)
    text = "Error of the generator's images: its standard deviation as a share of the "
    text += "range of pixels. Default: measured on held-out images."
    flags.DEFINE_float("error", None, text, 0.0, 1.0, values)
    text = "Draws of each image or row."
    flags.DEFINE_integer("num_draws", 16, text, 2, None, values)
    text = "The true images, in the same order: they are drawn, and PSNR measured."
    common.define_path(values, "truth", text)
    text = "A CSV's header line. Default: as in training."
    flags.DEFINE_enum("header", None, choices.HEADERS, text, values)
    common.define_seed(values, "Seed of everything that is drawn.")


def run(values: flags.FlagValues) -> None:
    """Restore, and print the path of what is written."""
    names = "task sigma mask factor blur method error num_draws truth header seed"
    names += " output data_path"
    settings = {name: values[name].value for name in names.split()}
    settings["checkpoint"] = values.checkpoint
    with common.out_of_memory_advice():
        common.show(str(restore(values.workdir, values.input, **settings)))


def restore(
    workdir: str | Path,
    input_path: str | Path,
    task: str,
    sigma: float | None = None,
    mask: str | None = None,
    factor: int | None = None,
    blur: float | None = None,
    method: str | None = None,
    error: float | None = None,
    num_draws: int = 16,
    truth: str | Path | None = None,
    header: str | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    checkpoint: str = "latest",
    data_path: str | Path | None = None,
) -> Path:
    """Restores images or fills the empty cells of rows; the arguments are the flags.

    Returns the path of what is written. Of images that is an NPZ: `x`, the mean of the
    draws, uint8; `draws` [n, num_draws, …]; `std`, in pixel values 0 … 255; beside it a
    picture and a folder of the means as PNG, by the names of the files. Of rows it is
    the CSV with means in its empty cells, in the table's own units; beside it
    `…-intervals.csv`, with a line for each of those cells, and an NPZ with the draws.

    Raises InputError for what cannot be used, before anything is drawn.
    """
    is_table = task == "impute"
    output = common.check_output(output, ".csv" if is_table else ".npz")
    given_flags = {"sigma": sigma, "mask": mask, "factor": factor, "blur": blur}
    given_flags |= {"method": method, "error": error, "truth": truth, "header": header}
    _check(task, given_flags)
    in_noise_space = not is_table and method in (None, "averaged", "noise_space")
    measure = in_noise_space and error is None
    loaded = load_run(workdir, measure, checkpoint, data_path)
    source = loaded.experiment.source
    if source.holds_images == is_table or (is_table and source.table is None):
        kind = "rows of a table" if is_table else "images"
        raise InputError(
            f"--task={task} is for {kind}, and the run's data.name is "
            f"'{source.name}'; name another --workdir or --task"
        )
    if source.colour is not None:
        raise InputError(
            f"--task={task} needs a run with white noise, and this one was trained "
            "with data.whiten; train one without"
        )
    if is_table:
        return impute(loaded, input_path, num_draws, header, seed, output)
    method = _method(loaded.variables, method)
    how = sigma, mask, factor or 2, blur or 1.0, seed
    given, names, known = _measured(loaded, input_path, task, *how)
    whole = None
    if truth is not None:
        whole, _ = images.read_images(truth, source.event_shape, exact=True)
        if len(whole) != len(given):
            raise InputError(
                f"--truth={truth} holds {len(whole)} images, and --input {len(given)}; "
                "give the same images in the same order"
            )
    model = loaded.experiment, loaded.variables, known
    errors = _error(loaded, error, seed) if in_noise_space else None
    measured = method == "averaged" and error is None
    mix = _mix(loaded, known, errors, seed) if measured else reference_draws.Mix()
    draw = partial(_draw_images, method, num_draws, errors, mix)
    with progress.phase(f"restoring {len(given)} images, --method={method}"):
        restored = _restored(model, draw, num_draws, seed)
    return _write_images(loaded, restored, given, names, whole, output)


class _Restored(NamedTuple):
    """Images, in pixel values 0 … 255."""

    mean: Float[np.ndarray, "n h w c"]
    std: Float[np.ndarray, "n h w c"]
    draws: UInt8[np.ndarray, "n draws h w c"]


def _restored(
    model: tuple[Experiment, Players, restoration.Measurement],
    draw: Callable[..., np.ndarray],
    num_draws: int,
    seed: int,
) -> _Restored:
    """Return what is written of every image, of groups of them one after the other."""
    *trained, known = model
    num, groups = len(known.y), []
    for start in range(0, num, _GROUP):
        group = jax.tree.map(itemgetter(slice(start, start + _GROUP)), known)
        drawn = draw(*trained, group, seed + start)
        drawn = (np.clip(drawn, -1.0, 1.0) + 1.0) * 127.5
        # The last draws: chains are longest there.
        kept = np.round(drawn[:, -num_draws:]).astype(np.uint8)
        groups.append(_Restored(drawn.mean(axis=1), drawn.std(axis=1), kept))
        if num > _GROUP:
            progress.log(f"restored {start + len(kept)} of {num} images")
    return _Restored(*map(np.concatenate, zip(*groups, strict=True)))


def _draw_images(
    method: str,
    num_draws: int,
    errors: np.ndarray | None,
    mix: reference_draws.Mix,
    experiment: Experiment,
    variables: Players,
    known: restoration.Measurement,
    seed: int,
) -> np.ndarray:
    """Return draws of every image given its measurement, [n, num_draws, …]."""
    model = experiment, variables, known
    how = num_draws, seed, restoring.Search(), errors
    if method == "averaged":
        return reference_draws.averaged(*model, *how, mix)
    if method == "noise_space":
        return restoring.noise_space(*model, *how)
    if method == "particles":
        num_particles = _PARTICLES * num_draws
        found = restoring.particles(*model, num_particles, seed, weighted=False)
        progress.log(
            f"effective sample size of {num_particles} particles: "
            f"{num_particles * found.effective.min():.1f} at least"
        )
        return found.x
    return restoring.direct(*model, num_draws, seed)


def _method(variables: Players, given: str | None) -> str:
    """Return the given way to draw images, or the run's default."""
    possible = reference_draws.are_possible(variables)
    if given == "averaged" and not possible:
        raise InputError(
            "--method=averaged needs a run whose energy has a reference density of "
            "full covariances (model.reference, a mixture, of images of at most 256 "
            "numbers); leave --method out"
        )
    return given or ("averaged" if possible else "noise_space")


def _held_out(loaded: TrainedRun, seed: int) -> Float[np.ndarray, "n h w c"]:
    """Return the held-out images by which the generator is judged, in [−1, 1]."""
    held_out = loaded.experiment.source.held_out(restoring.ERROR_IMAGES, seed)
    if not len(held_out):
        raise InputError(
            "no image is held out to measure the generator's error on; give --error"
        )
    return np.asarray(images.to_float(held_out))


def _error(loaded: TrainedRun, given: float | None, seed: int) -> np.ndarray:
    """Return the standard deviation of the generator's error, of each pixel."""
    if given is not None:
        shape = loaded.experiment.source.event_shape
        return np.full(shape, 2.0 * given, np.float32)
    x = _held_out(loaded, seed)
    how = x, seed, restoring.Search()
    with progress.phase(f"measuring the generator's error on {len(x)} images"):
        found = restoring.generator_error(loaded.experiment, loaded.variables, *how)
    mean = float(np.sqrt((found**2).mean())) / 2.0
    logging.info("the generator's error is %.3f of the range: --error=%.3f", mean, mean)
    return found


def _mix(
    loaded: TrainedRun,
    known: restoration.Measurement,
    errors: np.ndarray,
    seed: int,
) -> reference_draws.Mix:
    """Return how draws of both models are mixed."""
    x = _held_out(loaded, seed)
    how = known, x, seed, restoring.Search(), errors
    with progress.phase(f"restoring {len(x)} held-out images by both models"):
        found = reference_draws.best_mix(loaded.experiment, loaded.variables, *how)
    logging.info("the generator's share of the draws is %.2f", found.generator)
    return found


# Flags that only some tasks read.
_READ_BY = {
    "sigma": TASKS[:4],
    "mask": ("inpaint",),
    "factor": ("superres",),
    "blur": ("deblur",),
    "method": TASKS[:4],
    "error": TASKS[:4],
    "truth": TASKS[:4],
    "header": ("impute",),
}


def _check(task: str, given: dict[str, Any]) -> None:
    """Refuse what can be refused before a run is loaded."""
    for name, tasks in _READ_BY.items():
        if given[name] is not None and task not in tasks:
            raise InputError(
                f"--{name} is for --task={' or '.join(tasks)}, not {task}; leave it out"
            )
    sigma = given["sigma"]
    if sigma is not None and not 0.001 <= sigma <= 1:
        raise InputError(
            f"--sigma={sigma}: a share of the range of pixels, from 0.001 to 1, is "
            "needed; divide a standard deviation in pixel values 0 … 255 by 255"
        )
    if task == "denoise" and sigma is None:
        raise InputError("--task=denoise needs --sigma, for example --sigma=0.25")
    if task == "inpaint" and given["mask"] is None:
        raise InputError(
            "--task=inpaint needs --mask: center:4, random:0.5, or a PNG whose black "
            "pixels are the hole"
        )
    if given["error"] is not None and given["method"] in ("particles", "direct"):
        raise InputError(
            "--error is for --method=averaged or noise_space, not "
            f"{given['method']}; leave it out"
        )
    if given["method"] == "direct" and task != "denoise":
        raise InputError(f"--method=direct is for --task=denoise, not {task}")


def _measured(
    loaded: TrainedRun,
    path: str | Path,
    task: str,
    sigma: float | None,
    mask: str | None,
    factor: int,
    blur: float,
    seed: int,
) -> tuple[UInt8[np.ndarray, "n h w c"], tuple[str, ...], restoration.Measurement]:
    """Return the images to restore, the names of files, and what they measure."""
    shape = loaded.experiment.source.event_shape
    side, _, channels = shape
    if task == "superres":
        if side % factor:
            raise InputError(
                f"--factor={factor} does not divide the side of the model's images, "
                f"{side}; give one of {[f for f in range(2, side + 1) if not side % f]}"
            )
        shape = (side // factor, side // factor, channels)
    given, names = images.read_images(path, shape, exact=True)
    names = names if user_path(path, "--input").is_dir() else ()
    y = np.asarray(images.to_float(given))
    operator: Any = restoration.Identity()
    if task == "inpaint":
        known = _mask(mask, len(y), shape, seed)
        operator, y = restoration.Mask(known), np.where(known, y, np.float32(0.0))
        given = np.where(known, given, 128).astype(np.uint8)
    elif task == "superres":
        operator = restoration.BlockMean(factor)
    elif task == "deblur":
        operator = restoration.Blur(restoration.gaussian_line(blur, side))
    # Pixels have a range of 2.
    std = np.full(len(y), 2.0 * (sigma or _LITTLE_NOISE), np.float32)
    return given, names, restoration.Measurement(operator, y, std)


def _mask(
    text: str, num: int, shape: tuple[int, ...], seed: int
) -> Bool[np.ndarray, "n h w c"]:
    """Returns which pixels are known."""
    side, _, channels = shape
    kind, _, number = text.partition(":")
    known = np.ones((num, side, side, 1), bool)
    if kind not in ("center", "random"):
        known[:] = read_mask(text, side)[None, :, :, None]
        return np.repeat(known, channels, axis=3)
    try:
        size = int(number) if kind == "center" else float(number)
    except ValueError:
        size = 0
    if not 0 < size < (side if kind == "center" else 1):
        raise InputError(
            f"--mask={text}: a side from 1 to {side - 1} (center:4) or a share between "
            "0 and 1 (random:0.5) is needed"
        )
    if kind == "center":
        start = (side - size) // 2
        known[:, start : start + size, start : start + size] = False
    else:
        known = np.random.default_rng(seed).random(known.shape) >= size
    return np.repeat(known, channels, axis=3)


def _write_images(
    loaded: TrainedRun,
    found: _Restored,
    given: UInt8[np.ndarray, "n h w c"],
    names: tuple[str, ...],
    whole: UInt8[np.ndarray, "n h w c"] | None,
    output: Path | None,
) -> Path:
    mean, std, draws = found
    restored = np.round(mean).astype(np.uint8)
    path = output or common.claimed(loaded.workdir / "restored.npz", ".png", "")
    with written_atomically(path) as file:
        np.savez(file, x=restored, draws=draws, std=std.astype(np.float32))
    times = restored.shape[1] // given.shape[1]
    enlarged = given.repeat(times, axis=1).repeat(times, axis=2)
    uncertain = np.clip(np.round(2.0 * std), 0, 255).astype(np.uint8)
    columns = [enlarged, restored, *draws[:, :3].swapaxes(0, 1), uncertain]
    if whole is not None:
        columns.append(whole)
        squares = ((mean - whole) ** 2).reshape(len(mean), -1).mean(axis=1)
        psnr = 10.0 * np.log10(255.0**2 / np.maximum(squares, 1e-9))
        logging.info("PSNR of the mean: %.2f dB, of %d images", psnr.mean(), len(psnr))
    picture = common.claimed(path.with_suffix(".png"))
    grid = np.stack([column[:_SHOWN] for column in columns], axis=1)
    plots.write_grid(picture, grid.reshape(-1, *restored.shape[1:]), len(columns))
    folder = common.claimed(path.with_suffix(""), folder=True)
    write_images(folder, restored, names)
    logging.info("wrote %s, %s and %s", path, picture, folder)
    return path
