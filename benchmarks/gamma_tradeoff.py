"""Samples against density: the gradient penalty's weight γ on 25 Gaussians.

  python benchmarks/gamma_tradeoff.py --workdir=/tmp/gamma

Trains configs/gaussians25.py with several γ at the end of its decay and prints a
Markdown table. Runs already in the directory are taken up, not repeated.
"""

import json
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from ddaebm_jax.training import loop as train
from ddaebm_jax.training import run_directory

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/gaussians25.py", "The recipe."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go.", required=True)
_GAMMAS = flags.DEFINE_list(
    "gammas", ["2e-3", "1e-3", "5e-4", "2e-4", "1e-4"], "Values of γ at the end."
)


def main(argv: list[str]) -> None:
    """Trains and prints."""
    del argv
    rows = []
    for gamma in _GAMMAS.value:
        config = _CONFIG.value.copy_and_resolve_references()
        config.game.gamma_final = float(gamma)
        config.train.picture_every = 0
        config.train.tensorboard = False
        workdir = Path(_WORKDIR.value) / gamma
        run_directory.check(workdir, config)  # Refuses a run of another config.
        if (workdir / run_directory.REPORT_FILE).exists():
            report = json.loads((workdir / run_directory.REPORT_FILE).read_text())
        else:
            report = train.train(config, workdir)
        rows.append((gamma, report["figures"]))
    print("| γ at the end | modes | high quality | density, JS (nats) | sliced W2 |")
    print("| --- | --- | --- | --- | --- |")
    for gamma, figures in rows:
        print(
            f"| {gamma} | {figures['modes_found']}/{figures['modes']} "
            f"| {figures['high_quality']:.1%} | {figures['jensen_shannon']:.3f} "
            f"| {figures['sliced_wasserstein']:.3f} |"
        )


if __name__ == "__main__":
    app.run(main)
