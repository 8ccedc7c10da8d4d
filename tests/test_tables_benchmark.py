"""The benchmark on real tables: reader, protocol, ranks, resumption; runs together."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs as small_runs
from cli import ROOT, python
from helpers import assert_trees_close, assert_trees_equal, differ

from ddaebm_jax.data import open_source
from ddaebm_jax.errors import InputError
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import dispatch, many

sys.path.append(str(ROOT / "benchmarks"))
from outlier_tables import report, runs, sets

DIM = 5


def write_set(folder: Path, kind: str, name: str, lines: list[str]) -> None:
    path = folder / kind / "raw" / f"{name}.dat"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["@relation made up", *lines, ""]))


def table(num_inliers: int = 30, num_outliers: int = 7, dim: int = DIM, seed: int = 5):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_inliers + num_outliers, dim))
    is_outlier = np.arange(len(rows)) >= num_inliers
    rows[is_outlier] += 4.0
    return sets.OutlierTable("made_up", rows, is_outlier)


def config(**fields):
    settings = {"data__name": "table", "data__path": "set", "train__num_steps": 4}
    return small_runs.small(**settings | fields, train__steps_per_dispatch=2)


def described(table: sets.OutlierTable, seed: int = 0, **fields) -> Experiment:
    train = sets.split(table, seed).train
    return runs.experiment_of(config(**fields), train, table.name, seed)


# --- Sets -----------------------------------------------------------------------


def test_the_reader_keeps_columns_of_numbers(tmp_path: Path):
    lines = ["1, 2.5,a, 3,1_0, negative", "4,-5e1,b,nan,2, positive", ""]
    lines.append("0,0,0,0,0,negative")
    write_set(tmp_path, "imbalanced", "one", lines)
    found = sets.load("one", tmp_path)
    np.testing.assert_array_equal(found.rows, [[1, 2.5], [4, -50], [0, 0]])
    assert found.is_outlier.tolist() == [False, True, False]


def test_bad_sets_are_told(tmp_path: Path):
    write_set(tmp_path, "imbalanced", "short", ["1,2,negative", "1,positive"])
    write_set(tmp_path, "imbalanced", "classes", ["1,2,negative", "1,3,else"])
    write_set(tmp_path, "balanced", "words", ["a,b", "c,d", "e,d"])
    for name, message in {
        "short": "line 3 has 2 cells, the first row has 3",
        "classes": "but found: else, negative",
        "words:x": "'x', but found: b, d",
        "words:b": "2 inliers, 1 outliers and 0 columns",
        "absent": "no such file",
        "short:": "the class or the column of labels is missing",
    }.items():
        with pytest.raises(InputError, match=message):
            sets.load(name, tmp_path)


def test_sets_for_reporting_are_all_others_that_are_large_enough(tmp_path: Path):
    for name, num in {"pima": 300, "large": 200, "small": 199}.items():
        write_set(tmp_path, "imbalanced", name, ["1,2,3,4,negative"] * num)
    for name in ("pima", "large", "optdigits", "other"):
        rows = ["1,2,3,4,a"] * 100 + ["1,2,3,4,c", "1,2,3,4,b"] * 60
        write_set(tmp_path, "balanced", name, rows)
    write_set(tmp_path, "balanced", "narrow", ["1,2,3,x,a", "1,2,3,4,b"] * 200)
    assert sets.names(["reporting"], tmp_path) == ["large", "other:b"]
    assert sets.unrelated(["vehicle1", "yeast-2_vs_4", "other:b"]) == ["other:b"]
    assert sets.names(["pima", "development"], tmp_path)[:2] == ["pima", "wisconsin"]


def test_a_csv_with_a_label_column_is_a_set(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("x,bad\n1,0\n2,0\n9,1\n")
    found = sets.load(f"{path}:bad", tmp_path)
    assert found.rows.tolist() == [[1], [2], [9]]
    assert found.is_outlier.tolist() == [False, False, True]


# --- Protocol -------------------------------------------------------------------


def test_half_of_the_shuffled_inliers_trains():
    made = table()
    made.rows[:, 1] = made.is_outlier  # Constant among inliers.
    parts = sets.split(made, seed=3)
    order = np.random.default_rng(3).permutation(30)
    kept = [0, 2, 3, 4]
    np.testing.assert_array_equal(parts.train, made.rows[order[:15]][:, kept])
    np.testing.assert_array_equal(parts.test[:15], made.rows[order[15:]][:, kept])
    assert parts.is_outlier.tolist() == [False] * 15 + [True] * 7
    np.testing.assert_array_equal(
        np.sort(parts.test[15:], axis=0), np.sort(made.rows[30:, kept], axis=0)
    )


def test_at_most_6000_inliers_and_2000_outliers_are_used():
    parts = sets.split(table(7_001, 2_500, dim=1), seed=0)
    assert (len(parts.train), len(parts.test)) == (3_000, 5_000)
    assert parts.is_outlier.sum() == 2_000


def test_nothing_but_training_rows_reaches_the_weights():
    made = table()
    order = np.random.default_rng(0).permutation(30)
    other = made.rows.copy()
    other[order[15:]] *= -7.0  # Test inliers.
    other[30:] = 1e3
    more = np.concatenate([other, other[30:] + 1.0])
    is_outlier = np.append(made.is_outlier, [True] * 7)
    tested = sets.OutlierTable("made_up", more, is_outlier)
    learnt = made._replace(rows=made.rows.copy())
    learnt.rows[order[:9]] = learnt.rows[order[0]]
    by_rows = {"diffusion__time_eps": None, "model__reference": 2}
    made, tested, learnt = (described(one, **by_rows) for one in (made, tested, learnt))
    before, same, changed = many.train([made, tested, learnt], together=1)
    assert_trees_equal(same.state, before.state)
    assert differ(changed.state.variables, before.state.variables)
    noise = [e.config.diffusion.time_eps for e in (made, tested, learnt)]
    assert noise[0] == noise[1] != noise[2]


def test_constant_training_rows_are_refused():
    made = table(dim=1)
    made.rows[~made.is_outlier] = 1.0
    with pytest.raises(InputError, match="all columns of its training rows are const"):
        sets.split(made, seed=0)


# --- Results --------------------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"step": 1}', b"notes\nmore", b"\x89PNG\n\x1a"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="results"):
        runs.read_results(path, config())
    assert path.read_bytes() == content


# --- Runs together --------------------------------------------------------------


def alone(experiment: Experiment) -> TrainState:
    dispatcher = dispatch.Dispatcher(experiment)
    state, total = dispatcher.init(), experiment.config.train.num_steps
    for _ in range(0, total, 2):
        state, _, _ = dispatcher(state, 2)
    return jax.device_get(state)


def test_runs_together_equal_runs_alone():
    """Of other seeds, numbers of rows and noise; a fault of one stays there."""
    by_rows = {"diffusion__time_eps": None, "model__reference": 2}
    first, second, third = (
        described(table(num), seed, **by_rows)
        for num, seed in ((30, 0), (36, 1), (44, 2))
    )
    assert len({e.config.diffusion.time_eps for e in (first, second, third)}) == 3
    source = second.source
    rows = source.arrays._replace(values=source.arrays.values * np.nan)
    broken = second._replace(source=source._replace(arrays=rows))
    # In chunks of two, the last of which is filled up.
    found = list(many.train([first, broken, third], together=2))
    assert [run.fault is None for run in found] == [True, False, True]
    assert found[1].fault.step == 1
    for run, experiment in ((found[0], first), (found[2], third)):
        assert_trees_close(run.state, alone(experiment), rtol=2e-4, atol=2e-6)


def test_only_runs_of_one_config_train_together():
    rows = table().rows
    first = runs.experiment_of(config(), rows, "made_up", 0)
    second = runs.experiment_of(config(game__gamma=0.7), rows, "made_up", 0)
    with pytest.raises(InputError, match=r"differ in game\.gamma"):
        list(many.train([first, second], together=2))


def test_padding_is_never_drawn():
    """And a padded table draws what the table alone does."""
    source = open_source(small_runs.small(data__name="breast_cancer").data, seed=0)
    keys = jax.random.split(jax.random.key(0), 500)
    rows, count = source.arrays
    padded = source.arrays._replace(values=jnp.pad(rows, [(0, 100), (0, 0)]))
    drawn = source.draw(source.arrays, None, keys)
    np.testing.assert_array_equal(source.draw(padded, None, keys), drawn)
    assert count == len(source.table.train)


# --- Ranks ----------------------------------------------------------------------


def test_ranks_and_wins_share_ties():
    values = np.array([[0.9, 0.9, 0.5], [0.8, 0.6, 0.7]])
    found = report.ranking(values)
    np.testing.assert_allclose(found.mean, [(1.5 + 1) / 2, (1.5 + 3) / 2, (3 + 2) / 2])
    assert found.wins.tolist() == [2, 1, 0]


def test_critical_difference_is_nemenyis():
    """Demšar 2006, table 5: q_0.05 = 2.569 of four, 3.031 of eight detectors."""
    for k, num, q in ((4, 14, 2.569), (8, 12, 3.031)):
        expected = q * math.sqrt(k * (k + 1) / (6 * num))
        assert report.critical_difference(k, num) == pytest.approx(expected, abs=1e-3)


def test_friedmans_test():
    """As SciPy's, with its correction for ties."""
    from scipy.stats import friedmanchisquare

    values = np.random.default_rng(1).normal(size=(9, 4)).round(1)
    values[:, 0] += 1.0
    expected = friedmanchisquare(*values.T).pvalue
    assert report.ranking(values).p == pytest.approx(expected)


