"""The Python interface: load, fit, sample, score.

These names, exported by `ddaebm_jax`, are the ones whose stability is promised;
docs/api.md has an example of each. Everything takes and returns the data's own units:
rows in a table's columns, images as uint8. Bad input raises `InputError`, a ValueError
that says what to do.
"""

import contextlib
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from ddaebm_jax import config as config_lib
from ddaebm_jax import density
from ddaebm_jax.commands import export
from ddaebm_jax.commands.common import claimed
from ddaebm_jax.config import fields as fields_lib
from ddaebm_jax.config import recipes
from ddaebm_jax.data.image_files import MAX_BYTES
from ddaebm_jax.data.table_files import MAX_NPZ_BYTES
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import inference, particles, pictures, plots
from ddaebm_jax.files import read_npz, written_atomically
from ddaebm_jax.paths import user_path
from ddaebm_jax.training import loop, reports, run_directory
from ddaebm_jax.training.preemption import Stopped
from ddaebm_jax.training.trained_run import TrainedRun, load_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recipe(name: str, **fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of a recipe of `configs/`, with some fields changed.

    Args:
      name: such as "gaussians25" or "table".
      **fields: new values by dotted names: `**{"train.num_steps": 2000}`.

    Raises:
      InputError: for an unknown recipe or field, or a value that it cannot take.
    """
    found = recipes.load(name)
    known = dict(fields_lib.leaves(found))
    for field in fields:
        if field not in known:
            raise InputError(fields_lib.unknown(field, known))
    try:
        found.update_from_flattened_dict(fields)
    except TypeError as error:
        raise InputError(f"recipe {name!r}: {error}") from error
    return found


def load(
    workdir: str | Path = "runs",
    checkpoint: str | int = "latest",
    data_path: str | Path | None = None,
) -> "Model":
    """Loads a trained run.

    Args:
      workdir: a run directory, or a folder with runs in it, of which the newest with a
        checkpoint is taken.
      checkpoint: `latest`, the newest intact one; `best`, of the lowest FID; or the
        step of one that is kept.
      data_path: where a run's images lie now, if they have moved.

    Raises:
      InputError: if there is no such run or checkpoint, or it is damaged.
    """
    folder, name = user_path(workdir, "workdir"), run_directory.CONFIG_FILE
    if not (folder / name).exists():
        found = [*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]
        if not found:
            raise InputError(
                f"{folder} is not a run directory and contains none; give one that "
                "training has made"
            )
        # Before its first checkpoint a run cannot be loaded.
        saved = [p for p in found if any(p.parent.glob("checkpoints/[0-9]*"))]
        folder = max(saved or found, key=lambda path: path.stat().st_mtime).parent
    return Model(load_run(folder, False, str(checkpoint), data_path))


def fit(
    data: Any,
    config: str | ml_collections.ConfigDict,
    workdir: str | Path | None = None,
) -> "Model":
    """Trains on an array, or on a recipe's own data, and returns the model.

    An array is kept in the run directory, so that training can be continued: by the
    same call with that `workdir`, or by the command line.

    Args:
      data: rows [n, d], floats, standardised on the way in; or images [n, side, side,
        1 or 3], uint8; or None: the data that the recipe names.
      config: a recipe, or its name: `table` for rows, `digits` or `folder` for images.
        Its section `data` is made to fit the array.
      workdir: the run directory. Default: a new one, runs/<data>/<time>.

    Raises:
      InputError: for an array that cannot be trained on, a bad config, or a directory
        that holds something else.
      KeyboardInterrupt: after SIGINT or SIGTERM, when everything is saved.
    """
    values = recipes.load(config) if isinstance(config, str) else config
    values = values.copy_and_resolve_references()
    array = None if data is None else _checked_data(data)
    if array is not None:
        values.data.name = "table" if array.ndim == 2 else "folder"
        values.data.path = run_directory.DATA_FILE
        if array.ndim == 4:
            values.data.image_size, values.data.channels = array.shape[2:]
    config_lib.validate(values)
    if workdir is None:
        name = values.data.name if array is None else "array"
        path = Path("runs") / name / time.strftime("%Y%m%d-%H%M%S")
        workdir = claimed(path, folder=True)
    folder = user_path(workdir, "workdir").absolute()
    wrote = False
    try:
        if array is not None:
            path = folder / run_directory.DATA_FILE
            values.data.path = str(path)
            run_directory.check(folder, config_lib.with_absolute_paths(values))
            with run_directory.lock(folder):
                wrote = _keep(array, path)
        loop.train(values, folder)
    except Stopped as stopped:
        raise KeyboardInterrupt(f"{stopped}: workdir={str(folder)!r}") from stopped
    finally:
        # Of a run that could not begin nothing is left.
        if not (folder / run_directory.CONFIG_FILE).exists():
            for name in (run_directory.DATA_FILE, run_directory.LOCK_FILE):
                if wrote:
                    (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
    return load(folder)


def _keep(array: np.ndarray, path: Path) -> bool:
    """Writes an array, and returns True, or compares it with the one that is there."""
    if path.exists():
        if np.array_equal(read_npz(path, MAX_BYTES, ["x"])["x"], array):
            return False
        raise InputError(
            f"{path} holds other data than those given; continue with the same array, "
            "or give another workdir"
        )
    with written_atomically(path) as file:
        np.savez(file, x=array)
    return True


def _checked_data(data: Any) -> np.ndarray:
    """Returns an array to train on; else raises InputError."""
    array = np.asarray(data)
    told = f"an array of shape {array.shape} and type {array.dtype}"
    is_rows = array.ndim == 2 and array.dtype in (np.float32, np.float64)
    is_images = array.ndim == 4 and array.dtype == np.uint8
    if not is_rows and not (is_images and array.shape[1] == array.shape[2]):
        raise InputError(
            f"{told} cannot be trained on; give rows [n, d] as floats, with "
            "x.astype(np.float64), or square images [n, side, side, 1 or 3] as uint8"
        )
    most = MAX_NPZ_BYTES if is_rows else MAX_BYTES
    if array.nbytes > most:
        raise InputError(f"{told} takes {array.nbytes} bytes; at most {most} can be")
    if is_rows and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise InputError(f"row {row} of the data (from 0) is not finite; drop it")
    return array


class Model:
    """A trained model; `load` and `fit` make one.

    Attributes:
      workdir: the run directory.
      config: the run's config.
      step: of the checkpoint whose averaged weights are used.
      figures: the run's final figures by name; empty before its end.
      run: the run's parts, for code that uses the package's other modules.
    """

    def __init__(self, run: TrainedRun) -> None:
        self.run = run
        self.workdir, self.step = run.workdir, run.step
        self.config = run_directory.read_config(run.workdir)
        report = run.workdir / run_directory.REPORT_FILE
        exists = report.exists()
        self.figures = run_directory.read_figures(report, run.step) if exists else {}

    def __repr__(self) -> str:
        lines = [f"Model of {self.config.data.name}, step {self.step}, {self.workdir}"]
        lines += [f"  {name}: {value}" for name, value in self.figures.items()]
        return "\n".join(lines)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example: (d,), or (height, width, channels)."""
        return self.run.experiment.source.event_shape

    def sample(self, num: int, seed: int = 0, sampler: str = "generator") -> np.ndarray:
        """Returns samples [num, *event_shape], in the data's own units.

        Args:
          num: how many.
          seed: sample i of the generator is a function of (seed, i) only.
          sampler: `generator`; or `energy`, of exp f(·, 0) by sequential Monte Carlo.

        Raises:
          InputError: for another sampler, or where the energy's samples are refused.
        """
        experiment, variables = self.run.experiment, self.run.variables
        if num < 1:
            raise InputError(f"num is {num}; at least 1 sample can be drawn")
        if sampler == "generator":
            drawn = inference.draw_samples(experiment, variables, num, seed)
        elif sampler == "energy":
            drawn = particles.draw_from_energy(experiment, variables, num, seed)
        else:
            raise InputError(f"sampler is {sampler!r}; allowed: generator, energy")
        return experiment.source.to_own_units(drawn)

    def energy(self, x: Any) -> Any:
        """Returns f(x, 0), log density up to a constant, nats; larger is likelier.

        NumPy in and out, in chunks; inside jax.jit, vmap or grad the same as a pure
        function.

        Args:
          x: one example, or [n, *event_shape], in the data's own units: floats, or
            images as uint8. Images as floats are in [−1, 1].

        Returns:
          A number, or [n].

        Raises:
          InputError: for another shape or type.
        """
        if isinstance(x, jax.core.Tracer):
            return self._pure(self._checked(x))
        array = self._checked(np.asarray(x))
        rows = array.reshape(-1, *self.event_shape)
        if not rows.size:
            return np.zeros(len(rows), np.float32)
        source = self.run.experiment.source
        rows = source.from_own_units(rows, "x")
        with jax.ensure_compile_time_eval():  # Also of a constant inside jit.
            found = inference.energies(self.run.experiment, self.run.variables, rows)
        return found if array.ndim > len(self.event_shape) else found[0]

    @functools.cached_property
    def log_z(self) -> float | None:
        """Log of the normaliser of exp f(·, 0), in the networks' units, nats.

        Sequential Monte Carlo measures it at the first use. None for images, and where
        the effective sample size is too small.
        """
        if self.run.experiment.source.holds_images:
            return None
        with jax.ensure_compile_time_eval():  # Also at a first use inside jit.
            found = particles.measure(self.run.experiment, self.run.variables).estimate
        if found.refusal is not None:
            logging.warning("log_density is not normalised: %s", found.refusal)
            return None
        return found.log_z

    @functools.cached_property
    def log_density(self) -> Callable[[Array], Array]:
        """The log density of one example [*event_shape], nats, as a pure function.

        In the data's own units, images as floats in [−1, 1]; normalised where `log_z`
        is known. To be used with jax.jit, vmap and grad.
        """
        shift = self.log_z or 0.0
        if self.log_z is not None:
            shift -= self.run.experiment.source.log_det

        def log_density(x: Any) -> Float[Array, ""]:
            x = self._checked(jnp.asarray(x))
            if x.shape != self.event_shape:
                raise InputError(
                    f"x has shape {x.shape}; one example of {self.event_shape} is "
                    "needed: jax.vmap(log_density) takes several"
                )
            return self._pure(x) - shift

        return log_density

    def plot(self) -> "Figure":
        """Returns a picture: densities in the plane, a table, or a grid of images."""
        title = f"{self.config.data.name}, step {self.step}"
        return _shown(pictures.figure(self.run.experiment, self.run.variables, title))

    def plot_history(self) -> "Figure":
        """Returns the run's metrics against steps.

        Raises:
          InputError: if there are none yet.
        """
        lines = reports.lines_to_draw(self.workdir / reports.METRICS_FILE)
        figure = plots.plot_curves(lines, self.config.data.name)
        if figure is None:
            raise InputError(f"{self.workdir} has no {reports.METRICS_FILE}")
        return _shown(figure)

    def _pure(self, x: Array) -> Array:
        """Returns f of one or several examples in the data's own units."""
        source, networks = self.run.experiment.source, self.run.experiment.networks
        rows = x.reshape(-1, *self.event_shape)
        if source.holds_images:
            rows = source.points(rows)
        if source.table is not None:
            arrays = export.standardizer_arrays(source.table.standardizer)
            rows = export.standardized(jax.tree.map(jnp.float32, arrays), rows)
        found = density.energy_at_data(networks, self.run.variables.energy, rows)
        return found if x.ndim > len(self.event_shape) else found[0]

    def _checked(self, x: Any) -> Any:
        shape, holds_images = self.event_shape, self.run.experiment.source.holds_images
        is_pixels = holds_images and x.dtype == np.uint8
        if x.dtype.kind != "f" and not is_pixels and x.dtype != jnp.bfloat16:
            needed = "uint8, or floats in [−1, 1]" if holds_images else "floats"
            raise InputError(
                f"x is of type {x.dtype}; {needed} are needed: x.astype(np.float32)"
            )
        if x.shape[-len(shape) :] != shape or x.ndim > len(shape) + 1:
            raise InputError(
                f"x has shape {x.shape}; {shape}, or n of them, are needed"
            )
        if isinstance(x, jax.core.Tracer) or is_pixels:
            return x
        finite = np.isfinite(x).reshape(-1, *shape)
        if not finite.all():
            example = int(np.argwhere(~finite)[0, 0])
            raise InputError(f"x: example {example} (from 0) is not finite; drop it")
        if holds_images:
            low, high = (float(f(x)) if x.size else 0.0 for f in (np.min, np.max))
            if not -1.0 <= low <= high <= 1.0:
                raise InputError(
                    f"x holds values from {low:g} to {high:g}; images as floats are "
                    "in [−1, 1]: x / 127.5 - 1"
                )
        return x


def _shown(figure: "Figure") -> "Figure":
    """Returns a figure that notebooks show, whatever their backend."""

    def png() -> bytes:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        return file.getvalue()

    figure._repr_png_ = png
    return figure
