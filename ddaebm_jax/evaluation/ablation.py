"""The figures of an ablation study: means over seeds, and differences to the recipe."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

_SECONDS = "training seconds"


class Figure(NamedTuple):
    """A figure of a variation over its seeds; NaN where there is none.

    Attributes:
      number: seeds with the figure.
      mean: over them.
      error: the mean's standard error.
      pairs: seeds of which the full recipe has the figure, too.
      difference: mean difference to the full recipe over those.
      difference_error: its standard error.
    """

    number: int
    mean: float
    error: float
    pairs: int
    difference: float
    difference_error: float

    @property
    def stands_out(self) -> bool:
        """Whether the difference is larger than two standard errors."""
        return abs(self.difference) > 2 * self.difference_error


Figures = dict[str, dict[str, Figure]]  # Variation → name of the figure → its values.


def mean_and_error(values: Float[np.ndarray, " n"]) -> tuple[int, float, float]:
    """Returns the number, the mean and its standard error of values other than NaN.

    The error is the standard deviation (n − 1 in the denominator) over √n; NaN of fewer
    than two.
    """
    values = values[np.isfinite(values)]
    number = len(values)
    mean = float(values.mean()) if number else math.nan
    error = float(values.std(ddof=1)) / math.sqrt(number) if number > 1 else math.nan
    return number, mean, error


def compare(
    values: Float[np.ndarray, " seeds"], full: Float[np.ndarray, " seeds"]
) -> Figure:
    """Returns a figure by its values and the full recipe's of the same seeds."""
    return Figure(*mean_and_error(values), *mean_and_error(values - full))


def summarize(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figures:
    """Returns the figures of each variation, of which the full recipe is the first.

    Args:
      records: variation → a record for each seed, in one order of seeds; see
        `study.run`.
    """
    names: dict[str, None] = {}
    for record in (one for found in records.values() for one in found):
        names |= dict.fromkeys(record["figures"])

    def values(runs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
        # None is NaN.
        return np.array([run["figures"].get(name) for run in runs], np.float64)

    full, figures = next(iter(records.values())), {}
    for variation, runs in records.items():
        own = {name: compare(values(runs, name), values(full, name)) for name in names}
        # Runs that train together share their time, so that it has no error.
        seconds = np.array([run["seconds"] for run in runs], np.float64)
        number, mean, _ = mean_and_error(seconds)
        own[_SECONDS] = Figure(number, mean, math.nan, 0, math.nan, math.nan)
        figures[variation] = own
    return figures


def against_fields(
    figures: Figures, records: Mapping[str, Any], recipe: Mapping[str, Any]
) -> dict[str, tuple[list[float], dict[str, Float[np.ndarray, "n 2"]]]]:
    """Returns figures against each number that two variations or more change.

    Args:
      figures: of `summarize`.
      records: as there; the first field of a variation is the one it is named for.
      recipe: field → its value in the full recipe.

    Returns:
      field → its values, in order, and by name the times and those figures that differ
      between variations: mean and standard error at each value.
    """
    full, *others = figures
    points: dict[str, dict[float, str]] = {}
    for variation in others:
        field, value = next(iter(records[variation][0]["fields"].items()))
        own = recipe[field]
        if type(value) in (int, float) and type(own) in (int, float):
            points.setdefault(field, {own: full})[value] = variation
    shown = [name for name in figures[full] if _differs(name, figures)]
    found = {}
    for field, of_field in points.items():
        if len(of_field) > 2:
            values = sorted(of_field)
            at = [figures[of_field[value]] for value in values]
            curves = {
                name: np.array([(one[name].mean, one[name].error) for one in at])
                for name in shown
            }
            found[field] = list(map(float, values)), curves
    return found


def to_csv(figures: Figures) -> str:
    """Returns a line for each variation and figure."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variation", "figure", *Figure._fields, "stands_out"])
    for variation, found in figures.items():
        for name, figure in found.items():
            cells = ["" if math.isnan(value) else value for value in figure]
            lines.writerow([variation, name, *cells, int(figure.stands_out)])
    return text.getvalue()


def to_json(figures: Figures, records: Mapping[str, Any]) -> dict[str, Any]:
    """Returns figures and records by variation, as JSON values."""
    return {
        variation: {
            "fields": records[variation][0]["fields"],
            "figures": {
                name: {
                    key: None if math.isnan(value) else value
                    for key, value in figure._asdict().items()
                }
                | {"stands_out": figure.stands_out}
                for name, figure in found.items()
            },
            "runs": records[variation],
        }
        for variation, found in figures.items()
    }


def to_markdown(
    figures: Figures, records: Mapping[str, Sequence[Mapping[str, Any]]], title: str
) -> str:
    """Returns tables of means and of differences, and what is to be said of them.

    Figures that no variation changes, as those of the data alone, are left out of the
    tables and told below them.
    """
    variations, first = list(figures), next(iter(figures.values()))
    changed = [name for name in first if _differs(name, figures)]
    shown = changed if len(variations) > 1 else list(first)
    same = [f"{name} {first[name].mean:.4g}" for name in first if name not in shown]
    seeds = [str(record["seed"]) for record in records[variations[0]]]
    parts = [f"# {title}", f"Seeds: {', '.join(seeds)}. Mean ± standard error."]
    if len(seeds) == 1:
        parts[1] = f"Seed: {seeds[0]}. One seed gives no error: add --seeds."
    parts.append(_table(figures, shown, _mean))
    if len(variations) > 1:
        parts.append(
            f"Differences to {variations[0]}, seed by seed; bold: larger than two "
            "standard errors."
        )
        others = {name: figures[name] for name in variations[1:]}
        compared = [name for name in shown if name != _SECONDS]
        parts.append(_table(others, compared, _difference))
    if same:
        parts.append(f"The same in every variation: {', '.join(same)}.")
    lines = []
    for name, found in records.items():
        fields = found[0]["fields"].items()
        told = ", ".join(f"`{field} = {value!r}`" for field, value in fields)
        lines.append(f"- {name}: {told or 'the recipe'}")
        faults = [record for record in found if record["fault"]]
        lines += [f"  - seed {one['seed']} failed: {one['fault']}" for one in faults]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _differs(name: str, figures: Figures) -> bool:
    """Returns whether a figure of any run differs from the recipe's, or is a time."""
    first = next(iter(figures.values()))[name]
    return name == _SECONDS or any(
        (one.number, one.mean, one.error) != (first.number, first.mean, first.error)
        or one.difference_error > 0
        for one in (found[name] for found in figures.values())
    )


def _table(figures: Figures, shown: Sequence[str], cell: Any) -> str:
    lines = [["variation", *shown], ["---"] * (1 + len(shown))]
    for variation, found in figures.items():
        lines.append([variation, *(cell(found[name]) for name in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(figure: Figure) -> str:
    return _cell(figure.mean, figure.error, "")


def _difference(figure: Figure) -> str:
    text = _cell(figure.difference, figure.difference_error, "+")
    return f"**{text}**" if figure.stands_out else text


def _cell(value: float, error: float, sign: str) -> str:
    """Returns value ± error to two digits of the error."""
    if math.isnan(value):
        return "–"
    if math.isnan(error):
        return f"{value:{sign}.4g}"
    if error < 1e-5:
        return f"{value:{sign}.4g} ± {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"
