"""`--mode=sample`: draw samples from a trained run."""

import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags, logging

from ddaebm_jax import progress
from ddaebm_jax.commands import common
from ddaebm_jax.data import tabular, test_rows
from ddaebm_jax.data.image_files import write_image
from ddaebm_jax.evaluation import inference, particles, plots
from ddaebm_jax.files import written_atomically
from ddaebm_jax.training.trained_run import load_run

SAMPLERS = ("generator", "energy")
# A grid of more would be too small to look at.
_GRID_IMAGES = 100
_WRITERS = 8  # Threads that write PNG files.


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    text = "Number of samples. Default: 10000, or 100 images."
    flags.DEFINE_integer("num_samples", None, text, 1, None, values)
    common.define_seed(values, "The generator's sample i depends on (seed, i) only.")
    text = "Where samples come from: the generator, or the energy by particles."
    flags.DEFINE_enum("sampler", "generator", SAMPLERS, text, values)
    text = "NPZ to write, with a picture beside it. Default: a new one in --workdir."
    common.define_path(values, "output", text)


def run(values: flags.FlagValues) -> None:
    """Draw samples, and print the path of their NPZ."""
    settings = values.num_samples, values.seed, values.output, values.checkpoint
    settings = (*settings, values.sampler)
    with common.out_of_memory_advice():
        common.show(str(sample(values.workdir, *settings)))


def sample(
    workdir: str | Path,
    num_samples: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    checkpoint: str = "latest",
    sampler: str = "generator",
) -> Path:
    """Draw samples of a run; of the generator sample i is a function of (seed, i).

    `sampler` is `generator`, or `energy`: of exp f(·, 0) by sequential Monte Carlo, see
    `particles.draw_from_energy`.

    Returns the path of the NPZ (`x`, in the data's own units), which has a picture
    beside it. Images are uint8, and are also PNG files in a folder beside it. Raises
    InputError for a run that cannot be loaded, or a bad output path.
    """
    output = common.check_output(output, ".npz")
    loaded = load_run(workdir, checkpoint=checkpoint)
    source, model = loaded.experiment.source, (loaded.experiment, loaded.variables)
    default_num, name, companions = 10_000, "samples.npz", (".png",)
    if source.holds_images:
        default_num, name, companions = 100, "images.npz", (".png", "")
    num_samples = num_samples or default_num
    draw = particles.draw_from_energy if sampler == "energy" else inference.draw_samples
    beside = output.parent if output else loaded.workdir
    # Images get their names when all are drawn: an end on the way leaves nothing.
    with tempfile.TemporaryDirectory(dir=beside, prefix=".drawing-") as folder:
        folder = Path(folder, "images")
        if source.holds_images and sampler == "generator":
            chunks = inference.draw_images(*model, num_samples, seed)
        else:
            with progress.phase(f"drawing {num_samples} samples"):
                drawn = draw(*model, num_samples, seed)
            chunks = [source.to_own_units(drawn)]
        images = source.holds_images
        samples = _write_images(folder, chunks, num_samples) if images else chunks[0]
        path = output or common.claimed(loaded.workdir / name, *companions)
        with written_atomically(path) as file:
            np.savez(file, x=samples, seed=seed, step=loaded.step)
        if images:
            folder.rename(common.claimed(path.with_suffix(""), folder=True))
    picture = common.claimed(path.with_suffix(".png"))
    title = f"{num_samples} samples, step {loaded.step}"
    if source.holds_images:
        plots.write_grid(picture, samples[:_GRID_IMAGES])
    elif source.table is not None:
        held_out = test_rows(source.table, tabular.INLIER)
        energies = {
            "held-out inliers": inference.energies(*model, held_out),
            "samples": inference.energies(*model, drawn),
        }
        table = source.table.train, drawn, energies, title
        plots.write(picture, plots.plot_table, *table)
    else:
        box = plots.square(max(1e-6, 1.1 * float(np.abs(samples).max())))
        plots.write(picture, plots.plot_samples, samples, box, title)
    if not picture.stat().st_size:  # It could not be drawn.
        picture.unlink()
    written = [str(one) for one in (path, picture) if one.exists()]
    logging.info("wrote %s", " and ".join(written))
    return path


def _write_images(folder: Path, chunks: Iterable[np.ndarray], num: int) -> np.ndarray:
    """Write images as PNG files, by number, while the next are drawn; return all."""
    paths = (folder / f"{i:0{len(str(num - 1))}}.png" for i in range(num))
    drawn, jobs, write = [], [], lambda image, path: write_image(path, image)
    with ThreadPoolExecutor(_WRITERS) as pool:
        with progress.phase(f"drawing {num} samples"):
            for chunk in chunks:
                jobs.append(pool.map(write, chunk, paths))
                drawn.append(chunk)
        with progress.phase(f"writing {num} PNG files"):
            for job in jobs:
                list(job)
    return np.concatenate(drawn)
