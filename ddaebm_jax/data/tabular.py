"""Tables: rows of numbers, split, standardised, and read back for scoring.

A table comes from scikit-learn's breast-cancer data, or from any CSV or NPZ file.
Where rows are labelled 0 (inlier) or 1 (outlier), a model trains on inliers only and
is tested on held-out inliers and on every outlier. Standardisation is fitted on the
training rows alone.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ddaebm_jax.data.records import hold_out
from ddaebm_jax.data.table_files import (
    INLIER,
    LARGEST,
    MAX_NPZ_BYTES,
    OUTLIER,
    read_table_file,
)
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.files import read_npz, written_atomically


class Standardizer(NamedTuple):
    """Moves and scales columns to mean 0 and standard deviation 1.

    A column whose fitted standard deviation is 0 (a constant one) is moved but not
    scaled: its `std` is 1.

    Attributes:
      mean: of each column, in the column's unit.
      std: of each column, in the column's unit; positive.
    """

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]

    @classmethod
    def fit(cls, rows: Float[np.ndarray, "n d"]) -> "Standardizer":
        """Returns the standardizer of at least one row, computed in float64.

        The standard deviation divides by n. Raises InputError without a row.
        """
        if not len(rows):
            raise InputError("a standardizer needs at least 1 row to fit; found 0")
        rows = np.asarray(rows, np.float64)
        # Rounding gives a constant column a tiny spread: compare values instead.
        constant = (rows == rows[0]).all(axis=0)
        mean = np.where(constant, rows[0], rows.mean(axis=0))
        std = np.where(constant, 1.0, rows.std(axis=0))
        return cls(mean, np.where(std > 0.0, std, 1.0))

    def transform(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Returns (rows − mean) / std, computed in float64, stored as float32.

        Raises InputError for another width, or a result beyond float32's range.
        """
        _check_width(rows.shape[1], len(self.mean), "the rows to standardise")
        scaled = (np.asarray(rows, np.float64) - self.mean) / self.std
        beyond = np.argwhere(~(np.abs(scaled) <= LARGEST))
        if len(beyond):
            i, j = beyond[0]
            raise InputError(
                f"row {i} of those given, column {j} (both from 0) is {rows[i, j]}, "
                f"which is {scaled[i, j]:.3g} once standardised; finite values below "
                f"{LARGEST:.2g} are allowed; correct or drop the row"
            )
        return scaled.astype(np.float32)

    def inverse(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """Returns rows·std + mean in the columns' units, float64."""
        _check_width(rows.shape[1], len(self.mean), "the rows to scale back")
        return np.asarray(rows, np.float64) * self.std + self.mean

    def to_dict(self) -> dict[str, list[float]]:
        """Returns {'mean': […], 'std': […]}, which JSON keeps exactly."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Standardizer":
        """Returns the standardizer that `to_dict` saved; InputError if damaged."""
        try:
            mean, std = (np.asarray(saved[key], np.float64) for key in ("mean", "std"))
            if mean.ndim != 1 or mean.shape != std.shape:
                raise ValueError(f"shapes {mean.shape} and {std.shape}")
            if not (np.isfinite([mean, std]).all() and (std > 0).all()):
                raise ValueError("a number that is not finite, or a std not above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "a saved standardizer needs 'mean' and 'std', equally long lists of "
                f"finite numbers ({one_line(error)}); save it again with to_dict"
            ) from error
        return cls(mean, std)


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
    """Returns a SHA-256 of a table: columns, split rows, and their units."""
    digest = hashlib.sha256(repr(table.columns).encode())
    for values in (*table.standardizer, table.train, table.test, table.test_labels):
        if values is not None:
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def save_table(table: Table, path: Path) -> None:
    """Keeps a split and standardised table, so that a run needs no other file."""
    arrays = {
        "columns": np.asarray(table.columns),
        "train": table.train,
        "test": table.test,
        "mean": table.standardizer.mean,
        "std": table.standardizer.std,
    }
    if table.test_labels is not None:
        arrays["test_labels"] = table.test_labels
    with written_atomically(path) as file:
        np.savez(file, **arrays)


def load_saved_table(path: Path) -> Table:
    """Returns the table that `save_table` kept; InputError if it is not there whole."""
    try:
        arrays = read_npz(path, 2 * MAX_NPZ_BYTES)
        columns, train, test = (arrays[key] for key in ("columns", "train", "test"))
        labels = arrays.get("test_labels")
        standardizer = Standardizer.from_dict(arrays)
        width = (len(standardizer.mean),)
        fits = (columns.dtype.kind, columns.shape) == ("U", width) and len(train) > 0
        for rows in (train, test):
            fits &= (rows.dtype, rows.shape[1:]) == (np.float32, width)
            fits &= bool(np.isfinite(rows).all())
        if labels is not None:
            fits &= (labels.dtype.kind, labels.shape) == ("i", test.shape[:1])
        if not fits:
            raise ValueError("its arrays do not fit together, or are not finite")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} does not hold the run's table ({one_line(error)}); copy the whole "
            "run directory, or train again"
        ) from error
    return Table(tuple(columns.tolist()), train, test, labels, standardizer)


def load_breast_cancer(seed: int, test_fraction: float) -> Table:
    """Loads scikit-learn's breast-cancer table: 569 rows, 30 columns.

    357 rows are benign (inliers), 212 malignant (outliers). Training uses benign rows
    only; the test set is the held-out benign rows, then all malignant rows. Raises
    InputError for a fraction that cannot be used.
    """
    from sklearn import datasets

    raw = datasets.load_breast_cancer()
    # scikit-learn's target is 1 for benign.
    labels = np.where(raw.target == 1, INLIER, OUTLIER)
    columns = tuple(map(str, raw.feature_names))
    rows = np.asarray(raw.data, np.float64)
    return _split(
        "scikit-learn's breast-cancer table", columns, rows, labels, seed, test_fraction
    )


def load_table(
    path: str | Path,
    seed: int,
    test_fraction: float,
    label_column: str | None = None,
) -> Table:
    """Loads a table from a file, splits it and standardises it.

    The formats are those of `table_files`. With labels, 0 (inlier) or 1 (outlier),
    training uses inliers only, and the test set is the held-out inliers, then all
    outliers; without, the split is of all rows.

    `test_fraction` is the share of the rows (of the inliers) that is held out, chosen
    by the seed; `label_column` is that of `read_table_file`. Raises FileNotFoundError,
    or InputError for a file or a fraction that cannot be used.
    """
    path = Path(path)
    table = read_table_file(path, label_column, labelled=True)
    return _split(
        str(path), table.columns, table.rows, table.labels, seed, test_fraction
    )


def read_rows(
    path: str | Path,
    dim: int | None = None,
    standardizer: Standardizer | None = None,
    columns: tuple[str, ...] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Reads the rows of a CSV or NPZ file, to be scored, as float32.

    Labels are not looked for: a CSV must hold the model's columns only.

    Args:
      path: ends in `.csv` or `.npz`.
      dim: the width that the rows must have; None: any (or the standardizer's).
      standardizer: the training table's, applied before rounding to float32, as to the
        training rows; None: the rows stay in the columns' units.
      columns: the training table's names. A file whose own names are these in
        another order is put in order; a file without names is taken as it stands.

    Raises FileNotFoundError, or InputError for a file that cannot be used, or rows of
    another width or with other names.
    """
    path = Path(path)
    table = read_table_file(path)
    rows = table.rows
    if dim is None and standardizer is not None:
        dim = len(standardizer.mean)
    if dim is not None:
        _check_width(rows.shape[1], dim, str(path))
    if columns is not None and _are_names(columns) and _are_names(table.columns):
        missing = [name for name in columns if name not in table.columns]
        if missing:
            raise InputError(
                f"{path}: there is no column '{missing[0]}'; the model was trained on "
                f"{', '.join(columns)}: give these"
            )
        rows = rows[:, [table.columns.index(name) for name in columns]]
    if standardizer is None:
        return rows.astype(np.float32)
    try:
        return standardizer.transform(rows)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _are_names(columns: tuple[str, ...]) -> bool:
    """Whether a file gave these names, rather than their places."""
    return columns != tuple(f"column_{i}" for i in range(len(columns)))


def _check_width(found: int, needed: int, what: str) -> None:
    if found != needed:
        raise InputError(
            f"{what}: {found} columns found, {needed} needed; give the columns that "
            "the model was trained on, in the same order and without labels"
        )


def _split(
    name: str,
    columns: tuple[str, ...],
    rows: np.ndarray,
    labels: np.ndarray | None,
    seed: int,
    test_fraction: float,
) -> Table:
    """Holds out a random share of the inliers; all outliers are for testing."""
    inliers = np.arange(len(rows)) if labels is None else np.flatnonzero(labels == 0)
    kind = "rows" if labels is None else "rows labelled 0"
    split = hold_out(len(inliers), test_fraction, seed, f"{name}: {kind}", min_train=2)
    kept, test = inliers[split.train], inliers[split.test]
    test_labels = None
    if labels is not None:
        test = np.concatenate([test, np.flatnonzero(labels == OUTLIER)])
        test_labels = labels[test].astype(np.int64)
    standardizer = Standardizer.fit(rows[kept])
    try:
        train_rows, test_rows = map(standardizer.transform, (rows[kept], rows[test]))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return Table(columns, train_rows, test_rows, test_labels, standardizer)
