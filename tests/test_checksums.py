"""A checksum depends on every bit of an array, and not on where the array lies."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import x64

from ddaebm_jax import sharding
from ddaebm_jax.training import checksums

_DTYPES = ("float32", "int32", "bfloat16", "float16", "int8", "uint8", "bool", "uint16")
_WIDE = ("float64", "int64")


def _values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = 100 * np.random.default_rng(0).normal(size=shape)
    return np.asarray(jnp.asarray(values).astype(dtype))


def _checksum(array: np.ndarray) -> tuple[int, int]:
    text = checksums.of_tree(array)[""]
    return int(text[:8], 16), int(text[8:], 16)


def _by_definition(array: np.ndarray) -> tuple[int, int]:
    """The two sums in whole numbers, word by word."""
    width = array.dtype.itemsize
    words = array.reshape(-1).view(np.uint32 if width >= 4 else f"u{width}")
    first = second = 0
    for position, word in enumerate(words.tolist()):
        x = word ^ position * 0x9E3779B9 % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        x ^= x >> 16
        first, second = first + x, second + x * (2 * position + 1)
    return first % 2**32, second % 2**32


@pytest.mark.parametrize("dtype", _DTYPES + _WIDE)
def test_the_checksum_follows_its_definition(dtype: str):
    with x64(dtype in _WIDE):
        for shape in ((), (0,), (5,), (3, 4, 5)):
            array = _values(dtype, shape)
            assert _checksum(array) == _by_definition(array), shape


def test_parts_on_several_devices_give_the_checksum_of_the_whole():
    mesh = sharding.make_mesh(0)
    array = _values("float32", (24, 1024))
    for layout in (
        sharding.replicated(mesh),
        sharding.fully_sharded(mesh, array.shape),
    ):
        assert _checksum(sharding.put(array, layout)) == _checksum(array)


def test_every_flipped_bit_changes_both_sums():
    array = _values("float32", (7, 3))
    expected = _checksum(array)
    for bit in range(array.size * 32):
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        found = _checksum(flipped)
        assert found[0] != expected[0] and found[1] != expected[1]


def test_order_and_pairs_of_signs_matter():
    """Sums of words, or linear ones, would not notice them."""
    array = _values("float32", (64,))
    signs = array.copy()
    signs[[3, 40]] *= -1
    assert len({_checksum(one) for one in (array, array[::-1].copy(), signs)}) == 3


def test_names_do_not_depend_on_the_kind_of_node():
    tree = {"a": (jnp.zeros(2), {"b": jnp.zeros((3, 1), jnp.int32)})}
    plain = {"a": [np.zeros(2, "f"), {"b": np.zeros((3, 1), "i")}]}
    assert checksums.described(tree) == {"a/0": "float32[2]", "a/1/b": "int32[3,1]"}
    assert checksums.of_tree(tree) == checksums.of_tree(plain)
