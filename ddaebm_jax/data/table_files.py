"""Reads a table of numbers from a CSV or NPZ file.

Files are data from outside: sizes are bounded before anything is allocated, nothing
is ever unpickled, and every error names the file, the place and the value found.

CSV: comma-separated numbers in UTF-8. The first line is a header if none of its cells
is a number; without one the columns are `column_0`, `column_1`, ….

NPZ: the table is the array `x`, or the only 2-D array.
"""

import contextlib
import csv
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddaebm_jax.errors import InputError

# Largest CSV file that is read, bytes.
MAX_CSV_BYTES = 256 * 2**20
# Most bytes that an NPZ file may hold once decompressed, as its headers say, and
# most bytes that its table may take as float64.
MAX_NPZ_BYTES = 512 * 2**20

INLIER, OUTLIER = 0, 1

_LARGEST = float(np.finfo(np.float32).max)


class TableFile(NamedTuple):
    """What a file holds.

    Attributes:
      columns: names of the d columns.
      rows: their numbers, float64, finite in float32.
      labels: 0 (inlier) or 1 (outlier) for each row; None where there are none.
      row_name: the place of row i in the file, for messages.
    """

    columns: tuple[str, ...]
    rows: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"] | None
    row_name: Callable[[int], str]


def read_table_file(
    path: Path, label_column: str | None = None, labelled: bool = False
) -> TableFile:
    """Reads a file by its suffix, and checks that every number is usable.

    Args:
      path: ends in `.csv` or `.npz`.
      label_column: the CSV's column, or the NPZ's 1-D array, that holds the labels;
        None: none in a CSV, and in an NPZ the array `labels` if there is one.
      labelled: False: labels are not looked for.

    Raises:
      FileNotFoundError: if there is no such file.
      InputError: for a file that cannot be used; the message names the file, the
        place, the value found, what is allowed and what to try.
    """
    readers = {".csv": _read_csv, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: the suffix is '{path.suffix}'; allowed: {', '.join(readers)}; "
            "save the table as one of these"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; give the path of a file")
    table = reader(path, label_column, labelled)
    bad = np.argwhere(~(np.abs(table.rows) <= _LARGEST))
    if len(bad):
        i, j = bad[0]
        raise InputError(
            f"{path}: {table.row_name(i)}, column {_shown(table.columns[j])} is "
            f"{table.rows[i, j]}; finite numbers of size at most {_LARGEST:.2g} are "
            "allowed; fill in missing values or drop the row"
        )
    if table.labels is not None:
        bad = np.flatnonzero(~np.isin(table.labels, (INLIER, OUTLIER)))
        if len(bad):
            raise InputError(
                f"{path}: {table.row_name(bad[0])} has the label "
                f"{table.labels[bad[0]]}; allowed: 0 (inlier), 1 (outlier); write "
                "the labels as 0 and 1"
            )
    return table


def _shown(value: str) -> str:
    """A cell as an error message shows it: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}…'"


def _number(cell: str) -> float | None:
    """The cell's number, or None. Python's 1_000 is not a number here."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of a CSV file; blank lines are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            for cells in lines:
                if cells and (len(cells) > 1 or cells[0].strip()):
                    yield lines.line_num, cells
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 text after line {lines.line_num} "
                f"({error.reason}); save it as a CSV in UTF-8"
            ) from error
        except csv.Error as error:
            raise InputError(
                f"{path}: line {lines.line_num} is not CSV ({error}); save the table "
                "again as comma-separated values"
            ) from error


def _csv_header(path: Path, line: int, cells: list[str]) -> tuple[str, ...] | None:
    """The columns' names, or None if the first line holds numbers."""
    numbers = [_number(cell) is not None for cell in cells]
    if all(numbers):
        return None
    if any(numbers):
        j = numbers.index(False)
        raise InputError(
            f"{path}: line {line}, column {j + 1} is {_shown(cells[j])} beside cells "
            "that are numbers; a first line holds only names or only numbers; rename "
            "the columns or correct the cell"
        )
    names = tuple(cell.strip() for cell in cells)
    for j, name in enumerate(names):
        if not name or name in names[:j]:
            fault = f"{_shown(name)} a second time" if name else "empty"
            raise InputError(
                f"{path}: line {line}, column {j + 1} of the header is {fault}; every "
                "column needs a name of its own (pandas: to_csv with index=False)"
            )
    return names


