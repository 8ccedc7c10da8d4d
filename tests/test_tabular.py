"""Tables: what is split, standardised and read, and what is refused."""

import os
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from untrusted import FUZZ, read_or_refused
from untrusted import refused as refused_cheaply

from ddaebm_jax.data import table_files, tabular
from ddaebm_jax.data.table_files import TableOptions
from ddaebm_jax.data.tabular import Standardizer
from ddaebm_jax.errors import InputError

values = st.floats(-1e6, 1e6, allow_subnormal=False)
tables = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=values
)


@pytest.fixture
def save(tmp_path):
    """Saves text, bytes or arrays; returns the path."""

    def write(name, content=None, **arrays):
        path = tmp_path / name
        if arrays:
            np.savez(path, **arrays)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture
def told(caplog):
    """Returns what has been logged so far."""
    caplog.set_level("INFO", "absl")
    return lambda: caplog.text


def to_score(path, columns=None, **options):
    """The rows of a file, for a model with these columns, or so many."""
    if isinstance(columns, int):
        columns = tuple(f"column_{j}" for j in range(columns))
    return tabular.read_rows(path, TableOptions(columns=columns, **options))[0]


def numbered(n, d=3):
    """Rows of different numbers."""
    return np.arange(n * d, dtype=np.float64).reshape(n, d) ** 1.5


# --- Standardizer ---------------------------------------------------------------


@given(tables)
def test_standardised_columns_have_mean_0_and_std_1_or_0(rows):
    standardizer = Standardizer.fit(rows)
    assert (standardizer.std > 0).all()
    scaled = (rows - standardizer.mean) / standardizer.std
    spread = scaled.std(axis=0)
    # Where rounding drowns a column's spread, only its finiteness is promised.
    clear = (rows.std(axis=0) > 1e-6 * np.abs(rows).max(axis=0)) & (spread > 0)
    np.testing.assert_allclose(scaled.mean(axis=0)[clear], 0.0, atol=1e-6)
    np.testing.assert_allclose(spread[clear], 1.0, rtol=1e-6)
    assert np.isfinite(standardizer.transform(rows)).all()


@given(tables)
def test_inverse_undoes_transform(rows):
    standardizer = Standardizer.fit(rows)
    back = standardizer.inverse(standardizer.transform(rows))
    scale = standardizer.std * (1 + np.abs(rows - standardizer.mean).max())
    assert (np.abs(back - rows) <= 1e-6 * scale + 1e-9 * np.abs(rows)).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e30, 1e-300])
def test_constant_column_is_moved_and_not_scaled(constant):
    rows = np.stack([np.full(7, constant), np.arange(7.0)], axis=1)
    standardizer = Standardizer.fit(rows)
    assert (standardizer.mean[0], standardizer.std[0]) == (constant, 1.0)
    assert (standardizer.transform(rows)[:, 0] == 0).all()


def test_transform_gives_float32_from_float64_arithmetic():
    rows = 1.7e9 + np.arange(5.0)[:, None]
    scaled = Standardizer.fit(rows).transform(rows)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(
        scaled[:, 0], (np.arange(5.0) - 2) / np.sqrt(2), rtol=1e-6
    )


def test_rows_that_cannot_be_standardised_are_refused():
    standardizer = Standardizer(np.zeros(2), np.array([1.0, 1e-30]))
    with pytest.raises(InputError, match=r"row 1, column 1 .*1e\+20.*1e\+50"):
        standardizer.transform(np.array([[0.0, 0.0], [1.0, 1e20]]))


# --- The split ------------------------------------------------------------------


def assert_equal_tables(first, second):
    assert tabular.fingerprint(first) == tabular.fingerprint(second)
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.test, second.test)


