"""Steps per second of a 2-D recipe, and its share of the machine's matmul rate.

  python benchmarks/toy_step.py --config=configs/released_gaussians25.py

The share is the step's work (`timing.counted_work`: its matrix products) over the time
of a step inside a K-step dispatch, divided by the rate of a 2048 × 2048 float32 matrix
product measured in the same run.
"""

import jax
from absl import app, flags
from ml_collections import config_flags
from steps import prepare
from timing import (
    counted_work,
    device_name,
    matmul_rate,
    median_seconds,
    print_rows,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/released_gaussians25.py", "The recipe."
)
_STEPS = flags.DEFINE_integer("steps", 200, "K, steps per dispatch.")


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    config = _CONFIG.value
    config.parallel.num_devices = 1
    one, many = prepare(config), prepare(config, _STEPS.value)
    work = counted_work(one.traced.jaxpr)

    def runner(prepared):
        compiled = prepared.traced.lower().compile()
        held, inputs = [prepared.inputs[0]], prepared.inputs[1:]

        def run():
            # The state is used up; metrics come second.
            held[0], metrics, *_ = compiled(held[0], *inputs)
            return metrics

        return run

    before = matmul_rate()
    seconds = median_seconds(runner(many)) / _STEPS.value
    single_seconds = median_seconds(runner(one), 101)
    peak = max(before, matmul_rate())
    rows = (
        ("device", f"{device_name()}, jax {jax.__version__}"),
        (f"steps/s, {_STEPS.value} a dispatch", f"{1 / seconds:.1f}"),
        ("steps/s, 1 a dispatch", f"{1 / single_seconds:.1f}"),
        ("counted work of a step", f"{work / 1e9:.3f} GFLOP"),
        ("rate reached", f"{work / seconds / 1e9:.1f} GFLOP/s"),
        ("matmul rate of the device", f"{peak / 1e9:.1f} GFLOP/s"),
        ("share", f"{work / seconds / peak:.1%}"),
    )
    print_rows(rows)


if __name__ == "__main__":
    app.run(main)
