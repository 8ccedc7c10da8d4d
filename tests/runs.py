"""Small runs, trained in this process; their programs are compiled once."""

import contextlib
import functools
import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import quick
from cli import ROOT, TINY, TINY_UNET, dotted

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiment_lib
from ddaebm_jax.evaluation import metrics, pictures, plots
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoints, dispatch, loop, run_directory

_STEPS = {
    "train.num_steps": 24,
    "train.steps_per_dispatch": 4,
    "train.report_every": 8,
    "train.checkpoint_every": 8,
    "optimizer.ema_decay": 0.9,
    "parallel.num_devices": 1,
}
_IMAGES = {
    "data.test_fraction": 0.35,
    "data.crop": (1, 2, 9, 10),
    "data.num_threads": 2,
    "train.evaluate_every": 0,
    "train.steps_per_dispatch": 1,
}
_Dispatcher = dispatch.Dispatcher


def load_recipe(path: Path) -> ml_collections.ConfigDict:
    """Return the config of a recipe."""
    return runpy.run_path(str(path))["get_config"]()


def small(**fields: Any) -> ml_collections.ConfigDict:
    """Return the config of a run that takes a second; `a__b` stands for `a.b`."""
    config = config_lib.base()
    config.update_from_flattened_dict(TINY | _STEPS | dotted(fields))
    return config


def small_images(folder: Path, **fields: Any) -> ml_collections.ConfigDict:
    """Return the config of a run on the images of a folder."""
    config = load_recipe(ROOT / "configs" / "digits.py")
    common = {k: v for k, v in TINY.items() if k.startswith(("data", "train"))}
    own = {"data.name": "folder", "data.path": str(folder)}
    changes = common | _STEPS | TINY_UNET | _IMAGES | own | dotted(fields)
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def _dispatcher(text: str) -> dispatch.Dispatcher:
    with quick.compilation():
        return _Dispatcher(experiment_lib.build(config_lib.from_json(text)))


def _shared_dispatcher(experiment: experiment_lib.Experiment) -> dispatch.Dispatcher:
    """Return one dispatcher for all runs whose steps are the same program."""
    config = config_lib.from_json(config_lib.to_json(experiment.config))
    num_steps = config.train.num_steps if config_lib.decays(config) else 1
    for section in ("train", "recovery", "evaluation", "levels"):
        config[section] = small()[section]
    config.train.num_steps = num_steps
    return _dispatcher(config_lib.to_json(config))


def train(
    config: ml_collections.ConfigDict, workdir: Path, figures: bool = False
) -> dict[str, Any]:
    """Train; without figures and pictures, which take longer, unless asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if dispatch.Dispatcher is _Dispatcher:
            patch.setattr(dispatch, "Dispatcher", _shared_dispatcher)
        if not figures:
            patch.setattr(metrics, "evaluate", lambda *_: {"none": 0.0})
            drawn = pictures.Pictures({}, {})
            patch.setattr(pictures, "draw_pictures", lambda *_: drawn)
            patch.setattr(plots, "plot_curves", lambda *_: None)
        return loop.train(config, workdir)


@contextlib.contextmanager
def hooked(
    before: Callable[[TrainState, Any], TrainState] = lambda state, batches: state,
    after: Callable[[int], None] = lambda step: None,
) -> Iterator[None]:
    """Change states before they are stepped, or act when the steps are under way."""
    call = _Dispatcher.__call__

    def dispatched(self, state, length, batches=None):
        result = call(self, before(state, batches), length, batches)
        after(int(result[0].step))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Dispatcher, "__call__", dispatched)
        yield


def poisoned(*at: int, seen: Callable[[int, Any], None] = lambda *_: None):
    """Put a NaN into the energy's weights before these steps, once each.

    `seen` gets the step and the batches of each dispatch.
    """
    left = list(at)

    def before(state: TrainState, batches: Any) -> TrainState:
        seen(int(state.step), batches)
        if left and int(state.step) == left[0]:
            left.pop(0)
            energy = jax.tree.map(lambda x: x * jnp.nan, state.variables.energy)
            state = state.replace(variables=state.variables._replace(energy=energy))
        return state

    return hooked(before=before)


def final_state(workdir: Path, step: int | None = None) -> TrainState:
    """Return the state of a run's newest checkpoint, or of a step."""
    experiment = experiment_lib.build(
        run_directory.read_config(workdir), open_images=False
    )
    saved = checkpoints.Checkpoints(workdir, read_only=True)
    state = saved.restore(experiment_lib.evaluation_state(experiment), step).state
    saved.close()
    return state


def newest_step(workdir: Path) -> int:
    """Return the step of a run's newest checkpoint, 0 if there is none."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without its rates, which are never the same."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    rates = ("steps_per_second", "images_per_second")
    return [{k: v for k, v in line.items() if k not in rates} for line in found]


def steps(workdir: Path) -> list[int]:
    """Return the steps of a run's metrics, in order."""
    return [line["step"] for line in lines(workdir)]


def assert_same_run(
    actual: TrainState, expected: TrainState, largest: float = 5e-4
) -> None:
    """Assert that two states are the same up to rounding, after a few steps.

    Adam's first steps are near the learning rate (1e-3) whatever the gradient, and
    so another noise or batch would move most numbers by about that. Rounding does so
    only where a gradient is next to nothing: few numbers, and none by much.
    """
    leaves = [jax.tree.leaves((one.variables, one.ema)) for one in (actual, expected)]
    apart = np.concatenate(
        [
            np.abs(np.asarray(a) - np.asarray(b)).ravel()
            for a, b in zip(*leaves, strict=True)
        ]
    )
    assert apart.max() < largest and apart.mean() < 3e-6
