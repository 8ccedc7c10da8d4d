"""Conversion of PyTorch's named weights to Flax's nested dicts."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from ddaebm_jax.errors import InputError, listed


def select_float32(
    arrays: Mapping[str, Shaped[np.ndarray, "..."]],
    names: Collection[str],
    origin: str,
    remedy: str,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return the weights of exactly these names as finite float32.

    Args:
      arrays: the content of a file, by name.
      names: of all the weights that the file should hold.
      origin: name of the file in error messages.
      remedy: end of the error messages: what to try.

    Raises:
      InputError: naming weights that are missing, unknown, not floating-point numbers,
        or not finite.
    """
    missing = [name for name in names if name not in arrays]
    unknown = [name for name in arrays if name not in names]
    if missing or unknown:
        faults = {"missing": missing, "unknown": unknown}
        found = "; ".join(f"{key}: {listed(v, 5)}" for key, v in faults.items() if v)
        raise InputError(f"{origin}: {found}; {remedy}")
    selected = {}
    for name in names:
        dtype = arrays[name].dtype
        if not np.issubdtype(dtype, np.floating):
            raise InputError(
                f"{origin}: {name} holds {dtype}; floating-point numbers are needed; "
                f"{remedy}"
            )
        with np.errstate(over="ignore"):
            selected[name] = np.asarray(arrays[name], np.float32)
        if not np.isfinite(selected[name]).all():
            raise InputError(
                f"{origin}: {name} holds NaN, Inf, or more than float32 can; {remedy}"
            )
    return selected


def to_flax(
    arrays: Mapping[str, Float[np.ndarray, "..."]],
    paths: Mapping[str, tuple[str, ...]],
    shapes: Any,
    origin: str,
    remedy: str,
) -> dict:
    """Return weights as a nested dict in Flax's layout.

    Kernels of convolutions go from OIHW to HWIO, `weight`s of Dense layers from
    [out, in] to [in, out]; all else stays, as the U-Net's `W`, which are [in, out].

    Args:
      arrays: PyTorch's names → weights.
      paths: PyTorch's names → paths in the result.
      shapes: the result, with anything that has a shape in the place of arrays.
      origin: name of the file in error messages.
      remedy: end of the error messages: what to try.

    Raises:
      InputError: naming weights of another shape.
    """
    tree: dict = {}
    for name, path in paths.items():
        expected, node = shapes, tree
        for part in path[:-1]:
            expected, node = expected[part], node.setdefault(part, {})
        shape = expected[path[-1]].shape
        axes = _torch_axes(name, len(shape))
        torch_shape = tuple(shape[axis] for axis in axes)
        if arrays[name].shape != torch_shape:
            raise InputError(
                f"{origin}: {name} has shape {format_shape(arrays[name].shape)}; "
                f"{format_shape(torch_shape)} is needed for {'/'.join(path)}; {remedy}"
            )
        converted = arrays[name].transpose(np.argsort(axes))
        node[path[-1]] = np.ascontiguousarray(converted)
    return tree


def _torch_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Return which of Flax's axes each of PyTorch's is."""
    if ndim == 4:
        return (3, 2, 0, 1)
    return (1, 0) if ndim == 2 and name.endswith("weight") else tuple(range(ndim))


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as part of a message, `64×3×3×3`."""
    return "×".join(map(str, shape)) or "a scalar"