def test_sets_of_a_family_count_once():
    values = np.array([[0.2, 1.0], [0.4, 0.0], [0.6, 0.6]])
    found = report.by_family(["ecoli-0_vs_1", "ecoli4", "pima"], values)
    np.testing.assert_allclose(found, [[0.3, 0.5], [0.6, 0.6]])


def test_cliques_are_the_largest_groups():
    ranks = [3.0, 1.0, 1.9, 2.4, 5.0]
    assert report.cliques(ranks, 1.2) == [(1.0, 1.9), (1.9, 3.0)]
    assert report.cliques(ranks, 0.1) == []


def test_failing_is_low_where_another_is_high():
    values = np.array([[0.5, 0.81], [0.5, 0.79], [0.61, 0.9], [0.3, 0.59]])
    assert report.failing(values)[:, 0].tolist() == [True, False, False, False]


def test_every_set_is_shown_and_means_are_over_complete_ones():
    def line(name, seed, detector, auroc):
        size = {"train": 10, "columns": 3, "outliers": 4}
        figures = {"auroc": auroc, "average_precision": 0.5}
        return {"set": name, "seed": seed, "detector": detector} | size | figures

    lines = [
        *(line("a", s, d, v) for s, d, v in ((0, "x", 0.7), (0, "y", 0.5))),
        *(line("a", s, d, v) for s, d, v in ((1, "x", 0.9), (1, "y", 0.5))),
        *(line("b", 0, d, 0.1) for d in "xy"),
    ]
    lines[1]["error"] = "RuntimeError: no luck"
    text = report.markdown(report.collect(lines, ["a", "b"], [0, 1], ["x", "y"]))
    assert "| a | 10 | 3 | 4 | **0.800** | 0.500 |" in text
    assert "| b | 10 | 3 | 4 | – | – |" in text
    assert "| **mean** |  |  |  | **0.800** | 0.500 |" in text
    assert "1 of 2 sets are complete" in text
    assert "chance: y on a, seed 0: RuntimeError: no luck." in text


