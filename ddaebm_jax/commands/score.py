"""`--mode=score`: write the energies of rows or images."""

import csv
import io
from pathlib import Path

import numpy as np
from absl import flags, logging

from ddaebm_jax.commands import common
from ddaebm_jax.config import choices
from ddaebm_jax.data import images, tabular
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference, particles
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
    text = "A CSV's header line. Default: as in training."
    flags.DEFINE_enum("header", None, choices.HEADERS, text, values)
    text = "Column (CSV) or array (NPZ) of ids, to be copied."
    flags.DEFINE_string("id_column", "", text, values)
    text = "Add the normalised log density, in the data's own units."
    flags.DEFINE_bool("normalized", False, text, values)
    common.define_skip_corrupt(values)


def run(values: flags.FlagValues) -> None:
    """Score, and print the path of the scores."""
    names = "output header id_column skip_corrupt checkpoint normalized".split()
    settings = {name: values[name].value for name in names}
    with common.out_of_memory_advice():
        common.show(str(score(values.workdir, values.input, **settings)))


def score(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path | None = None,
    skip_corrupt: bool = False,
    checkpoint: str = "latest",
    header: str | None = None,
    id_column: str = "",
    normalized: bool = False,
) -> Path:
    """Write the energies f(x, 0) of rows or images; larger is more likely.

    Rows are in the data's own units; images of a folder are cropped and resized like
    the training images. Returns the path of the scores: a CSV with the columns `row`
    (from 0) or `image`, `id` with an `id_column`, `energy`, and `rank` (1: the lowest
    energy), or an NPZ of such arrays. `normalized` adds `log_density`, f(x, 0) − log Ẑ
    in the data's own units, nats. Raises InputError for a run that cannot be loaded,
    bad rows, images or output path, or a log Ẑ that too few particles carry.
    """
    output = common.check_output(output, ".csv", ".npz")
    loaded = load_run(workdir, checkpoint=checkpoint)
    rows, named = _read(loaded, input_path, skip_corrupt, header, id_column)
    energies = inference.energies(loaded.experiment, loaded.variables, rows)
    ranks = 1 + np.searchsorted(np.sort(energies), energies)  # Ties share the first.
    found = {**named, "energy": energies, "rank": ranks}
    if normalized:
        found["log_density"] = energies - _log_z(loaded)
    path = output or common.claimed(loaded.workdir / "scores.csv")
    with written_atomically(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **found)
        else:
            file.write(_csv(found).encode())
    logging.info("wrote %d energies to %s", len(rows), path)
    return path


def _read(
    loaded: TrainedRun,
    path: str | Path,
    skip_corrupt: bool,
    header: str | None,
    id_column: str,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return rows or images, and by column of the scores what they are called."""
    source, data = loaded.experiment.source, loaded.experiment.config.data
    if source.holds_images:
        if header or id_column:
            raise InputError(
                "--header and --id_column are for runs of tables; leave them out"
            )
        pixels, names = images.read_images(
            path, source.event_shape, skip_corrupt, data.crop, timeout=data.timeout
        )
        return pixels, {"image": np.asarray(names)}
    if skip_corrupt:
        raise InputError("--skip_corrupt is for runs of images; leave it out")
    table, (dim,) = source.table, source.event_shape
    options = tabular.TableOptions(
        header or data.header,
        "--header",
        data.label_column,
        tuple(data.drop_columns),
        id_column,
        columns=table.columns if table else tuple(f"column_{j}" for j in range(dim)),
    )
    rows, ids = tabular.read_rows(path, options, table and table.standardizer)
    named = {"row": np.arange(len(rows))}
    return rows, named if ids is None else {**named, "id": np.asarray(ids)}


def _log_z(loaded: TrainedRun) -> float:
    """Return log Ẑ, in the data's own units."""
    estimate = particles.measure(loaded.experiment, loaded.variables).estimate
    if estimate.refusal is not None:
        raise InputError(
            f"--normalized: {estimate.refusal}; train with game.num_negatives above 1, "
            "or leave --normalized out"
        )
    logging.info("log Z is %.4f ± %.4f", estimate.log_z, estimate.error)
    table = loaded.experiment.source.table
    return estimate.log_z - (0.0 if table is None else table.standardizer.log_det)


def _csv(found: dict[str, np.ndarray]) -> str:
    numbers = {"energy", "log_density"} & found.keys()
    columns = found | {n: np.array([f"{e:.9g}" for e in found[n]]) for n in numbers}
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()
