"""Opens a data set by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ddaebm_jax import colour as colour_lib
from ddaebm_jax.config import choices
from ddaebm_jax.data import images, synthetic, tabular
from ddaebm_jax.data.records import Subset
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.files import read_npz, written_atomically

TABLE_FILE, COLOUR_FILE = "table.npz", "colour.npz"
_CHUNK = 5_000  # Images that are converted at once.


class Rows(NamedTuple):
    """A table's training rows on the device; those from `count` on are padding."""

    values: Float[Array, "n dim"]
    count: Int[Array | np.int32, ""]


class Source(NamedTuple):
    """Where training batches come from.

    Attributes:
      name: as in the config.
      event_shape: shape of one example.
      arrays: what `draw` reads, to be passed into the jitted step.
      draw: (arrays, batch, keys [batch]) → x_0 [batch, *event_shape]; pure. `batch`
        is what the input stream gave: images, or indices of them; None where there
        is no stream, and examples are drawn from the keys.
      distribution, table, image_set: the data of each kind, images once opened.
      colour: of the noise of images, see `colour`; None: it is white.
      noise: standard deviation of level 0's, where a table's rows chose it.
    """

    name: str
    event_shape: tuple[int, ...]
    arrays: Any
    draw: Callable[[Any, Any, Array], Float[Array, "batch *shape"]]
    distribution: synthetic.Synthetic | None = None
    table: tabular.Table | None = None
    image_set: images.ImageSet | None = None
    colour: colour_lib.Std | None = None
    noise: float | None = None

    @property
    def holds_images(self) -> bool:
        """Whether examples are images, opened or not."""
        return len(self.event_shape) == 3

    def held_out(self, num: int, seed: int) -> Shaped[np.ndarray, "n *shape"]:
        """Returns data that training does not see, chosen by the seed.

        It is `num` draws, a table's test inliers, or at most `num` test images, uint8.
        """
        if self.distribution is not None:
            keys = jax.random.split(jax.random.key(seed), num)
            return np.asarray(_draw(self.draw, self.arrays, None, keys))
        if self.image_set is not None:
            test = self.image_set.test
            # Not the first ones: files in order of names may be of one kind.
            order = np.random.default_rng(seed).permutation(len(test))
            chosen = Subset(test, np.sort(order[:num]))
            return images.stack(chosen)
        return test_rows(self.table, tabular.INLIER)

    def to_own_units(self, x: Float[np.ndarray, "n *shape"]) -> np.ndarray:
        """Returns points of the networks' units in the data's: images as uint8."""
        if self.holds_images:
            return np.asarray(pixels(self.colour, x))
        return x if self.table is None else self.table.standardizer.inverse(x)

    def from_own_units(self, x: np.ndarray, name: str = "the rows") -> np.ndarray:
        """Returns points of the data's units in the networks'.

        Images are uint8, or floats in [−1, 1].
        """
        if self.table is not None:
            return self.table.standardizer.transform(x, name)
        if not self.holds_images:
            return np.asarray(x, np.float32)
        # A chunk at a time: a device may not hold all.
        starts = range(0, len(x), _CHUNK)
        parts = [np.asarray(self.points(x[i : i + _CHUNK])) for i in starts]
        return np.concatenate(parts) if parts else np.zeros(x.shape, np.float32)

    def points(self, pixels: Array | np.ndarray) -> Array:
        """Returns images, uint8 or in [−1, 1], in the networks' units; traceable."""
        x = images.to_float(pixels) if pixels.dtype == np.uint8 else jnp.asarray(pixels)
        return x if self.colour is None else colour_lib.whitened(self.colour, x)

    def some_training_images(
        self, most: int = 5_000, seed: int = 0
    ) -> Float[np.ndarray, "n height width channels"]:
        """Returns at most `most` training images, in the networks' units."""
        train = self.image_set.train
        chosen = np.random.default_rng(seed).permutation(len(train))[:most]
        found = images.stack(Subset(train, np.sort(chosen)))
        return self.from_own_units(found)

    @property
    def log_det(self) -> float:
        """Log of how much `from_own_units` enlarges volumes, nats."""
        if self.table is not None:
            return self.table.standardizer.log_det
        if self.colour is not None:
            return colour_lib.log_det(self.colour, self.event_shape[-1])
        return 0.0

    def metadata(self) -> dict[str, Any] | None:
        """Returns JSON values that identify the data; None for images not opened."""
        if self.holds_images:
            return None if self.image_set is None else self.image_set.metadata()
        if self.table is None:
            return {}
        standardizer = self.table.standardizer._asdict()
        del standardizer["whitening"]  # Large; part of the fingerprint.
        return {
            "columns": list(self.table.columns),
            "standardizer": {k: v.tolist() for k, v in standardizer.items()},
            "fingerprint": tabular.fingerprint(self.table),
        } | ({} if self.noise is None else {"noise": self.noise})

    def save(self, workdir: Path) -> None:
        """Keeps in a new run directory what its modes need of the data."""
        if self.table is not None and not (workdir / TABLE_FILE).exists():
            tabular.save_table(self.table, workdir / TABLE_FILE)
        if self.colour is not None and not (workdir / COLOUR_FILE).exists():
            with written_atomically(workdir / COLOUR_FILE) as file:
                np.savez(file, std=self.colour)


