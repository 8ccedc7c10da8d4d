"""`--mode=score`: write scores of rows or images, and p-values."""

import math
from pathlib import Path

import numpy as np
from absl import flags, logging

from ddaebm_jax import progress, reference
from ddaebm_jax.commands import common
from ddaebm_jax.config import choices
from ddaebm_jax.data import images, tabular
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.evaluation import calibration as calibration_lib
from ddaebm_jax.evaluation import particles, scores
from ddaebm_jax.files import written_atomically
from ddaebm_jax.paths import user_path
from ddaebm_jax.training.run_directory import read_config
from ddaebm_jax.training.trained_run import TrainedRun, load_run

# Held-out inliers that p-values are of, and those that are few.
_MOST_ROWS, _MOST_IMAGES, _FEW_ROWS = 10_000, 1_000, 20


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
    text = f"Score of ranks and p-values: {', '.join(map(_flag, scores.SCORES))}. "
    text += f"Default: {scores.TABLE_SCORE}; of images: {scores.IMAGE_SCORE}."
    flags.DEFINE_string("score", None, text, values)
    text = "Flag rows at this false discovery rate, such as 0.1."
    flags.DEFINE_float("fdr", None, text, flag_values=values)
    text = "Most held-out inliers to compare with; 0: no p-values. "
    text += f"Default: {_MOST_ROWS} rows or {_MOST_IMAGES} images."
    flags.DEFINE_integer("calibration", None, text, 0, None, values)
    common.define_data_path(values)
    common.define_skip_corrupt(values)


def _flag(score: str) -> str:
    """Return a score's name as --score gives it."""
    return score.replace(" ", "_")


def run(values: flags.FlagValues) -> None:
    """Score, and print the path of the scores."""
    names = "output header id_column skip_corrupt checkpoint normalized fdr calibration"
    settings = {name: values[name].value for name in f"{names} data_path".split()}
    settings["by"] = values.score
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
    by: str | None = None,
    fdr: float | None = None,
    calibration: int | None = None,
    data_path: str | Path | None = None,
) -> Path:
    """Write scores of rows or images; larger is more likely an inlier.

    Rows are in the data's own units; images of a folder are cropped and resized like
    the training images. Returns the path of the scores: a CSV, or an NPZ of arrays,
    with the columns

    - `row` (from 0) or `image`, and `id` with an `id_column`;
    - `energy`: f(x, 0), and with `by`, a name of `scores.SCORES`, other than that
      `score`: the one that ranks and p-values are of;
    - `rank`: 1 for the lowest score;
    - `log_density` with `normalized`: f(x, 0) − log Ẑ in the data's own units, nats;
    - `p_value`: conformal, by at most `calibration` of the run's held-out inliers (0:
      none; images are left without if theirs cannot be opened);
    - `flagged` with `fdr`: 1 for the rows that Benjamini and Hochberg's procedure flags
      at this false discovery rate, else 0;
    - `columns` of a table: those that contribute most (`scores.leading_columns`).

    Raises InputError for a run that cannot be loaded, bad rows, images or output path,
    a log Ẑ that too few particles carry, an `fdr` out of range or without p-values.
    """
    output = common.check_output(output, ".csv", ".npz")
    by = by and by.replace("_", " ")
    _check(by, fdr, calibration)
    needed = data_path or fdr is not None or calibration or by in scores.FITTED
    loaded = _load(workdir, checkpoint, data_path, bool(needed), calibration != 0)
    source = loaded.experiment.source
    by = by or (scores.IMAGE_SCORE if source.holds_images else scores.TABLE_SCORE)
    if by in scores.FITTED and source.holds_images and source.image_set is None:
        raise InputError(
            f"the score '{by}' is fitted to the run's images, which are not opened; "
            "give their --data_path, or --score=energy"
        )
    without = source.holds_images and not reference.read(loaded.variables.energy)
    if by == "energy" and without:
        logging.warning(
            "without a reference density, energies are unreliable far from the "
            "training images; consider --score=generator_bound"
        )
    rows, found = _read(loaded, input_path, skip_corrupt, header, id_column)
    most = _MOST_IMAGES if source.holds_images else _MOST_ROWS
    known = _calibration_rows(loaded, by, most if calibration is None else calibration)
    with progress.phase(f"scoring {len(rows)} rows and {len(known)} held-out inliers"):
        values, of_known = _scores(loaded, by, rows, known)
    found |= {"energy": values["energy"]}
    if by != "energy":
        found["score"] = values[by]
    ordered = np.where(np.isnan(values[by]), -np.inf, values[by])
    # Ties share the first.
    found["rank"] = 1 + np.searchsorted(np.sort(ordered), ordered)
    if normalized:
        found["log_density"] = values["energy"] - _log_z(loaded)
    if len(known) or fdr is not None:
        p_values = calibration_lib.conformal_p_values(values[by], of_known)
        found["p_value"] = p_values
    if fdr is not None:
        found["flagged"] = _flags(p_values, fdr, len(known))
    if source.table is not None:
        model = loaded.experiment, loaded.variables
        found["columns"] = np.array(scores.leading_columns(*model, rows))
    path = output or common.claimed(loaded.workdir / "scores.csv")
    _write(path, found)
    logging.info("wrote %d scores, '%s', to %s", len(rows), by, path)
    return path


