"""Opens a data set by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddaebm_jax.data import synthetic, tabular
from ddaebm_jax.errors import InputError

TABLE_FILE = "table.npz"


class Source(NamedTuple):
    """Where training batches come from.

    Attributes:
      name: as in the config.
      event_shape: shape of one example.
      arrays: what `draw` reads, to be passed into the jitted step.
      draw: (arrays, keys [batch]) → x_0 [batch, *event_shape]; pure.
      distribution: the true distribution, of synthetic data.
      table: the table, of tabular data.
    """

    name: str
    event_shape: tuple[int, ...]
    arrays: Any
    draw: Callable[[Any, Array], Float[Array, "batch *shape"]]
    distribution: synthetic.Synthetic | None = None
    table: tabular.Table | None = None

    def held_out(self, num: int, seed: int) -> Float[np.ndarray, "n *shape"]:
        """Returns data that training does not see: `num` draws, or the test inliers."""
        if self.distribution is not None:
            keys = jax.random.split(jax.random.key(seed), num)
            return np.asarray(jax.jit(self.draw)(self.arrays, keys))
        return test_rows(self.table, tabular.INLIER)

    def metadata(self) -> dict[str, Any]:
        """Returns what must travel with a checkpoint, as plain JSON values."""
        if self.table is None:
            return {}
        return {
            "columns": list(self.table.columns),
            "standardizer": self.table.standardizer.to_dict(),
            "fingerprint": tabular.fingerprint(self.table),
        }

    def save(self, workdir: Path) -> None:
        """Keeps in a run directory what its modes need of the data."""
        if self.table is not None:
            tabular.save_table(self.table, workdir / TABLE_FILE)


def _synthetic_source(distribution: synthetic.Synthetic) -> Source:
    return Source(
        name=distribution.name,
        event_shape=(2,),
        arrays=(),
        draw=lambda arrays, keys: synthetic.draw(distribution, keys),
        distribution=distribution,
    )


def test_rows(table: tabular.Table, label: int) -> Float[np.ndarray, "n dim"]:
    """Returns a table's held-out rows of one label; unlabelled rows are inliers."""
    if table.test_labels is None:
        return table.test if label == tabular.INLIER else table.test[:0]
    return table.test[table.test_labels == label]


def draw_rows(rows: Float[Array, "n dim"], keys: Array) -> Float[Array, "batch dim"]:
    """Draws one row, with replacement, from each key."""
    index = jax.vmap(lambda key: jax.random.randint(key, (), 0, rows.shape[0]))(keys)
    return rows[index]


def open_source(data: Any, seed: int, workdir: Path | None = None) -> Source:
    """Opens the data set that a config names.

    Args:
      data: the config's `data` section.
      seed: of the train/test split.
      workdir: a run directory; a table is then the one that `Source.save` kept.

    Raises:
      InputError: for an unknown name, or data that cannot be trained on.
      FileNotFoundError: if `data.path` is not there.
    """
    if data.name in synthetic.SYNTHETIC:
        return _synthetic_source(synthetic.SYNTHETIC[data.name]())
    if workdir is not None:
        table = tabular.load_saved_table(workdir / TABLE_FILE)
    elif data.name == "breast_cancer":
        table = tabular.load_breast_cancer(seed, data.test_fraction)
    elif data.name == "table":
        table = tabular.load_table(
            data.path, seed, data.test_fraction, data.label_column or None
        )
    else:
        known = ", ".join((*synthetic.SYNTHETIC, "breast_cancer", "table"))
        raise InputError(f"data.name is '{data.name}'; allowed: {known}")
    return Source(
        name=data.name,
        event_shape=(table.train.shape[1],),
        arrays=jnp.asarray(table.train),
        draw=draw_rows,
        table=table,
    )
