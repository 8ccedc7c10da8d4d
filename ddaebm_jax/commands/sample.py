"""`--mode=sample`: draw samples from a trained run."""

from pathlib import Path

import numpy as np
from absl import flags, logging
from jaxtyping import Float, UInt8

from ddaebm_jax.commands import common
from ddaebm_jax.data import images, tabular, test_rows
from ddaebm_jax.evaluation import inference, plots
from ddaebm_jax.files import written_atomically
from ddaebm_jax.training.trained_run import TrainedRun, load_run

# A grid of more would be too small to look at.
_GRID_IMAGES = 100


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_workdir(values)
    common.define_checkpoint(values)
    flags.DEFINE_integer(
        "num_samples",
        None,
        "Number of samples. Default: 10000, or 100 images.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "Sample i is a function of (seed, i).",
        lower_bound=0,
        upper_bound=2**31 - 1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "NPZ to write, with a picture beside it. Default: a new one in --workdir.",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> None:
    """Draw samples, and print the path of their NPZ."""
    with common.advice_for_trained_run(values.workdir):
        path = sample(
            values.workdir,
            values.num_samples,
            values.seed,
            values.output,
            values.checkpoint,
        )
    print(path)


def sample(
    workdir: str | Path,
    num_samples: int | None = None,
    seed: int = 0,
    output: str | None = None,
    checkpoint: str = "latest",
) -> Path:
    """Draw samples into an NPZ (`x`, in the data's own units) and a picture.

    Images are uint8, and are also written as PNG files into a folder beside the NPZ.

    Args:
      workdir: the run directory.
      num_samples: how many; None: 10,000, or 100 images.
      seed: sample i is a function of (seed, i).
      output: the NPZ; None: a new one in the run directory.
      checkpoint: as in `load_run`.

    Returns:
      The path of the NPZ.

    Raises:
      InputError: for a run that cannot be loaded, or a bad output path.
    """
    common.check_output(output, ".npz")
    loaded = load_run(workdir, checkpoint=checkpoint)
    of_images = loaded.experiment.source.holds_images
    if num_samples is None:
        num_samples = 100 if of_images else 10_000
    if output:
        path = Path(output)
    elif of_images:
        path = common.free_path(loaded.workdir / "images.npz", ".png", "")
    else:
        path = common.free_path(loaded.workdir / "samples.npz", ".png")
    drawn = inference.draw_samples(
        loaded.experiment, loaded.variables, num_samples, seed
    )
    if of_images:
        samples = np.asarray(images.to_uint8(drawn))
    else:
        samples = loaded.in_data_units(drawn)
    with written_atomically(path) as file:
        np.savez(file, x=samples, seed=seed, step=loaded.step)
    picture = common.free_path(path.with_suffix(".png"))
    if of_images:
        _save_images(common.free_path(path.with_suffix("")), samples)
        plots.plot_images(picture, samples[:_GRID_IMAGES])
    else:
        _plot_rows(picture, loaded, drawn, samples)
    logging.info("wrote %s and %s", path, picture)
    return path


def _save_images(folder: Path, samples: UInt8[np.ndarray, "n h w c"]) -> None:
    folder.mkdir()
    digits = len(str(len(samples) - 1))
    for i, image in enumerate(samples):
        plots.save_image(folder / f"{i:0{digits}}.png", image)


def _plot_rows(
    picture: Path,
    loaded: TrainedRun,
    drawn: Float[np.ndarray, "n dim"],
    samples: Float[np.ndarray, "n dim"],
) -> None:
    """Plot samples of the plane, or of a table (as `drawn`, standardised)."""
    source, title = (
        loaded.experiment.source,
        f"{len(drawn)} samples, step {loaded.step}",
    )
    if source.distribution is not None:
        extent = max(1e-6, 1.1 * float(np.abs(samples).max()))
        plots.plot_samples(picture, samples, extent, title)
        return
    rows = {
        "held-out inliers": test_rows(source.table, tabular.INLIER),
        "samples": drawn,
    }
    energies = {
        name: inference.energies(loaded.experiment, loaded.variables, of_name)
        for name, of_name in rows.items()
    }
    plots.plot_table(picture, source.table.train, drawn, energies, title)