def _check(by: str | None, fdr: float | None, calibration: int | None) -> None:
    """Refuse what can be refused before a run is loaded."""
    if by not in (None, *scores.SCORES):
        allowed = ", ".join(map(_flag, scores.SCORES))
        raise InputError(f"--score={by} is not a score; allowed: {allowed}")
    if fdr is not None:
        calibration_lib.check_fdr(fdr)
        if calibration == 0:
            raise InputError("--fdr needs p-values; leave --calibration=0 out")


def _load(
    workdir: str | Path,
    checkpoint: str,
    data_path: str | Path | None,
    needed: bool,
    wanted: bool,
) -> TrainedRun:
    """Load a run, with its images if they can be opened, or must be."""
    if needed:
        return load_run(workdir, True, checkpoint, data_path)
    why = "--calibration=0"
    # Opening a set of TFDS may download it.
    if wanted and read_config(user_path(workdir, "--workdir")).data.name == "tfds":
        wanted, why = False, "a set of TFDS is opened with --calibration=1000 or --fdr"
    if wanted:
        try:
            return load_run(workdir, True, checkpoint)
        except (InputError, OSError) as error:
            why = one_line(error)
    loaded = load_run(workdir, False, checkpoint)
    if loaded.experiment.source.holds_images:
        logging.warning("no p-values, as the run's images are not opened: %s", why)
    return loaded


def _calibration_rows(loaded: TrainedRun, by: str, most: int) -> np.ndarray:
    """Return held-out inliers that p-values compare with, none if there are none."""
    source = loaded.experiment.source
    if most == 0 or (source.holds_images and source.image_set is None):
        return np.zeros((0, *source.event_shape), np.float32)
    known = scores.calibration_rows(source, most, by)
    smallest = f"the smallest possible p-value is {1 / (len(known) + 1):.3g}"
    logging.info("%d held-out inliers give p-values: %s", len(known), smallest)
    if len(known) < _FEW_ROWS:
        logging.warning(
            "only %d held-out inliers: %s; hold out more by data.test_fraction, or "
            "give a larger --calibration",
            *(len(known), smallest),
        )
    return known


def _scores(
    loaded: TrainedRun, by: str, rows: np.ndarray, known: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the energy and the chosen score of rows, and the latter of known ones."""
    model, source = (loaded.experiment, loaded.variables), loaded.experiment.source
    fitted = scores.fit_rows(source) if by in scores.FITTED else None
    score_of = scores.fit_scores(*model, {"energy", by}, fitted)
    # In one go: noise that depends on the row's number is then exchangeable.
    together = score_of(np.concatenate([known, rows]) if len(known) else rows)
    num = len(known)
    return {name: v[num:] for name, v in together.items()}, together[by][:num]


def _flags(p_values: np.ndarray, fdr: float, num_known: int) -> np.ndarray:
    flagged = calibration_lib.benjamini_hochberg(p_values, fdr)
    logging.info(
        "flagged %d of %d rows; by %d held-out inliers no fewer than %d can be",
        *(flagged.sum(), len(p_values), num_known),
        math.ceil(len(p_values) / (fdr * (num_known + 1))),
    )
    return flagged.astype(int)


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
            path, source.event_shape, skip_corrupt, data.crop
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


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    import pandas as pd

    with written_atomically(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **found)
        else:
            how = {"index": False, "float_format": "%.9g", "lineterminator": "\n"}
            file.write(pd.DataFrame(found).to_csv(**how).encode())
