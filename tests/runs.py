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
import pytest
import quick
from cli import ROOT

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment as experiments
from ddaebm_jax.evaluation import metrics, pictures
from ddaebm_jax.game import TrainState
from ddaebm_jax.training import checkpoints, dispatch, loop, run_directory

_SMALL = {
    "model.mlp.hidden": (8, 8),
    "model.mlp.x_widths": (4, 4),
    "data.batch_size": 8,
    "optimizer.ema_decay": 0.9,
    "train.num_steps": 24,
    "train.steps_per_dispatch": 4,
    "train.report_every": 8,
    "train.picture_every": 0,
    "train.checkpoint_every": 8,
    "train.tensorboard": False,
    "parallel.num_devices": 1,
    "evaluation.num_samples": 64,
    "evaluation.num_projections": 4,
}
# A U-Net, in place of the MLP.
_IMAGES = {
    "data.test_fraction": 0.35,
    "data.crop": (1, 2, 9, 10),
    "data.num_threads": 2,
    "model.nz": 4,
    "model.unet.nf": 8,
    "model.unet.ch_mult": (1,),
    "model.unet.num_res_blocks": 1,
    "model.unet.attn_resolutions": (),
    "model.unet.z_emb_dim": 8,
    "model.unet.n_mlp": 0,
    "model.encoder.ngf": 4,
    "model.encoder.t_emb_dim": 8,
    "train.evaluate_every": 0,
    "train.steps_per_dispatch": 1,
}
_Dispatcher = dispatch.Dispatcher


def _changed(
    config: ml_collections.ConfigDict, fields: dict[str, Any]
) -> ml_collections.ConfigDict:
    flat = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(flat)
    return config


def small(**fields: Any) -> ml_collections.ConfigDict:
    """Return the config of a run that takes a second; `a__b` stands for `a.b`."""
    return _changed(config_lib.base(), _SMALL | fields)


def small_images(folder: Path, **fields: Any) -> ml_collections.ConfigDict:
    """Return the config of a run on the images of a folder."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    common = {
        name: value
        for name, value in _SMALL.items()
        if not name.startswith(("model.", "evaluation."))
    }
    own = {"data.name": "folder", "data.path": str(folder)}
    return _changed(config, common | _IMAGES | own | fields)


@functools.cache
def _dispatcher(text: str) -> dispatch.Dispatcher:
    with pytest.MonkeyPatch.context() as patch:
        options = quick.options()
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
        return _Dispatcher(experiments.build(config_lib.from_json(text)))


def _shared_dispatcher(experiment: experiments.Experiment) -> dispatch.Dispatcher:
    """Return one dispatcher for all runs whose steps are the same program."""
    config = config_lib.from_json(config_lib.to_json(experiment.config))
    num_steps = config.train.num_steps if config_lib.decays(config) else 1
    for section in ("train", "recovery", "evaluation"):
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
    experiment = experiments.build(
        run_directory.read_config(workdir), open_images=False
    )
    saved = checkpoints.Checkpoints(workdir, read_only=True)
    state = saved.restore(experiments.evaluation_state(experiment), step).state
    saved.close()
    return state


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without its rates, which are never the same."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    rates = ("steps_per_second", "images_per_second")
    return [{k: v for k, v in line.items() if k not in rates} for line in found]


def steps(workdir: Path) -> list[int]:
    """Return the steps of a run's metrics, in order."""
    return [line["step"] for line in lines(workdir)]
