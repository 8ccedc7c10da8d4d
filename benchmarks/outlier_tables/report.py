"""Means, ranks and their critical difference, as Markdown and as a picture.

Demšar 2006, Statistical comparisons of classifiers over multiple data sets, JMLR 7:
a set is one observation, and a detector's figure on it the mean over the seeds.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ddaebm_jax.errors import listed
from outlier_tables.runs import DEFAULT

LEVEL = 0.05  # Of the tests.
LOW, HIGH = 0.6, 0.8  # A detector fails below LOW where another is above HIGH.
FIGURES = {"auroc": "AUROC", "average_precision": "Average precision"}


class Ranking(NamedTuple):
    """Detectors compared over sets.

    Attributes:
      mean: mean rank of each detector; 1: always the best.
      wins: number of sets on which it is the best, shared or alone.
      critical: mean ranks that differ by less are not told apart (Nemenyi).
      p: of Friedman's test that all detectors are equal; NaN for fewer than three, or
        if all are tied.
    """

    mean: Float[np.ndarray, " k"]
    wins: np.ndarray
    critical: float
    p: float


def ranking(values: Float[np.ndarray, "sets k"]) -> Ranking:
    """Ranks figures of which larger is better; ties share the mean of their ranks."""
    from scipy.stats import friedmanchisquare, rankdata

    num, k = values.shape
    ranks = rankdata(-values, axis=1)
    all_tied = (ranks == ranks[:, :1]).all()
    p = math.nan if k < 3 or all_tied else friedmanchisquare(*values.T).pvalue
    best = values == values.max(axis=1, keepdims=True)
    critical = critical_difference(k, num)
    return Ranking(ranks.mean(axis=0), best.sum(axis=0), critical, float(p))


def critical_difference(k: int, num: int, level: float = LEVEL) -> float:
    """Returns Nemenyi's q_α·√(k(k + 1)/(6N)), of k detectors on N sets."""
    from scipy.stats import studentized_range

    q = studentized_range.ppf(1.0 - level, k, np.inf) / math.sqrt(2.0)
    return float(q * math.sqrt(k * (k + 1) / (6.0 * num)))


def cliques(mean_ranks: Iterable[float], critical: float) -> list[tuple[float, float]]:
    """Returns the ends of the largest groups of ranks that are not told apart."""
    ranks = sorted(mean_ranks)
    found: list[tuple[float, float]] = []
    for low in ranks:
        high = max(rank for rank in ranks if rank - low <= critical)
        if high > low and (not found or high > found[-1][1]):
            found.append((low, high))
    return found


class Figures(NamedTuple):
    """Means over the seeds.

    Attributes:
      sets, detectors: their names.
      info: of each set, its numbers of training rows, columns and outliers.
      values: figure → means; NaN where a seed is missing.
      failures: what did not give scores, and counts as chance.
    """

    sets: list[str]
    detectors: list[str]
    info: list[tuple[int, int, int]]
    values: dict[str, Float[np.ndarray, "sets k"]]
    failures: list[str]

    @property
    def complete(self) -> np.ndarray:
        """Whether each set has all its figures."""
        return np.isfinite(self.values["auroc"]).all(axis=1)


def collect(
    records: Iterable[dict[str, Any]],
    sets: Sequence[str],
    seeds: Sequence[int],
    detectors: Sequence[str],
) -> Figures:
    """Gathers the lines of a results file."""
    found = {(r["set"], r["detector"], r["seed"]): r for r in records}
    info, values = (
        [],
        {name: np.full((len(sets), len(detectors)), np.nan) for name in FIGURES},
    )
    failures = []
    for i, name in enumerate(sets):
        size = (0, 0, 0)
        for j, detector in enumerate(detectors):
            mine = [found.get((name, detector, seed)) for seed in seeds]
            for record in filter(None, mine):
                size = tuple(record[n] for n in ("train", "columns", "outliers"))
                if "error" in record:
                    run = f"{detector} on {name}, seed {record['seed']}"
                    failures.append(f"{run}: {record['error']}")
            if all(mine):
                for figure, means in values.items():
                    means[i, j] = np.mean([record[figure] for record in mine])
        info.append(size)
    return Figures(list(sets), list(detectors), info, values, failures)