# Jitted once: each program compiles at its first use only.
_draw = jax.jit(lambda draw, *inputs: draw(*inputs), static_argnums=0)


@jax.jit
def pixels(colour: colour_lib.Std | None, x: Array | np.ndarray) -> Array:
    """Returns images of the networks' units as uint8, on the device."""
    return images.to_uint8(x if colour is None else colour_lib.coloured(colour, x))


def test_rows(table: tabular.Table, label: int) -> Float[np.ndarray, "n dim"]:
    """Returns a table's held-out rows of one label; unlabelled rows are inliers."""
    if table.test_labels is None:
        return table.test if label == tabular.INLIER else table.test[:0]
    return table.test[table.test_labels == label]


def open_source(
    data: Any, seed: int, workdir: Path | None = None, open_images: bool = True
) -> Source:
    """Opens the data set that a valid config's `data` section names.

    In a run directory the table is the one that `Source.save` kept. Without
    `open_images` images are not looked for.

    Raises InputError for data that cannot be trained on, and FileNotFoundError if
    `data.path` is not there.
    """
    if data.name in synthetic.SYNTHETIC:
        distribution = synthetic.SYNTHETIC[data.name]()
        return Source(
            name=data.name,
            event_shape=(2,),
            arrays=(),
            draw=lambda arrays, batch, keys: synthetic.draw(distribution, keys),
            distribution=distribution,
        )
    if data.name in choices.IMAGES:
        image_set = images.open_images(data, seed) if open_images else None
        arrays = None
        if open_images and data.on_device:
            arrays = images.stack(image_set.train)
        source = Source(
            name=data.name,
            event_shape=(data.image_size, data.image_size, data.channels),
            arrays=arrays,
            draw=partial(images.draw, flip=data.flip),
            image_set=image_set,
        )
        return _with_colour(source, workdir) if data.whiten else source
    if workdir is not None:
        table = tabular.load_saved_table(workdir / TABLE_FILE)
    elif data.name == "breast_cancer":
        table = tabular.load_breast_cancer(seed, data.test_fraction, data.whiten)
    else:
        fields = ("header", "label_column", "drop_columns", "whiten")
        how = {field: data[field] for field in fields}
        table = tabular.load_table(data.path, seed, data.test_fraction, **how)
    return table_source(data.name, table)


def _with_colour(source: Source, workdir: Path | None) -> Source:
    """Returns images with noise of their colour: that of the run, or fitted."""
    if workdir is None:
        std = colour_lib.fit(source.some_training_images())
    else:
        try:
            std = read_npz(workdir / COLOUR_FILE, 2**24)["std"]
        except (OSError, KeyError, InputError) as error:
            raise InputError(
                f"{workdir / COLOUR_FILE} does not hold the colour of the run's noise "
                f"({one_line(error)}); copy the whole run directory, or train again"
            ) from error
    plain = source.draw

    def draw(*inputs: Any) -> Array:
        return colour_lib.whitened(std, plain(*inputs))

    return source._replace(draw=draw, colour=std)


def table_source(name: str, table: tabular.Table) -> Source:
    """Returns the source whose batches are rows of a table's training part."""
    return Source(
        name=name,
        event_shape=(table.train.shape[1],),
        arrays=Rows(jnp.asarray(table.train), np.int32(len(table.train))),
        draw=_draw_rows,
        table=table,
    )


def _draw_rows(rows: Rows, batch: None, keys: Array) -> Float[Array, "batch dim"]:
    """Draws one row, with replacement, from each key."""
    del batch
    index = jax.vmap(lambda key: jax.random.randint(key, (), 0, rows.count))(keys)
    return rows.values[index]
