"""What devices tell each other in a data-parallel step, and predicted weak scaling.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --config=configs/cifar10.py --batch=1 --devices=1,8
  python benchmarks/scaling.py --devices= --share=0.5 --predict=configs/celeba64.py

First, for 1, 2, 4 and 8 devices (virtual ones on a CPU), the step of a recipe is
compiled as training compiles it, with a constant batch on each device, and its
collectives are read in the compiled program. Nothing is run: virtual devices share the
cores, so their times would say nothing.

Then, for another recipe and for machines that are not here, weak scaling is PREDICTED
from bytes of parameters, work and published rates; nothing of it is measured.
"""

import math
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from absl import app, flags
from ml_collections import config_flags
from steps import abstract, prepare, virtual_devices
from timing import counted_flops, counted_work, device_name

from ddaebm_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/digits.py", "The recipe that is compiled."
)
_BATCH = flags.DEFINE_integer("batch", 4, "Examples a device, compiled.", lower_bound=1)
_DEVICES = flags.DEFINE_list(
    "devices", ["1", "2", "4", "8"], "How many; empty: compile nothing."
)
_PREDICT = config_flags.DEFINE_config_file(
    "predict", "configs/cifar10.py", "The image recipe that is predicted."
)
_PREDICT_BATCH = flags.DEFINE_integer(
    "predict_batch", 64, "Images a device, predicted.", lower_bound=1
)
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", None, "A measured step of one device; default: from --share."
)
_SHARE = flags.DEFINE_float(
    "share", 0.4, "Assumed share of the published bfloat16 peak.", 0.0, 1.0
)

# The compiled program.

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# An instruction's result comes between "=" and its name. Of an asynchronous pair the
# start counts; the done has another name.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def _array_bytes(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns kind → (how many, bytes of their results on one device).

    Args:
      text: a compiled program, `jax.stages.Compiled.as_text()`. What is inside a loop
        counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    for result, kind, start in _COLLECTIVE.findall(text):
        sizes = [_array_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind == "collective-permute":
            sizes = sizes[1:2]  # Operand, result, and two tokens.
        elif start and kind != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]  # Operands, then results.
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + sum(sizes)
    return found


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _parameters(state: Any) -> Any:
    return [variables["params"] for variables in state.variables]


