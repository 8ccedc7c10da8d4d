"""Tables: rows of numbers, split, standardised, and read for scoring.

Where rows are labelled 0 (inlier) or 1 (outlier), a model trains on inliers only and
is tested on held-out inliers and on every outlier. Standardisation is fitted on the
training rows alone.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from ddaebm_jax.data.records import hold_out
from ddaebm_jax.data.table_files import (
    INLIER,
    LARGEST,
    MAX_NPZ_BYTES,
    OUTLIER,
    TableFile,
    TableOptions,
    read_table_file,
)
from ddaebm_jax.errors import InputError, listed, one_line, shown
from ddaebm_jax.files import read_npz, written_atomically
from ddaebm_jax.paths import user_path

# Share of the mean eigenvalue that is added to each before whitening.
_RIDGE = 0.01


class Standardizer(NamedTuple):
    """Moves and scales columns to mean 0 and standard deviation 1.

    A constant column is moved but not scaled: its `std` is 1. With `whitening` [d, d]
    scaled rows are multiplied by it: rotated to principal axes, each divided by the
    root of its eigenvalue plus 0.01 of their mean, so that columns are uncorrelated.
    """

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]
    whitening: Float[np.ndarray, "d d"] | None = None

    @classmethod
    def fit(
        cls, rows: Float[np.ndarray, "n d"], whiten: bool = False
    ) -> "Standardizer":
        """Returns the standardizer of at least one row; its std divides by n."""
        rows = np.asarray(rows, np.float64)
        # Rounding gives a constant column a tiny spread: compare values instead.
        constant = (rows == rows[0]).all(axis=0)
        mean = np.where(constant, rows[0], rows.mean(axis=0))
        std = np.where(constant, 1.0, rows.std(axis=0))
        std = np.where(std > 0.0, std, 1.0)
        if not whiten:
            return cls(mean, std)
        scaled = (rows - mean) / std
        eigenvalues, axes = np.linalg.eigh(scaled.T @ scaled / len(rows))
        # A table of constant columns alone has nothing to scale by.
        ridge = _RIDGE * eigenvalues.mean() or 1.0
        return cls(mean, std, axes / np.sqrt(np.maximum(eigenvalues, 0.0) + ridge))

    @property
    def log_det(self) -> float:
        """Log of how much `transform` enlarges volumes, nats."""
        log_det = -float(np.log(self.std).sum())
        if self.whitening is not None:
            log_det += float(np.linalg.slogdet(self.whitening)[1])
        return log_det

    def transform(
        self, rows: Float[np.ndarray, "n d"], name: str = "the rows"
    ) -> Float[np.ndarray, "n d"]:
        """Returns (rows − mean) / std as float32; InputError if beyond its range."""
        scaled = (np.asarray(rows, np.float64) - self.mean) / self.std
        if self.whitening is not None:
            scaled = scaled @ self.whitening
        beyond = np.argwhere(~(np.abs(scaled) <= LARGEST))
        if len(beyond):
            i, j = beyond[0]
            raise InputError(
                f"{name}: row {i}, column {j} (both from 0) is {rows[i, j]}, which is "
                f"{scaled[i, j]:.3g} once standardised; finite values below "
                f"{LARGEST:.2g} are allowed; correct or drop the row"
            )
        return scaled.astype(np.float32)

    def inverse(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Returns rows in the columns' units, float64; undoes `transform`."""
        rows = np.asarray(rows, np.float64)
        if self.whitening is not None:
            rows = np.linalg.solve(self.whitening.T, rows.T).T
        return rows * self.std + self.mean


class Table(NamedTuple):
    """A table, split and standardised.

    Attributes:
      columns: names of the d columns; `column_0`, … where the file has none.
      train: rows to train on, float32, standardised. Inliers only, if labelled.
      test: rows to test on, float32, standardised by the same standardizer.
      test_labels: 0 for an inlier, 1 for an outlier; None for an unlabelled table.
      standardizer: fitted on the training rows.
    """

    columns: tuple[str, ...]
    train: Float[np.ndarray, "n d"]
    test: Float[np.ndarray, "m d"]
    test_labels: Int[np.ndarray, " m"] | None
    standardizer: Standardizer


def fingerprint(table: Table) -> str:
    """Returns a SHA-256 of all that a table holds."""
    digest = hashlib.sha256(repr(table.columns).encode())
    for values in (*table.standardizer, table.train, table.test, table.test_labels):
        if values is not None:
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def save_table(table: Table, path: Path) -> None:
    """Keeps a split and standardised table, so that a run needs no other file."""
    arrays = table._asdict() | table.standardizer._asdict()
    del arrays["standardizer"]
    arrays = {name: value for name, value in arrays.items() if value is not None}
    with written_atomically(path) as file:
        np.savez(file, **arrays)