@pytest.mark.parametrize("seed", [0, 3])
def test_breast_cancer_trains_on_benign_rows_and_covers_all(seed):
    from sklearn import datasets

    raw = datasets.load_breast_cancer()
    table = tabular.load_breast_cancer(seed, 0.3)
    assert table.train.shape == (250, 30)
    assert table.test.shape == (107 + 212, 30)
    assert table.train.dtype == table.test.dtype == np.float32
    assert (table.test_labels == np.repeat([0, 1], [107, 212])).all()
    assert table.columns[0] == "mean radius" and len(table.columns) == 30
    benign = np.concatenate([table.train, table.test[:107]])
    for rows, target in ((benign, 1), (table.test[107:], 0)):
        back = np.sort(table.standardizer.inverse(rows), axis=0)
        expected = np.sort(raw.data[raw.target == target], axis=0)
        np.testing.assert_allclose(back, expected, rtol=1e-4, atol=1e-5)


def test_split_is_disjoint_covers_all_and_repeats(save):
    rows = numbered(30)
    path = save("t.npz", x=rows)
    table, again = (tabular.load_table(path, 3, 0.3) for _ in range(2))
    assert_equal_tables(table, again)
    assert table.test_labels is None and len(table.test) == 9
    back = table.standardizer.inverse(np.concatenate([table.train, table.test]))
    np.testing.assert_allclose(np.sort(back, axis=0), rows, rtol=1e-4, atol=1e-2)


def test_standardizer_sees_training_rows_only(save):
    """Outliers and held-out rows may be anything: what is fitted does not move."""
    rows, labels = numbered(40), np.repeat([0, 1], [30, 10])
    first = tabular.load_table(save("a.npz", x=rows, labels=labels), 5, 0.3)
    held_out = np.round(first.standardizer.inverse(first.test)[:, 0])
    is_test = np.isin(np.round(rows[:, 0]), held_out)
    assert is_test.sum() == len(first.test)
    changed = np.where(is_test[:, None], rows * 1e4, rows)
    second = tabular.load_table(save("b.npz", x=changed, labels=labels), 5, 0.3)
    np.testing.assert_array_equal(first.train, second.train)
    for table in (first, second):
        fitted = Standardizer.fit(rows[~is_test])
        np.testing.assert_array_equal(fitted[:2], table.standardizer[:2])


def csv_of(rows, header=()):
    lines = [",".join(header)] * bool(header)
    lines += [",".join(map(repr, row)) for row in np.asarray(rows, float).tolist()]
    return "\n".join(lines) + "\n"


def test_labels_mean_the_same_in_csv_and_npz(save):
    rows, labels = numbered(20), np.arange(20) % 4 // 3
    both = np.insert(rows, 1, labels, axis=1)
    header = ("a", "label", "b", "c")
    found = [
        tabular.load_table(path, 2, 0.4, label)
        for path, label in (
            (save("t.csv", csv_of(both, header)), "label"),
            (save("bare.csv", csv_of(both)), "column_1"),
            (save("t.npz", x=rows, labels=labels), ""),
            (save("v.npz", X=np.asfortranarray(rows, ">f8"), y=labels[:, None]), ""),
            (save("u.npz", x=rows, outlier=labels.astype(bool)), "outlier"),
        )
    ]
    assert found[0].columns == ("a", "b", "c")
    assert found[1].columns == ("column_0", "column_2", "column_3")
    for table in found:
        np.testing.assert_array_equal(table.train, found[0].train)
        np.testing.assert_array_equal(table.test, found[0].test)
        assert table.train.shape == (9, 3)
        np.testing.assert_array_equal(table.test_labels, np.repeat([0, 1], [6, 5]))


@pytest.mark.parametrize("n,share", [(9, 0.0), (9, float("nan")), (2, 0.5), (3, 0.1)])
def test_impossible_splits_are_refused(save, n, share):
    with pytest.raises(InputError, match=rf"few.npz: rows: .* of {n} holds out"):
        tabular.load_table(save("few.npz", x=numbered(n)), 0, share)
    path = save("none.npz", x=numbered(9), labels=np.ones(9, int))
    with pytest.raises(InputError, match=r"rows labelled 0: .* of 0 "):
        tabular.load_table(path, 0, share)