def _read_csv(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    size = path.stat().st_size
    if size > MAX_CSV_BYTES:
        raise InputError(
            f"{path}: {size} bytes; at most {MAX_CSV_BYTES} are allowed in a CSV; "
            "save the table as NPZ, or split it"
        )
    lines = _csv_lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path}: the file is empty; a row of numbers is needed")
    header = _csv_header(path, *first)
    width = len(first[1])
    columns = header or tuple(f"column_{j}" for j in range(width))
    label = _csv_label(path, columns, label_column) if labelled else None

    numbers, line_numbers = array("d"), array("q")

    def append(line: int, cells: list[str]) -> None:
        if len(cells) != width:
            raise InputError(
                f"{path}: line {line} has {len(cells)} columns, line {first[0]} has "
                f"{width}; every line needs as many; add or remove cells there"
            )
        for name, cell in zip(columns, cells, strict=True):
            number = _number(cell)
            if number is None:
                raise InputError(
                    f"{path}: line {line}, column {_shown(name)} is {_shown(cell)}; a "
                    "number is needed; drop the column or write it as numbers, fill "
                    "in missing values, and separate cells by commas"
                )
            numbers.append(number)
        line_numbers.append(line)

    if header is None:
        append(*first)
    for line, cells in lines:
        append(line, cells)
    if not line_numbers:
        raise InputError(
            f"{path}: line {first[0]} is a header and no row follows; at least one "
            "row of numbers is needed"
        )
    rows = np.frombuffer(numbers, np.float64).reshape(-1, width)
    labels = None
    if label is not None:
        labels, rows = rows[:, label], np.delete(rows, label, axis=1)
        columns = columns[:label] + columns[label + 1 :]
    return TableFile(columns, rows, labels, lambda i: f"line {line_numbers[i]}")


def _csv_label(
    path: Path, columns: tuple[str, ...], label_column: str | None
) -> int | None:
    """The place of the label's column."""
    if label_column is None:
        return None
    if label_column not in columns:
        raise InputError(
            f"{path}: no column {_shown(label_column)} for label_column; found: "
            f"{_listed(columns)}"
        )
    if len(columns) == 1:
        raise InputError(
            f"{path}: the label {_shown(label_column)} is the only column; at "
            "least one other is needed"
        )
    return columns.index(label_column)


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, not too many of them."""
    more = len(names) - most
    return ", ".join(map(_shown, names[:most])) + (
        f" and {more} more" if more > 0 else ""
    )


class _Array(NamedTuple):
    """A member of an NPZ file, as its headers describe it."""

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "a scalar"
        return f"{_shown(_array_name(self.member))} ({shape}, {self.dtype})"


def _described(arrays: dict[str, _Array], most: int = 12) -> str:
    """Arrays for a message, not too many of them."""
    more = len(arrays) - most
    some = ", ".join(map(str, list(arrays.values())[:most])) or "none"
    return some + (f" and {more} more" if more > 0 else "")


def _array_name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


_SAVE_AGAIN = "save it with numpy.savez(path, x=rows)"


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a damaged archive raises into one refusal.

    zipfile's and numpy's parsers raise a dozen kinds of errors on damaged bytes.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {reason}); "
            f"{_SAVE_AGAIN}"
        ) from error


def _read_npz(path: Path, label_column: str | None, labelled: bool) -> TableFile:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an NPZ file (not a zip archive); {_SAVE_AGAIN}")
    with _readable(path, "the zip archive"):
        archive = zipfile.ZipFile(path)
    with archive:
        arrays = _npz_arrays(path, archive)
        table = _npz_table(path, arrays)
        rows = _npz_numbers(path, archive, table)
        label = label_column
        if label is None and "labels" in arrays:
            label = "labels"
        labels = None
        if labelled and label is not None:
            chosen = _npz_labels(path, arrays, label, len(rows))
            labels = _npz_numbers(path, archive, chosen)
    if not rows.size:
        raise InputError(
            f"{path}: the array {table} is empty; at least one row and one column "
            "are needed"
        )
    columns = tuple(f"column_{j}" for j in range(rows.shape[1]))
    return TableFile(columns, rows, labels, lambda i: f"row {i} (counted from 0)")


def _npz_arrays(path: Path, archive: zipfile.ZipFile) -> dict[str, _Array]:
    """Reads the headers of all arrays; nothing of an array's size is allocated."""
    members = archive.infolist()
    for member in members:
        if not member.filename.endswith(".npy"):
            raise InputError(
                f"{path}: a zip archive but not an NPZ file: it holds "
                f"{_shown(member.filename)}; only .npy members are allowed; "
                f"{_SAVE_AGAIN}"
            )
    size = sum(member.file_size for member in members)
    if size > MAX_NPZ_BYTES:
        raise InputError(
            f"{path}: {size} bytes once decompressed; at most {MAX_NPZ_BYTES} are "
            "allowed; split the table, or save it as float32"
        )
    return {
        _array_name(member): _npz_header(path, archive, member) for member in members
    }