def load_saved_table(path: Path) -> Table:
    """Returns the table that `save_table` kept; InputError if it is not there whole."""
    try:
        arrays = read_npz(path, 2 * MAX_NPZ_BYTES)
        affine = arrays["mean"], arrays["std"], arrays.get("whitening")
        standardizer = Standardizer(*affine)
        columns, train, test = (arrays[key] for key in ("columns", "train", "test"))
    except (OSError, KeyError, InputError) as error:
        raise InputError(
            f"{path} does not hold the run's table ({one_line(error)}); copy the whole "
            "run directory, or train again"
        ) from error
    labels = arrays.get("test_labels")
    return Table(tuple(columns.tolist()), train, test, labels, standardizer)


def load_breast_cancer(seed: int, test_fraction: float, whiten: bool = False) -> Table:
    """Loads scikit-learn's breast-cancer table: 569 rows, 30 columns.

    357 rows are benign (inliers), 212 malignant (outliers). Training uses benign rows
    only; the test set is the held-out benign rows, then all malignant rows.
    """
    from sklearn import datasets

    raw = datasets.load_breast_cancer()
    # scikit-learn's target is 1 for benign.
    labels = np.where(raw.target == 1, INLIER, OUTLIER)
    columns = tuple(map(str, raw.feature_names))
    table = TableFile(columns, raw.data, labels, "row {}".format)
    name = "scikit-learn's breast-cancer table"
    return _split(name, table, seed, test_fraction, whiten)


def load_table(
    path: str | Path,
    seed: int,
    test_fraction: float,
    label_column: str = "",
    drop_columns: tuple[str, ...] = (),
    header: str = "auto",
    whiten: bool = False,
) -> Table:
    """Loads a table from a file, splits it and standardises it.

    The fraction is of the rows (of the inliers); the next three arguments are those of
    `TableOptions`, and the last is that of `Standardizer.fit`. The test set is the
    held-out rows, then all outliers. Log lines say what was found. Raises
    FileNotFoundError, or InputError for a file or a fraction that cannot be used.
    """
    options = TableOptions(
        header, label_column=label_column, drop_columns=tuple(drop_columns)
    )
    file = read_table_file(user_path(path, "data.path"), options)
    _report(path, file)
    return _split(str(path), file, seed, test_fraction, whiten)


# Names of columns that are likely to be labels.
_LIKE_LABELS = "label labels y target class outlier is_outlier anomaly is_anomaly"


def _report(path: str | Path, file: TableFile) -> None:
    """Logs what a table holds, and warns of columns that may be labels."""
    columns, rows, labels, *_ = file
    found = "no labels, so all rows are taken for inliers"
    if labels is not None:
        num = int((labels == OUTLIER).sum())
        found = f"{len(rows) - num} inliers and {num} outliers by their labels"
    names = listed(map(shown, columns))
    size = f"{len(rows)} rows and {len(columns)} columns"
    logging.info("%s: %s (%s); %s", path, size, names, found)
    learnt = rows if labels is None else rows[labels == INLIER]
    if len(learnt) > 1 and (learnt == learnt[:1]).all():
        raise InputError(
            f"{path}: all {len(learnt)} rows to train on are the same, and nothing is "
            "to be learnt from them; give rows that differ"
        )
    likely = [c for c in columns if c.lower() in _LIKE_LABELS.split()]
    if labels is None and likely:
        logging.warning(
            "%s: trained on like others, but named like labels: %s; if they are, name "
            "it by data.label_column, or leave it out by data.drop_columns",
            *(path, listed(map(shown, likely))),
        )


def read_rows(
    path: str | Path, options: TableOptions, standardizer: Standardizer | None = None
) -> tuple[Float[np.ndarray, "n d"], tuple[str, ...] | None]:
    """Returns the rows of a CSV or NPZ file, float32, to be scored, and their ids.

    `options` tells the model's columns, which are chosen by name, where the file and
    the training table have names, and what lies beside them. Raises FileNotFoundError,
    or InputError for a file that cannot be used, or that lacks a column.
    """
    path = user_path(path, "--input")
    file = read_table_file(path, options)
    if standardizer is None:
        return file.rows.astype(np.float32), file.ids
    return standardizer.transform(file.rows, str(path)), file.ids


def _split(
    name: str, table: TableFile, seed: int, test_fraction: float, whiten: bool
) -> Table:
    """Holds out a random share of the inliers; all outliers are for testing."""
    columns, rows, labels, *_ = table
    inliers, kind, test_labels = np.arange(len(rows)), "rows", None
    if labels is not None:
        inliers, kind = np.flatnonzero(labels == INLIER), "rows labelled 0"
    split = hold_out(len(inliers), test_fraction, seed, f"{name}: {kind}", min_train=2)
    kept, test = inliers[split.train], inliers[split.test]
    if labels is not None:
        test = np.concatenate([test, np.flatnonzero(labels == OUTLIER)])
        test_labels = labels[test].astype(np.int64)
    standardizer = Standardizer.fit(rows[kept], whiten)
    parts = (standardizer.transform(rows[part], name) for part in (kept, test))
    return Table(columns, *parts, test_labels, standardizer)
