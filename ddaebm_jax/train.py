"""The loop: wires config, data, networks, steps, writers and checkpoints together.

It owns no mathematics. State is in plain sight, every dispatch is a pure function
of it, and all randomness is a function of (seed, step).
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jaxtyping import Array

from ddaebm_jax import (
    config as config_lib,
)
from ddaebm_jax import (
    diffusion,
    minimax,
    models,
    parallel,
    writers,
)
from ddaebm_jax.checkpointing import BEST, Checkpoints
from ddaebm_jax.data import Source, open_source
from ddaebm_jax.data.images import Batches
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import figures, image_quality
from ddaebm_jax.files import (
    cache_directory,
    write_json_atomically,
    write_text_atomically,
)

CONFIG_FILE = "config.json"
REPORT_FILE = "report.json"

# Steps a dispatch where the config leaves the choice: small networks are bound by
# the time of a dispatch; matrix products lose nothing inside a scan.
_STEPS_PER_DISPATCH = {"mlp": 100, "ncsnpp": 10}


class TrainingError(InputError):
    """Training cannot go on; the message says at which step and why."""


class Experiment(NamedTuple):
    """What a config describes, built; nothing here has touched a device's state.

    Attributes:
      config: the config.
      source: the data.
      schedule: the diffusion.
      networks: the apply functions.
      game: weights and switches.
      optimizers: one a player.
    """

    config: ml_collections.ConfigDict
    source: Source
    schedule: diffusion.Schedule
    networks: models.Networks
    game: minimax.Game
    optimizers: minimax.Optimizers


def learning_rate(
    optimizer: ml_collections.ConfigDict, rate: float, num_steps: int
) -> optax.ScalarOrSchedule:
    """Returns the rate's schedule over a run of `num_steps`."""
    ratio = optimizer.final_learning_rate / rate
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(rate, num_steps, alpha=ratio)
    if optimizer.schedule == "exponential":
        return optax.exponential_decay(rate, num_steps, ratio)
    return rate


def build_game(game: ml_collections.ConfigDict, num_steps: int) -> minimax.Game:
    """Returns the game, with γ's decay over a run of `num_steps`."""
    values = dict(game)
    final = values.pop("gamma_final")
    if final is not None:
        ratio = final / game.gamma
        values["gamma"] = lambda step: game.gamma * ratio ** (step / num_steps)
    return minimax.Game(**values)


def build(
    config: ml_collections.ConfigDict,
    workdir: Path | None = None,
    open_images: bool = True,
) -> Experiment:
    """Builds what a valid config describes.

    Args:
      config: the config.
      workdir: a run directory that has kept its table; None: open it anew.
      open_images: False: images are not looked for, for modes that need none.

    Raises:
      InputError: if the data cannot be opened.
    """
    source = open_source(config.data, config.seed, workdir, open_images)
    optimizer, steps = config.optimizer, config.train.num_steps
    energy_rate = optimizer.energy_learning_rate
    if energy_rate is None:
        energy_rate = optimizer.learning_rate
    return Experiment(
        config=config,
        source=source,
        schedule=diffusion.make_schedule(**config.diffusion),
        networks=models.build(config.model, source.event_shape),
        game=build_game(config.game, steps),
        optimizers=minimax.make_optimizers(
            learning_rate(optimizer, optimizer.learning_rate, steps),
            learning_rate(optimizer, energy_rate, steps),
            optimizer.beta1,
            optimizer.beta2,
            optimizer.max_grad_norm,
        ),
    )


def _key(seed: int, purpose: str) -> Array:
    """Returns a key of its own for each purpose, so that no two runs share one."""
    purposes = ("weights", "data", "noise")
    return jax.random.fold_in(jax.random.key(seed), purposes.index(purpose))


def init_state(experiment: Experiment) -> minimax.TrainState:
    """Returns the state before the first step, a function of the seed."""
    return minimax.init_state(
        _key(experiment.config.seed, "weights"),
        experiment.networks,
        experiment.optimizers,
        experiment.game,
    )


