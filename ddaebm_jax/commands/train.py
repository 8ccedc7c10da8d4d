"""`--mode=train`, the default: train a recipe, or go on with a run."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from ddaebm_jax import config as config_lib
from ddaebm_jax.commands import common
from ddaebm_jax.config import flags as config_flags
from ddaebm_jax.errors import InputError
from ddaebm_jax.training import loop, processes, reports


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    config_flags.define_config_flag(values)
    text = "The run directory, new or to go on with. Default: runs/<config>/<time>."
    common.define_path(values, "workdir", text)
    text = "Start a new run from this one's averaged weights."
    common.define_path(values, "init_from", text)
    common.define_inception_weights(values)
    common.define_distributed(values)


def run(values: flags.FlagValues) -> None:
    """Train, and print the run directory and the final figures."""
    if values.config is None:
        raise InputError(
            "--mode=train needs --config, for example --config=configs/gaussians25.py; "
            "--help lists the modes and their flags"
        )
    if values.distributed and not values.workdir:
        raise InputError("--distributed needs --workdir, the same for all processes")
    config = values.config
    config.evaluation.update(common.inception_settings(values.inception_weights))
    if values.init_from is not None:
        config.train.init_from = values.init_from
    config_lib.validate(config)  # Before other processes are waited for.
    common.join_processes(values)
    advice = (
        f"lower data.batch_size ({config.data.batch_size}), or keep it and raise "
        f"optimizer.accumulate ({config.optimizer.accumulate}), or on images set "
        f"model.remat to blocks ({config.model.remat}), or narrow the networks"
    )
    with _workdir(values.workdir) as workdir, common.out_of_memory_advice(advice):
        report = loop.train(config, workdir)
    if processes.is_first_process():
        common.show(f"{workdir}\n{reports.format_report(report)}")


@contextlib.contextmanager
def _workdir(given: str | None) -> Iterator[Path]:
    """Yield the run directory that is given, or a new one of this process alone.

    A new one that is still empty at the end is removed.
    """
    if given:
        yield Path(given)
        return
    first = Path("runs") / config_flags.recipe_name() / time.strftime("%Y%m%d-%H%M%S")
    new = common.claimed(first, folder=True)
    try:
        yield new
    finally:
        with contextlib.suppress(OSError):
            new.rmdir()
