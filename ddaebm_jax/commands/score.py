"""`--mode=score`: write the energies of rows or images."""

import csv
import io
from pathlib import Path

import numpy as np
from absl import flags, logging

from ddaebm_jax.commands import common
from ddaebm_jax.data import images, tabular
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference
from ddaebm_jax.files import written_atomically
from ddaebm_jax.training.trained_run import TrainedRun, load_run


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    common.define_trained_run(values)
    text = "CSV or NPZ of rows; folder or NPZ of images."
    common.define_path(values, "input", text)
    common.require(values, "input", "a CSV or NPZ of rows, or images")
    text = "CSV or NPZ to write. Default: a new CSV in --workdir."
    common.define_path(values, "output", text)
    common.define_skip_corrupt(values)


def run(values: flags.FlagValues) -> None:
    """Score, and print the path of the scores."""
    settings = values.input, values.output, values.skip_corrupt, values.checkpoint
    with common.out_of_memory_advice():
        print(score(values.workdir, *settings))


def score(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path | None = None,
    skip_corrupt: bool = False,
    checkpoint: str = "latest",
) -> Path:
    """Write the energies f(x, 0) of rows or images; larger is more likely.

    Rows are in the data's own units; images of a folder are cropped and resized like
    the training images. Returns the path of the scores: CSV (`energy`, or
    `image,energy`) or NPZ (`energy`, of images also `image`). Raises InputError for a
    run that cannot be loaded, or bad rows, images or output path.
    """
    output = common.check_output(output, ".csv", ".npz")
    loaded = load_run(workdir, checkpoint=checkpoint)
    rows, names = _read(loaded, input_path, skip_corrupt)
    energies = inference.energies(loaded.experiment, loaded.variables, rows)
    path = output or common.claimed(loaded.workdir / "scores.csv")
    with written_atomically(path) as file:
        if path.suffix == ".npz":
            named = {} if names is None else {"image": np.asarray(names)}
            np.savez(file, energy=energies, **named)
        else:
            file.write(_csv(energies, names).encode())
    logging.info("wrote %d energies to %s", len(rows), path)
    return path


def _read(
    loaded: TrainedRun, path: str | Path, skip_corrupt: bool
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return rows, or images with their names."""
    source, data = loaded.experiment.source, loaded.experiment.config.data
    if source.holds_images:
        return images.read_images(
            path, source.event_shape, skip_corrupt, data.crop, timeout=data.timeout
        )
    if skip_corrupt:
        raise InputError("--skip_corrupt is for runs of images; leave it out")
    (dim,) = source.event_shape
    table = source.table
    standardizer, columns = (table and table.standardizer), (table and table.columns)
    return tabular.read_rows(path, dim, standardizer, columns), None


def _csv(energies: np.ndarray, names: tuple[str, ...] | None) -> str:
    values = [f"{energy:.9g}" for energy in energies]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["energy"] if names is None else ["image", "energy"])
    lines.writerows(zip(values) if names is None else zip(names, values, strict=True))
    return text.getvalue()