def abstract_state(experiment: Experiment) -> minimax.TrainState:
    """Returns the shapes of the state, on the first device, to restore one into."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(experiment)),
    )


def make_dispatch(experiment: Experiment) -> Callable[..., Any]:
    """Returns (state, arrays, index, batches, length) → (state, metrics).

    K = length steps on the device. Noise is drawn inside, each example's from its own
    key, and so are the batches where no input stream gives them ([K, batch, …]).
    """
    step = minimax.make_step(
        experiment.game,
        experiment.schedule,
        experiment.networks,
        experiment.optimizers,
        experiment.config.optimizer.ema_decay,
    )
    seed = experiment.config.seed
    networks, num_steps = experiment.networks, experiment.schedule.num_steps

    def dispatch(state, arrays, index, batches, length):
        data_key, noise_key = _key(seed, "data"), _key(seed, "noise")

        def one(state, batch):
            keys = minimax.example_keys(data_key, state.step, index)
            x0 = experiment.source.draw(arrays, batch, keys)
            noise = minimax.draw_noise(
                noise_key,
                state.step,
                index,
                num_steps,
                networks.event_shape,
                networks.nz,
            )
            return step(state, x0, noise)

        return minimax.scan_steps(one, state, batches, length)

    return dispatch


def open_batches(experiment: Experiment) -> Batches | None:
    """Opens the stream of images at its beginning; None where there is no stream.

    It gives this process's part of every global batch.
    """
    data, source = experiment.config.data, experiment.source
    if source.image_set is None:
        return None
    return Batches(
        num_records=len(source.image_set.train),
        batch_size=data.batch_size,
        seed=experiment.config.seed,
        records=None if data.on_device else source.image_set.train,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        num_workers=data.num_workers,
    )


class Dispatcher:
    """Compiles the dispatch for each length once, and keeps count of the time.

    Attributes:
      num_devices: over which the batch is split.
      compile_seconds: spent compiling so far.
    """

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        self._mesh = parallel.make_mesh(
            config.parallel.num_devices, config.data.batch_size
        )
        sharding = parallel.replicated(self._mesh)
        self._jitted = jax.jit(
            make_dispatch(experiment),
            static_argnums=4,
            donate_argnums=0,
            out_shardings=(sharding, sharding),
        )
        self._inputs = (
            jax.device_put(experiment.source.arrays, sharding),
            parallel.batch_index(self._mesh, config.data.batch_size),
        )
        self.num_devices = self._mesh.size
        self._compiled: dict[int, Any] = {}
        self.compile_seconds = 0.0

    def place(self, state: minimax.TrainState) -> minimax.TrainState:
        """Puts a copy of the state on every device of the mesh."""
        return jax.device_put(state, parallel.replicated(self._mesh))

    def __call__(
        self, state: minimax.TrainState, length: int, batches: np.ndarray | None = None
    ):
        """Takes `length` steps; the given state's buffers are used up.

        Args:
          state: where to start.
          length: K.
          batches: what the input stream gave for these steps, [K, batch, …].
        """
        if batches is not None:
            batches = jax.device_put(batches, parallel.split_batches(self._mesh))
        inputs = (state, *self._inputs, batches)
        if length not in self._compiled:
            start = time.monotonic()
            self._compiled[length] = self._jitted.lower(*inputs, length).compile()
            self.compile_seconds += time.monotonic() - start
        return self._compiled[length](*inputs)


def use_compilation_cache(cache: ml_collections.ConfigDict) -> None:
    """Turns JAX's persistent compilation cache on, unless the config says no.

    A directory in JAX_COMPILATION_CACHE_DIR stands where the config names none.
    """
    if not cache.enabled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    directory = cache.directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not directory:
        directory = cache_directory("compiled")
    jax.config.update("jax_compilation_cache_dir", str(directory))


def next_stop(step: int, per_dispatch: int, total: int, intervals: list[int]) -> int:
    """Returns where the dispatch that starts at `step` ends.

    At the next multiple of `per_dispatch` or of an interval (0: never), so that
    the cuts are the same in a resumed run as in an unbroken one.
    """
    candidates = [n for n in (per_dispatch, *intervals) if n > 0]
    return min(total, *((step // n + 1) * n for n in candidates))


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a directory is new, or a run of this very config; writes nothing.

    Raises:
      InputError: if the directory holds something else, or a run whose config
        differs in a field that changes the model or the data.
    """
    path = workdir / CONFIG_FILE
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; name a directory")
    if not path.exists():
        if any(found.suffix != ".partial" for found in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} is not empty and holds no {CONFIG_FILE}, so it "
                "is not a run; name a new directory"
            )
        return
    changed = config_lib.differences(read_config(workdir), config)
    refused = {
        name: pair
        for name, pair in changed.items()
        if not name.startswith(config_lib.FREE_ON_RESUME)
        or (name == "train.num_steps" and config_lib.decays(config))
    }
    if refused:
        listed = ", ".join(
            f"{n} (was {o!r}, is {w!r})" for n, (o, w) in refused.items()
        )
        raise InputError(
            f"--workdir={workdir} belongs to another config: {listed}; give these "
            "fields their old values, or name a new --workdir"
        )
    for name, (old, new) in changed.items():
        logging.info("resuming with %s = %r (was %r)", name, new, old)


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """Reads the config of a run directory.

    Raises:
      InputError: if there is none, or it is not a config of this version.
    """
    path = workdir / CONFIG_FILE
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); --workdir must name a run "
            "directory that --mode=train has made"
        ) from error
    try:
        return config_lib.from_json(text)
    except config_lib.ConfigError as error:
        raise InputError(f"{path}: {error}") from error


