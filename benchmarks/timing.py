"""What the benchmarks share: timing, counting work, and the device's matmul rate.

Two counts of a program's work. `counted_flops` is XLA's, of the compiled program: all
arithmetic, but nothing of what a library is called for, such as a GPU's convolutions.
`counted_work` is ours, of the program as it was written: two for each multiply-add of
convolutions and matrix products and nothing else, so the same on every device.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Of a compiled program's text: an array's type and shape, and an instruction.
_BITS = re.compile(r"\b(?:pred|[sufbc]+(\d+))\w*\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
# They run no kernel.
_FREE = "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"


def median_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Returns the median time of a call, its result awaited, after one warm-up."""
    return interleaved_seconds({"": run}, repeats)[""]


def interleaved_seconds(
    runs: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, float]:
    """Returns the median time of each call, as `median_seconds`.

    The calls take turns, so that what else the machine does meets all of them alike.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_rate(size: int = 0, dtype: Any = jnp.float32) -> float:
    """Returns one device's own rate of square matrix products, FLOP/s.

    Args:
      size: of a side; 0: large enough that the time of a call does not count.
      dtype: of the matrices.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(a, a))


def counted_flops(compiled: Any) -> float:
    """Returns the floating-point operations of a compiled program, as XLA counts.

    Of one device's program; the body of a loop counts once.
    """
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def counted_work(jaxpr: Any) -> int:
    """Returns the work of a traced program on all devices together, in FLOP.

    Two for each multiply-add of convolutions and matrix products. Taps on zeros, which
    padding or dilation put there, do not count, nor does what nothing uses. A scan
    counts its length times, a cond its dearest branch; the body of a while loop, whose
    length is not known, once.

    Args:
      jaxpr: of `jax.make_jaxpr(f)(…)` or `jax.jit(f).trace(…).jaxpr`.
    """
    return sum(work_by_equation(jaxpr).values())


def work_by_equation(jaxpr: Any) -> dict[tuple[str, str], int]:
    """Returns `counted_work` by (where, primitive).

    `where` is the path of names and transformations under which an equation was
    traced, for example `transpose(jvp(Energy))/trunk/conv_in`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found: dict[tuple[str, str], int] = {}
    equations, _ = _work(jaxpr, [True] * len(jaxpr.outvars), "", 1)
    for where, primitive, work in equations:
        found[where, primitive] = found.get((where, primitive), 0) + work
    return found


# Primitives whose program's inputs and outputs are their own, one by one.
_CALLS = ("jit", "remat2", "custom_jvp_call", "custom_vjp_call", "shard_map")


def _work(
    jaxpr: Any, used: list[bool], prefix: str, times: int
) -> tuple[list[tuple[str, str, int]], list[bool]]:
    """Returns (where, primitive, work) of what is used, and which inputs that needs."""
    live = {
        out
        for out, use in zip(jaxpr.outvars, used, strict=True)
        if use and not isinstance(out, Literal)
    }
    found = []
    for equation in reversed(jaxpr.eqns):
        wanted = [out in live for out in equation.outvars]
        if not any(wanted) and not equation.effects:
            continue
        name, params = equation.primitive.name, equation.params
        own = str(equation.source_info.name_stack)
        where = "/".join(part for part in (prefix, own) if part)
        needed = [True] * len(equation.invars)
        if name == "conv_general_dilated":
            found.append((where, name, times * _convolution_work(equation)))
        elif name == "dot_general":
            found.append((where, name, times * _product_work(equation)))
        else:
            inner = times
            if name == "scan":
                inner *= params["length"]
            elif name == "shard_map":
                inner *= params["mesh"].size
            parts = []
            for program in _programs(params):
                outs = [True] * len(program.outvars)
                is_call = name in _CALLS and len(outs) == len(wanted)
                part, ins = _work(program, wanted if is_call else outs, where, inner)
                parts.append(part)
                if is_call and len(ins) == len(needed):
                    needed = ins
            if name == "cond":
                parts = [max(parts, key=lambda part: sum(work for *_, work in part))]
            found += [row for part in parts for row in part]
        live |= {
            variable
            for variable, need in zip(equation.invars, needed, strict=True)
            if need and not isinstance(variable, Literal)
        }
    return found, [variable in live for variable in jaxpr.invars]


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            program = getattr(one, "jaxpr", one)
            if hasattr(program, "eqns"):
                yield program


def _product_work(equation: Any) -> int:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(left[axis] for axis in contracted)
    return 2 * terms * math.prod(equation.outvars[0].aval.shape)


def _convolution_work(equation: Any) -> int:
    params = equation.params
    lhs, rhs = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    axes = params["dimension_numbers"]
    # The kernel's own input features are one group's; a group of the batch is one
    # group of the output's features. So neither count of groups comes in again.
    pairs = out[axes.out_spec[0]] * out[axes.out_spec[1]] * rhs[axes.rhs_spec[1]]
    for i, (before, _) in enumerate(params["padding"]):
        pairs *= _taps(
            lhs[axes.lhs_spec[2 + i]],
            rhs[axes.rhs_spec[2 + i]],
            out[axes.out_spec[2 + i]],
            before,
            params["window_strides"][i],
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
    return 2 * pairs


def _taps(
    length: int,
    kernel: int,
    outputs: int,
    before: int,
    stride: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Counts the (output, tap) pairs of one axis that meet a number of the input."""
    place = np.arange(outputs)[:, None] * stride - before
    place = place + np.arange(kernel)[None, :] * rhs_dilation
    inside = (place >= 0) & (place <= (length - 1) * lhs_dilation)
    return int((inside & (place % lhs_dilation == 0)).sum())


def device_name() -> str:
    """Returns how many devices of which kind there are."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Prints names and values, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


class Kernel(NamedTuple):
    """An instruction that runs a kernel: its kind, and the bytes it is given."""

    kind: str
    num_bytes: int


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a compiled program, `jax.stages.Compiled.as_text()`.

    Those of its entry computation.
    """
    entry = text[re.search(r"^ENTRY ", text, re.MULTILINE).start() :]
    shapes, found = {}, []
    for line in entry.splitlines()[1:]:
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        name, shape, kind, rest = match.groups()
        shapes[name] = _num_bytes(shape)
        if kind in _FREE:
            continue
        if kind == "fusion":
            kind = re.sub(r"[.\d]+$", "", name)
        elif target := re.search(r'custom_call_target="([^"]*)"', line):
            kind = target[1]
        operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
        total = shapes[name] + sum(shapes.get(operand, 0) for operand in operands)
        found.append(Kernel(kind, total))
    return found


def _num_bytes(shape: str) -> int:
    """Returns the size of an array, or of a tuple of arrays, as XLA writes it."""
    return sum(
        int(bits or 8) // 8 * math.prod(int(side) for side in sides.split(",") if side)
        for bits, sides in _BITS.findall(shape)
    )
