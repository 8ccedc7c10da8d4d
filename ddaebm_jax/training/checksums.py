"""Checksums of arrays, computed by the devices that hold them.

Every 32-bit word of an array is mixed with its position by a bijection. The checksum is
the sum of the results and their sum with odd weights, both mod 2³²: one changed word
changes both, anything else goes unnoticed with probability 2⁻⁶⁴. Sums commute, so that
it does not matter how the array is split over devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

# Odd constants of well-spread bits: 2³² over the golden ratio, and the multipliers of
# an integer hash (shifts 16, 15, 16).
_POSITION, _FIRST, _SECOND = map(np.uint32, (0x9E3779B9, 0x7FEB352D, 0x846CA68B))


@functools.partial(jax.jit, static_argnames="mesh")
def _sums(array: Array, mesh: Mesh | None) -> UInt32[Array, "2"]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # 64 bits become two words, the low one first, on a new last axis.
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    x = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    # Axis by axis: a reshape would gather the parts of a split array.
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position * np.uint32(size % 2**32) + index
    x = x ^ (position * _POSITION)
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    x = x ^ (x >> 16)
    weighted = x * (position * np.uint32(2) + np.uint32(1))
    sums = jnp.stack([x.sum(dtype=jnp.uint32), weighted.sum(dtype=jnp.uint32)])
    if mesh is None:
        return sums
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))


def described(tree: Any) -> dict[str, str]:
    """Returns name → type of every leaf, in any kind of node: w/0 → float32[2,3]."""
    named = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {
        named(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def of_tree(tree: Any) -> dict[str, str]:
    """Returns name → checksum of every array, in hexadecimal; see `described`."""
    sums = []
    for leaf in jax.tree.leaves(tree):
        array = jnp.asarray(leaf)
        sums.append(_sums(array, getattr(array.sharding, "mesh", None)))
        if not isinstance(leaf, jax.Array):  # One at a time, as a copy is made.
            jax.block_until_ready(sums[-1])
    texts = ("".join(f"{one:08x}" for one in pair) for pair in jax.device_get(sums))
    return dict(zip(described(tree), texts, strict=True))