def log_parameters(variables: models.Players) -> dict[str, int]:
    """Logs an overview of each network's parameters; returns their numbers."""
    try:
        from clu import parameter_overview
    except ImportError:
        parameter_overview = None
    counts = {}
    for name, value in variables._asdict().items():
        params = value["params"]
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
        if params and parameter_overview is not None:
            table = parameter_overview.get_parameter_overview(
                params, include_stats=False
            )
            logging.info("%s\n%s", name, table)
    logging.info("parameters: %s", counts)
    return counts


def _check_data(saved: dict | None, source: Source, workdir: Path) -> None:
    """Raises InputError if a run's data have changed since its checkpoint.

    Imported weights have no data of their own (None).
    """
    if saved is not None and saved != source.metadata():
        raise InputError(
            f"the data '{source.name}' are not those that {workdir} was trained on; "
            "bring the old files back, or name a new --workdir"
        )


def _checked(step: int, metrics: dict[str, Any]) -> dict[str, float]:
    """Fetches metrics; raises TrainingError if one is not finite."""
    values = minimax.with_gaps(jax.device_get(metrics))
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{', '.join(bad)} not finite in the steps up to {step}; the last "
            "checkpoint before is intact. Try a lower optimizer.learning_rate, a "
            "higher game.gamma, or optimizer.max_grad_norm"
        )
    return values


class _Average:
    """The mean of metrics between two reports, kept on the device."""

    def __init__(self) -> None:
        self._sum: Any = None
        self._steps = 0

    def add(self, metrics: dict[str, Array], steps: int) -> None:
        weighted = jax.tree.map(lambda m: m * steps, metrics)
        if self._sum is None:
            self._sum = weighted
        else:
            self._sum = jax.tree.map(jnp.add, self._sum, weighted)
        self._steps += steps

    def take(self) -> dict[str, Array]:
        mean = jax.tree.map(lambda m: m / self._steps, self._sum)
        self._sum, self._steps = None, 0
        return mean


def steps_per_dispatch(model_name: str) -> int:
    """Returns K where the config leaves it open.

    On a CPU a convolution inside a scan is about ten times slower than outside.
    """
    if model_name == "ncsnpp" and jax.default_backend() == "cpu":
        return 1
    return _STEPS_PER_DISPATCH[model_name]