def markdown(figures: Figures) -> str:
    """Returns a table of every set for each figure, and what follows from them."""
    parts = []
    complete = figures.complete
    for name, title in FIGURES.items():
        parts += [
            f"**{title}**",
            "",
            *_table(figures, figures.values[name], complete),
            "",
        ]
    num = int(complete.sum())
    if num < len(complete):
        parts.append(
            f"{num} of {len(complete)} sets are complete; only these are in the rows "
            "below the sets."
        )
    if num and len(figures.detectors) > 1:
        found = ranking(figures.values["auroc"][complete])
        parts.append(
            f"Ranks by AUROC, over {num} sets; mean ranks that differ by less than "
            f"{found.critical:.2f} are not told apart (Nemenyi, {LEVEL:g}); Friedman's "
            f"test that all are equal: p = {found.p:.2g}."
        )
        names = [figures.sets[i] for i in np.flatnonzero(complete)]
        families = by_family(names, figures.values["auroc"][complete])
        if 1 < len(families) < num:
            found = ranking(families)
            ranks = zip(figures.detectors, found.mean, strict=True)
            parts.append(
                f"Many sets are made of the same data. Over {len(families)} families, "
                "by the first word of their names, means of their sets: "
                f"{', '.join(f'{name} {rank:.2f}' for name, rank in ranks)}; critical "
                f"difference {found.critical:.2f}."
            )
        if DEFAULT in figures.detectors:
            failed = failing(figures.values["auroc"])
            failed = failed[:, figures.detectors.index(DEFAULT)]
            names = [figures.sets[i] for i in np.flatnonzero(failed)]
            what = f"below {LOW} where another is above {HIGH}"
            parts.append(f"{DEFAULT} is {what} on: {listed(names, len(names) + 1)}.")
    for failure in figures.failures:
        parts.append(f"No scores, counted as chance: {failure}.")
    return "\n".join(parts)


def by_family(
    names: Sequence[str], values: Float[np.ndarray, "sets k"]
) -> Float[np.ndarray, "families k"]:
    """Returns means over the sets whose names have the same first word."""
    words = np.array([re.split(r"[^a-z]", name.lower())[0] for name in names])
    return np.stack([values[words == word].mean(axis=0) for word in np.unique(words)])


def failing(values: Float[np.ndarray, "sets k"]) -> np.ndarray:
    """Returns where a detector is below 0.6 and the best of the others above 0.8."""
    others = [
        np.fmax.reduce(np.delete(values, j, axis=1), axis=1, initial=-np.inf)
        for j in range(values.shape[1])
    ]
    return (values < LOW) & (np.stack(others, axis=1) > HIGH)


def _table(figures: Figures, values: np.ndarray, complete: np.ndarray) -> list[str]:
    heads = ["set", "rows", "columns", "outliers", *figures.detectors]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, size, row in zip(figures.sets, figures.info, values, strict=True):
        best = np.nanmax(row) if np.isfinite(row).any() else np.nan
        lines.append(_row([name, *size, *(_number(v, v == best) for v in row)]))
    kept = values[complete]
    if len(kept):
        mean = kept.mean(axis=0)
        lines.append(_summary("mean", [_number(v, v == mean.max()) for v in mean]))
        found = ranking(kept)
        ranks = [_number(rank, rank == found.mean.min(), 2) for rank in found.mean]
        lines.append(_summary(f"mean rank of {kept.shape[1]}", ranks))
        lines.append(_summary("wins", found.wins))
        if values is figures.values["auroc"]:
            what = f"below {LOW}, another above {HIGH}"
            lines.append(_summary(what, failing(kept).sum(axis=0)))
    return lines


def _summary(name: str, cells: Iterable[Any]) -> str:
    return _row([f"**{name}**", "", "", "", *cells])


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _number(value: float, best: bool, digits: int = 3) -> str:
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return f"**{text}**" if best else text


def draw(path: Path, names: Sequence[str], found: Ranking, num: int) -> None:
    """Draws mean ranks on a line; a bar joins those that are not told apart."""
    from matplotlib.figure import Figure

    order = np.argsort(found.mean, kind="stable")
    low, high = 1, max(len(names), 2)
    half, bars = -(-len(order) // 2), cliques(found.mean, found.critical)
    depth = 1.0 + 0.35 * len(bars)
    figure = Figure(
        figsize=(8.0, 1.2 + 0.28 * (half + len(bars))), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.axis("off")
    axes.plot([low, high], [0, 0], "k", lw=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, 0.15], "k", lw=1)
        axes.text(tick, 0.25, str(tick), ha="center", va="bottom")
    axes.plot([low, low + found.critical], [1.4, 1.4], "k", lw=2)
    title = f"critical difference {found.critical:.2f} ({num} sets, level {LEVEL:g})"
    axes.text(low, 1.5, title, ha="left", va="bottom")
    for i, (start, end) in enumerate(bars):
        y = -0.35 * (i + 1)
        axes.plot([start - 0.03, end + 0.03], [y, y], "k", lw=4, solid_capstyle="butt")
    margin = 0.12 * (high - low)
    for place, j in enumerate(order):
        rank, left = found.mean[j], place < half
        y = -depth - 0.8 * (place if left else len(order) - 1 - place)
        edge = low - margin if left else high + margin
        axes.plot([rank, rank, edge], [0, y, y], "k", lw=0.8)
        text = f"{names[j]}  {rank:.2f}" if left else f"{rank:.2f}  {names[j]}"
        axes.text(edge, y, f" {text} ", ha="right" if left else "left", va="center")
    axes.set_xlim(low - 3 * margin, high + 3 * margin)
    figure.savefig(path, dpi=150)