def _npz_header(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> _Array:
    # zipfile itself stops at the size in the member's header, so that what follows
    # can rely on it; other methods than these two are not numpy's.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(
            f"{path}: the member {_shown(member.filename)} is compressed by method "
            f"{member.compress_type}; stored and deflated are allowed; {_SAVE_AGAIN}"
        )
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with (
        _readable(path, f"the member {_shown(member.filename)}"),
        archive.open(member) as file,
    ):
        version = np.lib.format.read_magic(file)
        if version not in formats:
            raise InputError(f"version {version} of the .npy format")
        shape, _, dtype = formats[version](file)
        held = member.file_size - file.tell()
    described = _Array(member, shape, dtype)
    cells = 1
    for axis in shape:
        cells *= axis
    if not dtype.hasobject and cells * dtype.itemsize != held:
        raise InputError(
            f"{path}: the array {described} needs {cells * dtype.itemsize} bytes and "
            f"the file holds {held} of it; {_SAVE_AGAIN}"
        )
    if cells * 8 > MAX_NPZ_BYTES:
        raise InputError(
            f"{path}: the array {described} takes {cells * 8} bytes as float64; at "
            f"most {MAX_NPZ_BYTES} are allowed; split the table"
        )
    return described


def _npz_table(path: Path, arrays: dict[str, _Array]) -> _Array:
    """Chooses the table among the arrays."""
    found = _described(arrays)
    if "x" in arrays:
        if len(arrays["x"].shape) != 2:
            raise InputError(
                f"{path}: the array {arrays['x']} is not 2-D; rows × columns are "
                f"needed; {_SAVE_AGAIN}"
            )
        return arrays["x"]
    tables = [described for described in arrays.values() if len(described.shape) == 2]
    if len(tables) != 1:
        raise InputError(
            f"{path}: no array 'x' and {len(tables)} 2-D arrays where exactly one is "
            f"needed; found: {found}; {_SAVE_AGAIN}"
        )
    return tables[0]


def _npz_labels(
    path: Path, arrays: dict[str, _Array], name: str, num_rows: int
) -> _Array:
    if name not in arrays:
        raise InputError(
            f"{path}: no array {_shown(name)} for label_column; found: "
            f"{_described(arrays)}"
        )
    if arrays[name].shape != (num_rows,):
        raise InputError(
            f"{path}: the labels {arrays[name]} are not one for each of the "
            f"{num_rows} rows; save a 1-D array of that length"
        )
    return arrays[name]


def _npz_numbers(
    path: Path, archive: zipfile.ZipFile, described: _Array
) -> Float[np.ndarray, "..."]:
    """Reads one array as float64."""
    if described.dtype.hasobject:
        raise InputError(
            f"{path}: the array {described} holds Python objects; object arrays are "
            "refused, because reading them means unpickling; save numbers, for "
            "example with rows.astype('float32')"
        )
    if described.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: the array {described} does not hold real numbers; integers, "
            "floats and booleans are allowed; convert it before saving"
        )
    with (
        _readable(path, f"the array {described}"),
        archive.open(described.member) as file,
    ):
        values = np.lib.format.read_array(file, allow_pickle=False)
    with np.errstate(over="ignore"):
        return values.astype(np.float64)
