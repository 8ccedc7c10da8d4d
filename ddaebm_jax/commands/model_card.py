"""The model card of an exported run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddaebm_jax import config as config_lib
from ddaebm_jax.config import fields
from ddaebm_jax.data import Source
from ddaebm_jax.training.run_directory import read_figures
from ddaebm_jax.training.trained_run import TrainedRun

_CARD = """\
# DDAEBM of {data}

A denoising diffusion adversarial energy-based model (Geng et al. 2024, arXiv
2403.01666): a sampler and an unnormalised log density. Averaged weights after {step}
training steps. `python run.py`, with jax, numpy and flatbuffers, draws
samples.

## Functions

`variables` are the arrays of `variables.safetensors` by name, float32; n is any number.

| file | arguments after `variables` | result |
| --- | --- | --- |
| `sample.bin` | seed, uint32 []; rows, int32 [n] | samples x, float32 {batch} |
| `energy.bin` | x, float32 {batch} | f(x), float32 [n] |
| `predict.bin` | x_(t+1), float32 {batch}; t, int32 [n]; z, float32 [n, {nz}] | x̂_0, \
float32 {batch} |

- The sample of row i is a function of (seed, i), by the generator threefry2x32.
- f(x) is a log density up to a constant, in nats; larger means more likely.
- x̂_0 is the network's prediction from x_(t+1) = A_(t+1) x_0 + S_(t+1) ε, a step t of
  0 … {last}, and a latent z ~ N(0, I). A_0 … A_{steps}: {a_cum};
  S_0 … S_{steps}: {sigma_cum}.
- Reverse-mode gradients of f and x̂_0 are included (`jax.grad`), of first order.

Units: {units}

## Figures

Reports on this checkpoint:

```json
{figures}
```

## Config

```json
{config}
```

## Compatibility

Exported by jax {jax} for {platforms}. JAX guarantees that releases up to 6 months newer
and up to 3 weeks older run it.

## Licence

Programs and code: Apache-2.0. The variables may be subject to the data's terms, too.
"""

_IMAGE_UNITS = """\
[height, width, channels] with pixels in [−1, 1]: x = pixel/127.5 − 1, and
pixel = clip(round(127.5 (x + 1)), 0, 255)."""
_COLOURED = """
But x_(t+1) and x̂_0 have white noise: their discrete cosine transform (DCT-II,
orthonormal) is that of the pixels, divided by `standardizer/colour`."""
_TABLE_UNITS = """\
those of the table, rounded to float32, with its columns in this order: {columns}.
But x_(t+1) and x̂_0 are standardised: (x − mean − mean_low)/std, times `whitening` if
there is one, by the arrays `standardizer/…`."""


def model_card(loaded: TrainedRun, platforms: Sequence[str]) -> str:
    """Return the card, in Markdown; of paths in the config it has the last part."""
    experiment = loaded.experiment
    schedule, networks = experiment.schedule, experiment.networks
    config = experiment.config.copy_and_resolve_references()
    for field in fields.PATHS:
        section, name = field.split(".")
        config[section][name] = Path(config[section][name]).name
    return _CARD.format(
        data=config.data.name,
        step=loaded.step,
        batch=f"[n, {', '.join(map(str, networks.event_shape))}]",
        nz=networks.nz,
        last=schedule.num_steps - 1,
        steps=schedule.num_steps,
        a_cum=_listed(schedule.a_cum),
        sigma_cum=_listed(schedule.sigma_cum),
        units=_units(experiment.source),
        figures=json.dumps(_figures(loaded), indent=2),
        config=config_lib.to_json(config).strip(),
        jax=jax.__version__,
        platforms=", ".join(platforms),
    )


def _listed(values: jax.Array) -> str:
    return ", ".join(f"{value:.6g}" for value in np.asarray(values))


def _units(source: Source) -> str:
    if source.colour is not None:
        return _IMAGE_UNITS + _COLOURED
    if source.holds_images:
        return _IMAGE_UNITS
    if source.table is not None:
        return _TABLE_UNITS.format(columns=json.dumps(source.table.columns))
    return "coordinates of the plane."


def _figures(loaded: TrainedRun) -> dict[str, Any]:
    """Return the figures of reports on this step, by the reports' names."""
    paths = sorted(loaded.workdir.glob("report*.json"))
    found = {path.name: read_figures(path, loaded.step) for path in paths}
    return {name: figures for name, figures in found.items() if figures}