# --- Reading --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i1", "u2", "i8", "?"])
@pytest.mark.parametrize("order,saver", [("C", np.savez), ("F", np.savez_compressed)])
def test_npz_of_any_real_type_is_read(tmp_path, dtype, order, saver):
    rows = (numbered(5, 4) % 7).astype(dtype, order=order)
    saver(tmp_path / "t.npz", rows)
    read = to_score(tmp_path / "t.npz", 4)
    np.testing.assert_array_equal(read, rows.astype(np.float32))


def test_csv_keeps_every_bit(save):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 3)) * 10.0 ** rng.integers(-300, 37, (500, 3))
    read = table_files.read_table_file(save("t.csv", csv_of(rows)))
    np.testing.assert_array_equal(read.rows, rows, strict=True)


def test_csv_forms_that_programs_write(save):
    """BOM, Windows line ends, quotes, spaces, blank lines, no last line end."""
    text = '\ufeff"a, b",c\r\n\r\n 1 ,"2"\r\n+3e0,-.5\r\n  \r\n\r\n7,8'
    path = save("t.csv", text.encode("utf-8"))
    np.testing.assert_array_equal(to_score(path), [[1, 2], [3, -0.5], [7, 8]])


def test_where_cells_may_miss_blank_columns_and_lines_between_stay(save):
    options = table_files.TableOptions(columns=tuple("abc"), may_miss=True)
    path = save("t.csv", "1,,3\n\n4,,\n\n,,\n")
    read, nan = table_files.read_table_file(path, options), np.nan
    np.testing.assert_array_equal(read.rows, [[1, nan, 3], [nan] * 3, [4, nan, nan]])
    assert read.row_name(2) == "line 3"


def refused(path, *parts, dim=None):
    message = refused_cheaply(lambda: to_score(path, dim), *parts)
    assert message.startswith(f"{path}: ") and len(message) < 600