def dispatches(
    config: ml_collections.ConfigDict, start: int
) -> Iterator[tuple[int, int]]:
    """Yields (first step, step after the last) of every dispatch that is left."""
    train = config.train
    per_dispatch = train.steps_per_dispatch or steps_per_dispatch(config.model.name)
    intervals = [
        train.report_every,
        train.picture_every,
        train.evaluate_every,
        train.checkpoint_every,
    ]
    while start < train.num_steps:
        stop = next_stop(start, per_dispatch, train.num_steps, intervals)
        yield start, stop
        start = stop


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, in a run directory.

    Args:
      config: the recipe.
      workdir: the run directory: new, or one of the same config, whose newest
        checkpoint is then taken up.

    Returns:
      The final figures, as written to `report.json`.

    Raises:
      InputError: for a bad config, bad data, or a directory that is not this run's;
        nothing has been written then.
      TrainingError: if a loss or gradient stops being finite.
    """
    workdir = Path(workdir)
    started = time.monotonic()
    config_lib.validate(config)
    open_workdir(workdir, config)
    use_compilation_cache(config.compilation_cache)
    experiment = build(config)
    dispatcher = Dispatcher(experiment)
    state = dispatcher.place(init_state(experiment))
    counts = log_parameters(state.variables)
    meter = figures.open_meter(experiment)

    total = config.train.num_steps
    if not (workdir / CONFIG_FILE).exists():
        # First of all: from here on the directory is known as a run.
        workdir.mkdir(parents=True, exist_ok=True)
        write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        stack.callback(checkpoints.close)
        found = checkpoints.latest_step()
        first = found or 0
        if first > total:
            raise InputError(
                f"{workdir} has a checkpoint at step {first}, beyond train.num_steps "
                f"{total}; raise it, or name a new --workdir"
            )
        best = _Best(workdir) if meter is not None else None
        if best is not None:
            stack.callback(best.close)
        batches = open_batches(experiment)
        if batches is not None:
            stack.callback(batches.close)
        if found is not None:
            saved = checkpoints.info(found)
            _check_data(saved["data"], experiment.source, workdir)
            state = checkpoints.restore(state, found)
            # Imported weights, and runs without a stream, have no position.
            if batches is not None and saved.get("input") is not None:
                batches.restore(saved["input"])
        write_text_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
        experiment.source.save(workdir)
        info = {
            "config": config.to_dict(),
            "data": experiment.source.metadata(),
        }
        output = writers.Writers(
            workdir,
            first,
            total,
            config.train.tensorboard,
            config.data.batch_size if experiment.source.holds_images else None,
        )
        stack.callback(output.close)
        output.message(
            f"training from step {first} to {total} in {workdir} on "
            f"{dispatcher.num_devices} {jax.default_backend()} device(s)"
        )
        state = _loop(
            config,
            experiment,
            workdir,
            state,
            dispatcher,
            batches,
            checkpoints,
            output,
            info,
            meter,
            best,
        )
        seconds = time.monotonic() - started
        report = {
            "step": total,
            "figures": figures.evaluate(experiment, state.ema, meter),
            "parameters": counts,
            "seconds": seconds,
            "compile_seconds": dispatcher.compile_seconds,
            "resumed_from_step": first,
            "device": f"{dispatcher.num_devices} × {jax.devices()[0].device_kind}",
            "versions": {"jax": jax.__version__},
        }
        write_json_atomically(workdir / REPORT_FILE, report)
        output.scalars(total, {f"final/{k}": v for k, v in report["figures"].items()})
        _draw(experiment, state, workdir, output, total)
    return report


class _Best:
    """Keeps the checkpoint of the lowest FID on the way."""

    def __init__(self, workdir: Path) -> None:
        self._checkpoints = Checkpoints(workdir, keep=1, folder=BEST)
        step = self._checkpoints.latest_step()
        self._fid = (
            math.inf if step is None else float(self._checkpoints.info(step)["fid"])
        )

    def offer(
        self, state: minimax.TrainState, fid: float, info: dict[str, Any]
    ) -> None:
        """Saves a state if its FID is the lowest so far."""
        if fid < self._fid:
            self._fid = fid
            self._checkpoints.save(state, {**info, "input": None, "fid": fid})
            logging.info("step %d has the lowest FID so far, %.3f", state.step, fid)

    def close(self) -> None:
        self._checkpoints.close()


def _draw(
    experiment: Experiment,
    state: minimax.TrainState,
    workdir: Path,
    output: writers.Writers,
    step: int,
) -> None:
    """Draws the averaged model's pictures, into files and TensorBoard."""
    directory = workdir / "samples"
    pictures = figures.draw_pictures(experiment, state.ema, directory, step)
    for name, path in pictures.files.items():
        output.picture(step, name, path)
    output.histograms(step, pictures.histograms)


def _loop(
    config: ml_collections.ConfigDict,
    experiment: Experiment,
    workdir: Path,
    state: minimax.TrainState,
    dispatcher: Dispatcher,
    batches: Batches | None,
    checkpoints: Checkpoints,
    output: writers.Writers,
    info: dict[str, Any],
    meter: image_quality.Meter | None,
    best: "_Best | None",
) -> minimax.TrainState:
    """Takes all steps that are left, with reports, pictures and checkpoints."""
    train, total = config.train, config.train.num_steps
    average = _Average()
    compiled = 0.0

    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    for start, step in dispatches(config, int(state.step)):
        length = step - start
        batch = None if batches is None else batches.next(length)
        state, metrics = dispatcher(state, length, batch)
        average.add(metrics, step - start)
        if dispatcher.compile_seconds > compiled:
            seconds = dispatcher.compile_seconds - compiled
            compiled = dispatcher.compile_seconds
            output.message(f"compiled {step - start} steps in {seconds:.1f} s")
            output.restart_clock(start)
        save = due(step, train.checkpoint_every) or step == total
        if due(step, train.report_every) or save:
            output.report(step, _checked(step, average.take()))
        if due(step, train.evaluate_every) and step < total:
            fewer = config.evaluation.num_samples_on_the_way or None
            found = figures.evaluate(experiment, state.ema, meter, fewer)
            output.scalars(step, {f"evaluation/{k}": v for k, v in found.items()})
            if best is not None:
                best.offer(state, found["fid"], info)
            output.restart_clock(step)
        if due(step, train.picture_every) and step < total:
            _draw(experiment, state, workdir, output, step)
            output.restart_clock(step)
        if save:
            # Last: a run resumed from here has missed nothing.
            position = None if batches is None else batches.state()
            checkpoints.save(state, {**info, "input": position})
    return state
