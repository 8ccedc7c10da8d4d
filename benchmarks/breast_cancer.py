"""AUROC on the breast-cancer table, beside four baselines, over several seeds.

  python benchmarks/breast_cancer.py --workdir=/tmp/breast_cancer

A seed sets the split, the weights and the noise. Runs already in the directory are
taken up, not repeated.
"""

import json
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ddaebm_jax.training import loop as train
from ddaebm_jax.training import run_directory

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/breast_cancer.py", "The recipe."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "The seeds.")


def main(argv: list[str]) -> None:
    """Trains and prints."""
    del argv
    aurocs: dict[str, list[float]] = {}
    for seed in _SEEDS.value:
        config = _CONFIG.value.copy_and_resolve_references()
        config.seed = int(seed)
        config.train.picture_every = 0
        config.train.tensorboard = False
        workdir = Path(_WORKDIR.value) / seed
        run_directory.check(workdir, config)  # Refuses a run of another config.
        if (workdir / run_directory.REPORT_FILE).exists():
            report = json.loads((workdir / run_directory.REPORT_FILE).read_text())
        else:
            report = train.train(config, workdir)
        for name, value in report["figures"].items():
            if name == "auroc" or name.startswith("auroc_"):
                method = name.removeprefix("auroc").removeprefix("_") or "DDAEBM"
                aurocs.setdefault(method, []).append(value)
    print(_table(aurocs))


def _table(aurocs: dict[str, list[float]]) -> str:
    """Returns a line a method: mean ± the sample's standard deviation over seeds."""
    width = max(map(len, ("method", *aurocs)))
    lines = [f"{'method':<{width}}  AUROC, mean ± std over {len(_SEEDS.value)} seeds"]
    for name, values in aurocs.items():
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        lines.append(f"{name:<{width}}  {np.mean(values):.4f}{spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
