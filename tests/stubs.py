"""A stand-in for what a config describes: only the parts that evaluation reads."""

from types import SimpleNamespace
from typing import Any

from helpers import GAME, SCHEDULE

from ddaebm_jax.data import Source, images
from ddaebm_jax.experiment import Experiment


def experiment(
    event_shape: tuple[int, ...],
    networks: Any = None,
    image_set: images.ImageSet | None = None,
    num_devices: int = 1,
    **evaluation: Any,
) -> Experiment:
    """Returns an experiment without a game to train by."""
    config = SimpleNamespace(
        data=SimpleNamespace(),
        evaluation=SimpleNamespace(**evaluation),
        parallel=SimpleNamespace(num_devices=num_devices),
    )
    source = Source("made", event_shape, None, None, image_set=image_set)
    return Experiment(config, source, SCHEDULE, networks, GAME, None)