def test_files_that_are_not_tables_at_all(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.csv: no such file"):
        to_score(tmp_path / "nothing.csv")
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", "not a regular file")
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", "not a regular file")
    for name in ("t.txt", "t", "t.npy", "t.pkl"):
        refused(save(name, "1,2\n"), "suffix", ".csv, .npz")
    assert to_score(save("T.CSV", "1,2\n")).shape == (1, 2)


@pytest.mark.parametrize(
    "text,parts",
    [
        ("", ["not a CSV", "No columns"]),
        (" \n\n", ["is empty"]),
        ("a,b\n", ["is empty (0×2)"]),
        ("1,2\n", ["2 columns found, 3 needed"]),
        ("a,b\n1,2\n3\n", ["line 3, column 'b' is ''"]),
        ("a,b\n1,2,3\n4,5,6\n", ["Expected 2 fields in line 2, saw 3"]),
        ("a,b\n1,2\n3,red\n", ["line 3, column 'b' is 'red'", "number of size"]),
        ("1,2\n3,\n", ["line 2, column 'column_1' is ''", "missing values"]),
        ("1,2\n3,#N/A\n", ["line 2", "'#N/A'"]),
        ("a;b\n1;2\n", ["line 2", "'1;2'", "separate cells by commas"]),
        ("a,b\n1,nan\n", ["line 2, column 'b' is 'nan'", "missing values"]),
        ("a,b\n\n1,2\n-inf,2\n", ["line 4, column 'a' is '-inf'"]),
        ("a,b\n1e39,2\n", ["line 2, column 'a' is '1e39'", "3.4e+38"]),
        ("1,nan\n3,4\n", ["line 1, column 'column_1' is 'nan'"]),
        ("a,b\n1,12_3\n", ["line 2, column 'b' is '12_3'"]),  # 123 to Python.
        ('a,b\n1,"1,234"\n', ["line 2, column 'b' is '1,234'"]),
        (",b\n1,2\n", ["column 1 of the header", "empty", "index=False"]),
        (",0,1\n0,.5,2\n1,3,4\n", ["column 1 of the header", "index=False"]),
        ("b,b\n1,2\n", ["column 1 of the header", "'b'", "used twice"]),
        ('a,b\n1,"2\n', ["not a CSV", "EOF inside string"]),
        (f"a,b\n1,{'x' * 1000}\n", ["…'"]),
        (b"a,b\n1,2\n\xff\xfe,3\n", ["not a CSV", "UTF-8"]),
        ("a,b\n1,2\n".encode("utf-16"), ["not a CSV", "UTF-8"]),
        (b"1," * 2**21, ["its first line is longer than 1048576 bytes"]),
    ],
)
def test_unusable_csv_is_refused(save, text, parts):
    refused(save("t.csv", text), *parts, dim=3 if "needed" in parts[0] else None)


def test_large_files_are_refused_before_they_are_read(save, monkeypatch):
    path = save("t.csv", b"")
    os.truncate(path, 2**40)  # A sparse file: it takes no space.
    refused(path, "1099511627776 bytes", "at most 268435456")
    path = save("t.npz", x=np.zeros((100, 10), np.int8))
    monkeypatch.setattr(table_files, "MAX_NPZ_BYTES", 2000)
    refused(path, "'x' (100×10, int8)", "at most 2000 bytes as float64")


@pytest.mark.parametrize(
    "text,label,part",
    [
        ("a,b\n1,0\n2,2\n", "kind", "no column 'kind'; found: 'a', 'b'"),
        ("a,b\n1,0\n2,2\n", "b", r"line 3 has the label '2'; allowed: 0 .inlier., 1"),
        ("a,b\n1,0\n2,bad\n", "b", "line 3 has the label 'bad'; allowed: 0"),
        ("a\n1\n0\n", "a", "no column is left beside a"),
    ],
)
def test_unusable_csv_labels_are_refused(save, text, label, part):
    with pytest.raises(InputError, match=part):
        tabular.load_table(save("t.csv", text), 0, 0.5, label)


@pytest.mark.parametrize(
    "arrays,label,part",
    [
        ({"labels": np.zeros(3)}, "", r"each of the 4 rows; .*'labels' \(3, float64"),
        ({"labels": np.array([0, 0, 0.5, 1])}, "", "row 2 .*label '0.5'"),
        (
            {"y": np.array([1, 1, -1, 1])},
            "",
            "row 2 .*label '-1'; .*1 and -1 as 0 and 1",
        ),
        ({"labels": np.array(list("abcd"))}, "", "row 0 .*label 'a'"),
        ({"labels": np.zeros(4, object)}, "", "Python objects"),
        ({"labels": np.zeros(4)}, "kind", "1-D array 'kind' .*'labels'"),
    ],
)
def test_unusable_npz_labels_are_refused(save, arrays, label, part):
    path = save("t.npz", x=numbered(4), **arrays)
    with pytest.raises(InputError, match=f"{path}: .*{part}"):
        tabular.load_table(path, 0, 0.5, label)


@pytest.mark.parametrize(
    "arrays,parts",
    [
        ({"x": np.zeros(3)}, ["'x' (3, float64) is no 2-D"]),
        ({"x": np.eye(2), "X": np.eye(3)}, ["2 arrays 'x' or 'X'", "'X' (3×3"]),
        ({"a": np.zeros(3)}, ["0 2-D arrays", "'a' (3, float64)", "savez"]),
        ({"a": np.eye(2), "b": np.eye(3)}, ["2 2-D arrays", "'a' (2×2", "'b' (3×3"]),
        ({"x": np.zeros((0, 3))}, ["is empty (0×3)"]),
        ({"x": np.zeros((3, 0))}, ["is empty (3×0)"]),
        ({"x": np.array([["a"]])}, ["table of real numbers"]),
        ({"x": np.zeros((2, 2), complex)}, ["complex128", "table of real numbers"]),
        ({"x": np.zeros((2, 2), "f4,f4")}, ["table of real numbers"]),
        ({"x": np.array([[1, None]])}, ["Python objects"]),
        ({"x": np.array([[0, 1], [2, np.nan]])}, ["row 1 ", "'column_1' is 'nan'"]),
        ({"x": np.array([[0.0, 1e300]])}, ["row 0", "column 'column_1' is '1e+300'"]),
        ({"x": numbered(2)}, ["3 columns found, 4 needed"]),
    ],
)
def test_unusable_npz_is_refused(save, arrays, parts):
    refused(save("t.npz", **arrays), *parts, dim=4 if "needed" in parts[0] else None)


@FUZZ
@given(st.text(alphabet='0123.-+einaf,;\n\r\t\0 "x_', max_size=60))
def test_any_csv_gives_numbers_or_a_refusal(save, text):
    path = save("t.csv", text.encode())

    def read():
        rows = to_score(path)
        assert rows.size and np.isfinite(rows).all()

    read_or_refused(read)


# --- Tables that a run keeps ----------------------------------------------------


def test_a_kept_table_comes_back_and_damage_is_told(tmp_path):
    table, other = (tabular.load_breast_cancer(seed, 0.3) for seed in (0, 1))
    path = tmp_path / "table.npz"
    tabular.save_table(table, path)
    again = tabular.load_saved_table(path)
    assert_equal_tables(again, table)
    assert again.columns == table.columns
    assert tabular.fingerprint(other) != tabular.fingerprint(table)
    for content in (path.read_bytes()[:1000], None):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(InputError, match=r"not hold the run's table.*train again"):
            tabular.load_saved_table(path)


# --- The first line -------------------------------------------------------------

WAVES = ("400.5", "401.0", "401.5")
SMALL = np.random.default_rng(0).normal(0.002, 0.001, (8, 3))


@pytest.mark.parametrize(
    "first,rows,is_header",
    [
        (WAVES, SMALL, True),
        (("399.1", "402.7", "410.3"), SMALL, True),  # Far from the numbers below.
        (("0", "1", "2"), 1_000 * SMALL, True),
        (("2001", "2002", "2003"), numbered(9) // 1, True),
        (("0", "1", "2", "label"), np.c_[SMALL, np.arange(8) % 2], True),
        (("0.0", "1.0", "3.5"), numbered(9), False),
        (
            ("0.", "1.", "2."),
            np.arange(3.0, 30).reshape(9, 3),
            False,
        ),  # So are all rows.
        (("7", "7", "7"), SMALL, False),  # No names: used twice.
        (WAVES, SMALL[:2], False),  # Nothing tells.
        (("0.5", "2"), np.c_[np.arange(1.0, 9), np.arange(8.0)], False),
    ],
)
def test_a_first_line_of_numbers_is_told_and_a_flag_settles_it(
    save, told, first, rows, is_header
):
    path = save("t.csv", ",".join(first) + "\n" + csv_of(rows))
    table = table_files.read_table_file(path)
    assert table.columns[0] == (first[0] if is_header else "column_0")
    assert len(table.rows) == len(rows) + (not is_header)
    flag = f"--config.data.header={'absent' if is_header else 'present'}"
    assert f"taken for {'the header' if is_header else 'a row'}" in told()
    assert flag in told()
    if "label" not in first and len(set(first)) == len(first):
        for header, num in (("present", len(rows)), ("absent", len(rows) + 1)):
            found = table_files.read_table_file(path, TableOptions(header))
            assert len(found.rows) == num


def test_the_names_of_training_tell_a_header_of_numbers(save, told):
    """However few rows are below; without such names it is a row, and told."""
    path = save("t.csv", "id,400.50,401,4.015e2\nx,1,2,3\n")
    np.testing.assert_array_equal(to_score(path, WAVES[::-1]), [[3, 2, 1]])
    path = save("t.csv", ",".join(WAVES) + "\n1,2,3\n")
    assert len(to_score(path, WAVES)) == 1
    assert len(to_score(path, ("a", "b", "c"), header_flag="--header")) == 2
    assert "taken for a row" in told() and "--header=present" in told()
    assert len(to_score(path, 3, header="present")) == 1


# --- Columns and arrays that are not read ---------------------------------------


def test_the_file_that_trained_is_scored(save, told):
    rows, labels = numbered(20), np.arange(20) % 4 // 3
    both = np.c_[np.arange(20) + 0.5, rows, labels]
    for path, label, drop in (
        (save("t.csv", csv_of(both, ("id", *"abc", "odd"))), "odd", ("id",)),
        (save("u.csv", csv_of(both)), "column_4", ("column_0",)),
        (save("t.npz", X=both[:, :4], y=labels), "", ("column_0",)),
    ):
        columns = tabular.load_table(path, 0, 0.4, label, drop).columns
        assert "20 rows and 3 columns" in told() and "15 inliers and 5" in told()
        how = {"label_column": label, "drop_columns": drop}
        np.testing.assert_array_equal(to_score(path, columns, **how), np.float32(rows))
        assert ("'y' (20, int64)" if label == "" else label) in told()
    path = save("idx.csv", ",0,1\n0,2,3\n1,4,6\n2,7,7\n")  # Of pandas, with its index.
    assert tabular.load_table(path, 0, 0.4, "", ("",)).columns == ("0", "1")
    with pytest.raises(InputError, match="no column 'no'; found: 'a', 'b'"):
        tabular.load_table(save("v.csv", "a,b\n1,2\n"), 0, 0.5, "", ("no",))


def test_columns_with_names_are_put_in_the_order_of_training(save, told):
    path = save("rows.csv", "b,note,a,\n1,x,2,\n3,,4,\n")
    options = TableOptions(columns=("a", "b"), id_column="note")
    rows, ids = tabular.read_rows(path, options)
    np.testing.assert_array_equal(rows, [[2, 1], [4, 3]])
    assert ids == ("x", "")
    assert "left out: 'note'" in told() and "blank: 4" in told()
    with pytest.raises(InputError, match="no column 'c'; found: 'b', 'note', 'a'; the"):
        to_score(path, ("a", "c"))
    path = save("rows.csv", "b,a\n1,2\n")
    np.testing.assert_array_equal(to_score(path, 2), [[1, 2]])
    assert "taken in their order, as only the file has names" in told()


def test_misleading_columns_are_told(save, told):
    tabular.load_table(save("t.csv", csv_of(numbered(6, 2), ("a", "Label"))), 0, 0.4)
    assert "named like labels: 'Label'; if" in told()
    with pytest.raises(InputError, match="all 4 rows to train on are the same"):
        tabular.load_table(save("t.npz", x=np.ones((4, 2))), 0, 0.5)
    arrays = {"features": numbered(6), "y": np.array([[7]] * 6), "extra": np.ones(2)}
    table = tabular.load_table(save("u.npz", **arrays), 0, 0.5, "", ("y",))
    assert table.test_labels is None and "not read: 'y' (6×1" in told()
    assert "'extra' (2, float64)" in told()


def test_whitened_columns_are_uncorrelated_and_come_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 3)) @ np.array([[1, 2, 0], [0, 3, 1], [0, 0, 0.5]])
    rows = np.concatenate([rows, np.full((400, 1), 7.0)], axis=1)  # A constant column.
    fitted = tabular.Standardizer.fit(rows, whiten=True)
    moved = fitted.transform(rows)
    covariance = np.cov(moved.T, bias=True)
    np.testing.assert_allclose(
        covariance - np.diag(covariance.diagonal()), 0, atol=1e-4
    )
    # The ridge: eigenvalues below 1, of the constant column 0.
    assert (covariance.diagonal() < 1.0).all() and covariance.diagonal().max() > 0.98
    np.testing.assert_allclose(fitted.inverse(moved), rows, rtol=1e-4, atol=1e-3)
    volume = np.linalg.slogdet(np.diag(1 / fitted.std) @ fitted.whitening)[1]
    np.testing.assert_allclose(fitted.log_det, volume)

    path = tmp_path / "table.csv"
    np.savetxt(path, rows, delimiter=",", header="a,b,c,d", comments="")
    table = tabular.load_table(path, 0, 0.3, whiten=True)
    plain = tabular.load_table(path, 0, 0.3)
    assert tabular.fingerprint(table) != tabular.fingerprint(plain)
    assert plain.standardizer.whitening is None
    tabular.save_table(table, tmp_path / "kept.npz")
    kept = tabular.load_saved_table(tmp_path / "kept.npz")
    assert tabular.fingerprint(kept) == tabular.fingerprint(table)
