"""Writes a trace of a few training steps, and prints their ten costliest operations.

  python benchmarks/trace_step.py --config=configs/photos32.py --batch=8 --out=trace
  python benchmarks/trace_step.py --config=configs/cifar10.py --batch=256 \
      --dtype=bfloat16 --steps=10 --out=trace

The folder opens in XProf, TensorBoard's profiler or Perfetto. An operation is an
instruction of the compiled program; its time is its own, without that of instructions
inside it (a loop's body), summed over devices, threads and dispatches.
"""

import collections
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from ml_collections import config_flags
from steps import prepare, virtual_devices
from timing import device_name

from ddaebm_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py", "The recipe.")
_BATCH = flags.DEFINE_integer("batch", 4, "Examples a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Default: the recipe's."
)
_STEPS = flags.DEFINE_integer("steps", 1, "K, steps a dispatch.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "Over which the batch is split; 0: all.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Dispatches traced.", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 10, "Operations printed.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Where the trace goes; default: a new folder.")


class Operation(NamedTuple):
    """An instruction of a compiled program, over a whole trace.

    Attributes:
      name: of the instruction; of the kernel where the trace has no instruction.
      nanoseconds: its own time.
      count: how often it ran.
    """

    name: str
    nanoseconds: float
    count: int


def read_operations(folder: str | Path) -> list[Operation]:
    """Returns the operations of the newest trace in a folder, costliest first.

    Raises:
      FileNotFoundError: if there is no trace.
      ValueError: if it names no operations.
    """
    paths = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise FileNotFoundError(f"no *.xplane.pb below {folder}")
    planes = list(jax.profiler.ProfileData.from_file(str(paths[-1])).planes)
    # Of an accelerator only what ran there: the host's events repeat its operations.
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for chosen in (devices, planes):
        seconds, counts = collections.Counter(), collections.Counter()
        for plane in chosen:
            for line in plane.lines:
                for name, own in _own_times(_events(plane.name, line)):
                    seconds[name] += own
                    counts[name] += 1
        if seconds:
            return [Operation(n, ns, counts[n]) for n, ns in seconds.most_common()]
    raise ValueError(f"{paths[-1]} names no operations")


Event = tuple[float, float, str]  # Start, end, name.


def _events(plane: str, line: Any) -> Iterator[Event]:
    """Yields the operations on a line; lines of steps, scopes and names have none."""
    on_tpu = plane.startswith("/device:TPU")
    for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op")
        if name is None and on_tpu and line.name == "XLA Ops":
            # The event's name is the whole instruction, "%name = …".
            name = event.name.split(" = ")[0].lstrip("%")
        elif name is None and "correlation_id" in stats and plane.startswith("/device"):
            name = event.name  # A kernel of a command buffer.
        if name is not None:
            yield event.start_ns, event.start_ns + event.duration_ns, str(name)


def _own_times(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Yields each event's name and time without the events inside it."""
    open_: list[list[Any]] = []  # End, name, own time; each inside the one before.
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            yield tuple(open_.pop()[1:])
        if open_:
            open_[-1][2] -= end - start
        open_.append([end, name, end - start])
    while open_:
        yield tuple(open_.pop()[1:])


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)


def describe(text: str) -> dict[str, tuple[str, str]]:
    """Returns instruction → (kind, where in the model it comes from).

    Args:
      text: a compiled program, `jax.stages.Compiled.as_text()`.
    """
    found = {}
    for name, rest in _INSTRUCTION.findall(text):
        kind = re.search(r"([a-z][\w\-]*)\(", re.sub(r"/\*.*?\*/", "", rest))
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        source = re.search(r'op_name="([^"]*)"', rest)
        found[name] = (
            target[1] if target else kind[1] if kind else "",
            re.sub(r"^jit\([^)]*\)/", "", source[1]) if source else "",
        )
    return found


def main(argv: list[str]) -> None:
    """Traces and prints."""
    del argv
    virtual_devices(max(1, _DEVICES.value))
    config = _CONFIG.value
    config.data.batch_size = _BATCH.value
    config.parallel.num_devices = _DEVICES.value
    if _DTYPE.value is not None:
        config.model.dtype = _DTYPE.value
    config_lib.validate(config)
    prepared = prepare(config, _STEPS.value)
    compiled = prepared.traced.lower().compile()
    state, *inputs = prepared.inputs
    mesh = prepared.mesh
    del prepared
    for _ in range(2):  # Warm up.
        state, *told = compiled(state, *inputs)
    jax.block_until_ready(told)
    out = _OUT.value or tempfile.mkdtemp(prefix="ddaebm-trace-")
    start = time.perf_counter()
    with jax.profiler.trace(out):
        for step in range(_REPEATS.value):
            with jax.profiler.StepTraceAnnotation("dispatch", step_num=step):
                state, *told = compiled(state, *inputs)
                jax.block_until_ready(told)
        seconds = time.perf_counter() - start

    operations, known = read_operations(out), describe(compiled.as_text())
    total = sum(operation.nanoseconds for operation in operations)
    print(
        f"{device_name()}, jax {jax.__version__}; {config.model.dtype}, batch "
        f"{config.data.batch_size} on {mesh.size}, {_REPEATS.value} dispatches of "
        f"{_STEPS.value}"
    )
    print(
        f"trace in {out}: {seconds:.3f} s by the clock, {total / 1e9:.3f} s in "
        f"{len(operations)} operations"
    )
    _print("by kind", _by_kind(operations, known), total, {})
    print()
    _print("operation", operations, total, known)


def _by_kind(operations: list[Operation], known: dict[str, Any]) -> list[Operation]:
    kinds: dict[str, Operation] = {}
    for name, nanoseconds, count in operations:
        kind = known.get(name, ("not in the program", ""))[0]
        if kind == "fusion":
            kind = re.sub(r"[.\d]+$", "", name)
        _, before, times = kinds.get(kind, (kind, 0.0, 0))
        kinds[kind] = Operation(kind, before + nanoseconds, times + count)
    return sorted(kinds.values(), key=lambda one: -one.nanoseconds)


def _print(
    title: str, operations: list[Operation], total: float, known: dict[str, Any]
) -> None:
    shown = operations[: _TOP.value]
    width = max(len(title), *(len(operation.name) for operation in shown))
    print(f"{title:<{width}} {'ms':>10} {'share':>6} {'count':>6}", end="")
    print("  kind, where it comes from" if known else "")
    for name, nanoseconds, count in shown:
        row = f"{name:<{width}} {nanoseconds / 1e6:>10.2f}"
        row += f" {nanoseconds / total:>6.1%} {count:>6}"
        print("  ".join([row, ", ".join(filter(None, known.get(name, ())))]).rstrip())


if __name__ == "__main__":
    app.run(main)
