"""`--mode=ablate`: compare a recipe with variations of it, over seeds."""

from pathlib import Path

import ml_collections
from absl import flags, logging

from ddaebm_jax import config as config_lib
from ddaebm_jax.commands import common
from ddaebm_jax.config import fields
from ddaebm_jax.config import flags as config_flags
from ddaebm_jax.config import variations as variations_lib
from ddaebm_jax.errors import InputError, listed, shown
from ddaebm_jax.evaluation import ablation, plots
from ddaebm_jax.files import write_json_atomically, write_text_atomically
from ddaebm_jax.training import run_directory, study

_REPORT = "ablation.json"


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this mode."""
    config_flags.define_config_flag(values)
    text = "paper, schedule, noise, density, or section.field=a,b; repeatable."
    flags.DEFINE_multi_string("vary", [], text, values)
    text = "Seeds, separated by commas."
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], text, values)
    text = "The study's directory, new or to go on with."
    common.define_path(values, "workdir", text)
    common.require(values, "workdir", "a directory for the study")


def run(values: flags.FlagValues) -> None:
    """Train what is not done yet, write the figures, and print them."""
    if values.config is None or not values.vary:
        raise InputError(
            "--mode=ablate needs --config and --vary, for example "
            "--config=configs/gaussians25.py --vary=paper"
        )
    config, seeds = values.config, _seeds(values.seeds)
    config_lib.validate(config)
    if config.train.init_from:
        raise InputError(
            "--mode=ablate trains from random weights; leave train.init_from empty"
        )
    found = variations_lib.variations(values.vary, config)
    if len(seeds) == 1:
        logging.warning("one seed gives no error: add others to --seeds")
    workdir, name = Path(values.workdir), config_flags.recipe_name()
    with run_directory.lock(workdir), common.out_of_memory_advice(_ADVICE):
        records = study.run(config, found, seeds, workdir)
        title = f"{name}: {', '.join(values.vary)}"
        text = _write(workdir, records, config, title)
    common.show(f"{text}\n{workdir / _REPORT}")


_ADVICE = (
    "give fewer --seeds at a time, or lower data.batch_size or the networks' width"
)


def _write(
    workdir: Path,
    records: dict[str, list[study.Record]],
    config: ml_collections.ConfigDict,
    title: str,
) -> str:
    """Write tables and pictures; return the tables in Markdown."""
    figures, path = ablation.summarize(records), workdir / _REPORT
    text = ablation.to_markdown(figures, records, title)
    write_text_atomically(path.with_suffix(".md"), text)
    write_text_atomically(path.with_suffix(".csv"), ablation.to_csv(figures))
    write_json_atomically(path, ablation.to_json(figures, records))
    if panels := study.panels(workdir, records):
        plots.write(path.with_suffix(".png"), plots.plot_panels, panels, title)
    recipe = dict(fields.leaves(config))
    curves = ablation.against_fields(figures, records, recipe)
    for field, found in curves.items():
        picture = path.with_name(f"{path.stem}-{field}.png")
        plots.write(picture, plots.plot_against, field, *found, title)
    return text


def _seeds(texts: list[str]) -> list[int]:
    """Return the seeds, each once."""
    bad = [text for text in texts if not text.isdecimal() or int(text) >= 2**31]
    if bad or not texts:
        raise InputError(
            f"--seeds: {listed(map(shown, bad))}; whole numbers from 0 to {2**31 - 1}, "
            "separated by commas, are needed"
        )
    return list(dict.fromkeys(map(int, texts)))
