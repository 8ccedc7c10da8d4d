"""Checksums of arrays that do not depend on where the arrays lie.

An array is read as 32-bit words in the order of its elements. Every word is mixed with
its position by a bijection; the sum of the results and their sum with odd weights, both
mod 2³², are the checksum. A single changed word changes both sums; anything else goes
unnoticed with probability 2⁻⁶⁴. Sums do not care for their order, so devices that hold
an array's parts each add up their own.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

# Odd constants whose bits are spread: 2³² by the golden ratio, and the two of a
# well-tried integer hash (shifts 16, 15, 16).
_POSITION, _FIRST, _SECOND = (
    np.uint32(c) for c in (0x9E3779B9, 0x7FEB352D, 0x846CA68B)
)
# NumPy goes through an array in pieces that stay in a processor's cache.
_PIECE = 2**16


def _mixed(words: Any, position: Any) -> tuple[Any, Any]:
    """Returns each word's part in the two sums."""
    x = words ^ (position * _POSITION)
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    x = x ^ (x >> 16)
    return x, x * (position * np.uint32(2) + np.uint32(1))


def of_numpy(array: Shaped[np.ndarray, "..."]) -> tuple[int, int]:
    """Returns a NumPy array's checksum: its two sums."""
    flat = np.ascontiguousarray(array).reshape(-1)
    width = flat.dtype.itemsize
    flat = flat.view(np.uint32 if width >= 4 else f"u{width}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, flat.size, _PIECE):
        words = flat[start : start + _PIECE].astype(np.uint32)
        # Positions wrap, as they do on a device.
        first = np.uint32(start % 2**32)
        position = np.arange(words.size, dtype=np.uint32) + first
        parts = _mixed(words, position)
        sums += np.array([part.sum(dtype=np.uint32) for part in parts])
    return int(sums[0]), int(sums[1])


def _words(array: Array) -> UInt32[Array, "..."]:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = array.dtype.itemsize
    if width >= 4:  # 64 bits become two words, the low one first, on a new last axis.
        return lax.bitcast_convert_type(array, jnp.uint32)
    unsigned = jnp.uint8 if width == 1 else jnp.uint16
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _sums(array: Array) -> UInt32[Array, "2"]:
    words = _words(array)
    # By axis, not by a reshape, which would bring the parts of a split array together.
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        own = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * np.uint32(size % 2**32) + own
    return jnp.stack([part.sum(dtype=jnp.uint32) for part in _mixed(words, position)])


@functools.cache
def _on_device(result: NamedSharding | None) -> Any:
    """Returns the jitted sums; compiled once a shape, of which a state has few."""
    return jax.jit(_sums, out_shardings=result)


def of_device(array: Array) -> UInt32[Array, "2"]:
    """Returns an array's checksum, computed by the devices that hold it.

    With several processes all must call this; each can read the result.
    """
    whole = None
    if isinstance(array.sharding, NamedSharding):
        whole = NamedSharding(array.sharding.mesh, PartitionSpec())
    return _on_device(whole)(array)


def _in_host_memory(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(
        device.platform == "cpu" for device in leaf.devices()
    )


def name_of(path: tuple[Any, ...]) -> str:
    """Returns a leaf's name, such as `variables/energy/params/w`.

    It is the same whether a node is a dict, a tuple or a dataclass, so that a tree read
    without knowledge of its classes has the same names.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def described(tree: Any) -> dict[str, str]:
    """Returns each leaf's type, such as `float32[2,3]`; of arrays, or their shapes."""
    return {
        name_of(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def of_tree(tree: Any) -> dict[str, str]:
    """Returns name → `type checksum` of every leaf.

    Arrays of accelerators, and of several processes, are not fetched. With several
    processes all must call this.

    Args:
      tree: of NumPy's or JAX's arrays; no PRNG keys.
    """
    sums = [
        of_numpy(np.asarray(leaf)) if _in_host_memory(leaf) else of_device(leaf)
        for leaf in jax.tree.leaves(tree)
    ]
    return {
        name: f"{kind} {int(first):08x}{int(second):08x}"
        for (name, kind), (first, second) in zip(
            described(tree).items(), jax.device_get(sums), strict=True
        )
    }


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Returns in words where two of `described` or `of_tree` differ; None: nowhere."""
    for name in sorted(expected.keys() | found.keys()):
        one, other = expected.get(name), found.get(name)
        if other is None:
            return f"{name} is missing"
        if one is None:
            return f"{name} is not expected"
        if one != other:
            return f"{name} is {other}, not {one}"
    return None
