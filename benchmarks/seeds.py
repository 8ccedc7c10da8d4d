"""A recipe over several seeds: every figure of every seed, their mean and spread.

  python benchmarks/seeds.py --config=configs/gaussians25.py --workdir=/tmp/gaussians25

A seed sets the split, the weights and the noise. Runs already in the directory are
taken up, not repeated, so that a stopped command goes on. --likelihood adds the figures
of --mode=evaluate: log Z, likelihoods, consistency.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ddaebm_jax.commands.evaluate import evaluate
from ddaebm_jax.training import loop, run_directory

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "The seeds.")
_LIKELIHOOD = flags.DEFINE_bool("likelihood", False, "Measure likelihoods, too.")


def main(argv: list[str]) -> None:
    """Trains, measures and prints."""
    del argv
    found: dict[str, list[float]] = {}
    for seed in _SEEDS.value:
        for name, value in _figures(int(seed)).items():
            for place, number in enumerate(
                value if isinstance(value, list) else [value]
            ):
                known = f"{name}[{place}]" if isinstance(value, list) else name
                if isinstance(number, int | float):
                    found.setdefault(known, []).append(float(number))
        print(_table(found), flush=True)


def _figures(seed: int) -> dict[str, Any]:
    """Returns a seed's figures, from its report if there is one."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.seed = seed
    config.train.picture_every = 0
    config.train.tensorboard = False
    workdir = Path(_WORKDIR.value) / str(seed)
    run_directory.check(workdir, config)  # Refuses a run of another config.
    path = workdir / run_directory.REPORT_FILE
    report = json.loads(path.read_text()) if path.exists() else None
    report = report or loop.train(config, workdir)
    figures = {**report["figures"], "seconds": report["seconds"]}
    if _LIKELIHOOD.value:
        path = workdir / "likelihood.json"
        if not path.exists():
            path.write_text(json.dumps(evaluate(workdir)["figures"]))
        figures |= json.loads(path.read_text())
    return figures


def _table(found: dict[str, list[float]]) -> str:
    """Returns a line a figure: mean ± standard deviation, the least, the largest."""
    width = max(map(len, found))
    lines = [f"{'figure':<{width}}  mean ± std, [least, largest] over the seeds so far"]
    for name, values in found.items():
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        ends = f"[{min(values):.4f}, {max(values):.4f}]"
        lines.append(f"{name:<{width}}  {np.mean(values):.4f}{spread} {ends}")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