def print_table(rows: Iterable[Iterable[str]]) -> None:
    """Prints rows of cells: the first column to the left, the others to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = map("{:>{}}".format, rest, widths[1:])
        print("  ".join([f"{first:<{widths[0]}}", *cells]))


def _compile(config: Any, counts: list[int]) -> None:
    print(
        f"compiled for {device_name()}, jax {jax.__version__}; {_BATCH.value} a device"
    )
    rows = [
        (
            "devices",
            "compile s",
            "GFLOP a device",
            "XLA's count",
            "bytes / parameters",
            "collectives",
        )
    ]
    for count in counts:
        config.parallel.num_devices = count
        config.data.batch_size = _BATCH.value * count
        prepared = prepare(config)
        start = time.perf_counter()
        compiled = prepared.traced.lower().compile()
        seconds = time.perf_counter() - start
        found = collectives(compiled.as_text())
        told = "; ".join(
            f"{number} {kind}, {size / 2**20:.2f} MiB"
            for kind, (number, size) in sorted(found.items())
        )
        size = _bytes(_parameters(prepared.inputs[0]))
        rows.append(
            (
                str(count),
                f"{seconds:.1f}",
                f"{counted_work(prepared.traced.jaxpr) / count / 1e9:.3f}",
                f"{counted_flops(compiled) / 1e9:.3f}",
                f"{sum(part for _, part in found.values()) / size:.2f}",
                told or "none",
            )
        )
    print_table(rows)
    print(f"parameters of the three networks: {size / 2**20:.2f} MiB")


# Predictions.


class Machine(NamedTuple):
    """Some devices of one kind, and how each is wired to the others.

    Attributes:
      name: kind and shape.
      devices: how many.
      peak: FLOP/s of a device, dense bfloat16.
      sends: bytes/s that a device can send to the others.
    """

    name: str
    devices: int
    peak: float
    sends: float


# TPU v4: https://cloud.google.com/tpu/docs/v4 gives 275 TFLOP/s and a 3-D mesh, a torus
# from 4×4×4 on; below it, in 2×2×2, a chip has 3 neighbours. 50 GB/s a link and
# direction is NOT on that page; its bisection of 24 TB/s, over the 512 links across the
# middle of a pod of 16×16×16, is 47.
# TPU v5e: https://cloud.google.com/tpu/docs/v5e gives 197 TFLOP/s, a 2-D torus of 256
# chips, 4 links and 400 GB/s a chip both ways together: 50 GB/s a link and direction.
# That smaller slices do not wrap around is NOT on that page, but an assumption; then
# a corner has 2 links, and a ring goes at its pace.
# H100: https://www.nvidia.com/en-us/technologies/hopper-architecture/ gives 900 GB/s of
# NVLink both ways together. 989 TFLOP/s, NOT on that page, is half of 1,979 "with
# sparsity" of the data sheet.
_LINK = 50e9
_MACHINES = (
    Machine("TPU v4 2×2×2", 8, 275e12, 3 * _LINK),
    Machine("TPU v4 4×4×4", 64, 275e12, 6 * _LINK),
    Machine("TPU v4 8×8×8", 512, 275e12, 6 * _LINK),
    Machine("TPU v5e 2×4", 8, 197e12, 2 * _LINK),
    Machine("TPU v5e 8×8", 64, 197e12, 2 * _LINK),
    Machine("TPU v5e 16×16", 256, 197e12, 4 * _LINK),
    Machine("H100 NVLink", 2, 989e12, 450e9),
    Machine("H100 NVLink", 4, 989e12, 450e9),
    Machine("H100 NVLink", 8, 989e12, 450e9),
)


def _predict(config: Any) -> None:
    batch = config.data.batch_size = _PREDICT_BATCH.value
    jaxpr, state = abstract(config)
    work, size = counted_work(jaxpr), _bytes(_parameters(state))
    if _STEP_SECONDS.value is None:
        said = f"work / ({_SHARE.value:.0%} of the published peak), an ASSUMED share"
    else:
        said = f"{_STEP_SECONDS.value} s, as given, on every machine"
    print(
        f"PREDICTED weak scaling, not measured: {batch} images a device, "
        f"{work / 1e12:.2f} TFLOP a device and step, {size / 1e6:.1f} MB of gradients"
    )
    print(f"  compute C = {said}")
    print("  exchange E = 2·(n−1)/n · bytes / (bytes/s that a device sends): a ring")
    print("  bytes: of each gradient once; a compiled program may send more, see above")
    print("  efficiency: at worst C / (C + E), no overlap; at best C / max(C, E), full")
    print("  left out: latencies, the input, and that large batches train differently")
    rows = [
        ("PREDICTION", "n", "GB/s sent", "C ms", "E ms", "worst", "best", "images/s")
    ]
    for name, n, peak, sends in _MACHINES:
        compute = _STEP_SECONDS.value or work / (_SHARE.value * peak)
        exchange = 2 * (n - 1) / n * size / sends
        low, high = compute + exchange, max(compute, exchange)
        rows.append(
            (
                name,
                str(n),
                f"{sends / 1e9:.0f}",
                f"{compute * 1e3:.1f}",
                f"{exchange * 1e3:.2f}",
                f"{compute / low:.1%}",
                f"{compute / high:.1%}",
                f"{n * batch / low:.0f}–{n * batch / high:.0f}",
            )
        )
    print_table(rows)
    print(
        "rates: cloud.google.com/tpu/docs/v4 and /v5e, "
        "nvidia.com/en-us/technologies/hopper-architecture\n"
        "not confirmed there: 50 GB/s a link of v4 (their bisection gives 47), that "
        "small v5e\nslices do not wrap around, 989 TFLOP/s of an H100 without sparsity"
    )


def main(argv: list[str]) -> None:
    """Compiles, predicts and prints."""
    del argv
    virtual_devices(8)
    config_lib.validate(_PREDICT.value)
    counts = [int(count) for count in _DEVICES.value if count]
    counts = [count for count in counts if count <= jax.device_count()]
    if counts:
        _compile(_CONFIG.value, counts)
        print()
    _predict(_PREDICT.value)


if __name__ == "__main__":
    app.run(main)
