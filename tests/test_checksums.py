"""A checksum depends on every bit of an array, and not on where the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddaebm_jax import sharding as parallel
from ddaebm_jax.training import checksums

_DTYPES = ("float32", "int32", "bfloat16", "float16", "int8", "uint8", "bool", "uint16")
_WIDE = ("float64", "int64")


def _values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = 100 * np.random.default_rng(0).normal(size=shape)
    return np.asarray(jnp.asarray(values).astype(dtype))


@pytest.mark.parametrize("dtype", _DTYPES + _WIDE)
def test_device_and_numpy_agree(dtype: str):
    with jax.enable_x64(dtype in _WIDE):
        for shape in ((), (0,), (5,), (3, 4, 5), (2**16 + 3, 2)):
            array = _values(dtype, shape)
            on_device = checksums.of_device(jnp.asarray(array))
            assert checksums.of_numpy(array) == tuple(map(int, on_device)), shape


def test_parts_on_several_devices_give_the_checksum_of_the_whole():
    mesh = parallel.make_mesh(0)
    array = _values("float32", (24, 1024))
    expected = checksums.of_numpy(array)
    for sharding in (
        parallel.replicated(mesh),
        parallel.fully_sharded(mesh, array.shape),
    ):
        placed = parallel.put(array, sharding)
        assert tuple(map(int, checksums.of_device(placed))) == expected


def test_every_flipped_bit_changes_both_sums():
    array = _values("float32", (7, 11))
    expected = checksums.of_numpy(array)
    for bit in range(array.size * 32):
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        found = checksums.of_numpy(flipped)
        assert found[0] != expected[0] and found[1] != expected[1]


def test_order_and_pairs_of_signs_matter():
    """What sums of words alone, or linear ones, would not see."""
    array = _values("float32", (64,))
    expected = checksums.of_numpy(array)
    assert checksums.of_numpy(array[::-1]) != expected
    signs = array.copy()
    signs[[3, 40]] *= -1
    assert checksums.of_numpy(signs) != expected


def test_names_do_not_depend_on_the_kind_of_node():
    tree = {"a": (jnp.zeros(2), {"b": jnp.zeros((3, 1), jnp.int32)})}
    plain = {"a": [np.zeros(2, "f"), {"b": np.zeros((3, 1), "i")}]}
    assert checksums.described(tree) == {"a/0": "float32[2]", "a/1/b": "int32[3,1]"}
    assert checksums.of_tree(tree) == checksums.of_tree(plain)


def test_a_difference_is_named():
    one = {"a": "float32[2]", "b": "float32[3]"}
    assert checksums.difference(one, dict(one)) is None
    other = {"a": "float32[2]", "b": "float32[4]"}
    assert checksums.difference(one, other) == "b is float32[4], not float32[3]"
    assert checksums.difference(one, {"a": "float32[2]"}) == "b is missing"
    assert "b is not expected" == checksums.difference({"a": "float32[2]"}, one)