# --- Command --------------------------------------------------------------------


def test_a_repeated_command_does_what_is_left(tmp_path: Path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        rows = [(*rng.normal(size=4), "negative") for _ in range(40)]
        rows += [(*rng.normal(size=4) + 5, "positive") for _ in range(8)]
        lines = [",".join(map(str, row)) for row in rows]
        write_set(tmp_path, "imbalanced", name, lines)
    results = tmp_path / "tables.jsonl"
    recipe = ROOT / "configs" / "table.py"
    flags = [f"--data={tmp_path}", f"--results={results}", f"--config={recipe}"]
    flags += ["--seeds=0", "--detectors=energy,knn,gaussian"]
    small = {"model.mlp.hidden": "(8, 8)", "train.num_steps": 4, "data.batch_size": 8}
    flags += [f"--config.{field}={value}" for field, value in small.items()]

    def command(*more):
        return python("benchmarks/tables.py", *flags, *more)

    first = command("--sets=one")
    assert first.code == 0, first.err
    kept = results.read_bytes()
    results.write_bytes(kept + b'{"set": "two", "se')  # Stopped in the middle.
    second = command("--sets=one,two")
    assert second.code == 0, second.err
    assert results.read_bytes().startswith(kept)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    done = [(r["set"], r["detector"]) for r in records if "set" in r]
    assert sorted(done) == sorted(
        (name, detector)
        for name in ("one", "two")
        for detector in ("energy", "gaussian", "knn")
    )
    assert "| two | 20 | 4 | 8 |" in second.out
    assert results.with_suffix(".png").stat().st_size > 1_000

    other = command("--sets=one", "--config.game.gamma=0.3")
    assert other.code == 1
    assert "another config (game.gamma 0.1 → 0.3)" in other.err
    unknown = command("--sets=one", "--detectors=best")
    assert "error: --detectors: 'best' is not known" in unknown.err
