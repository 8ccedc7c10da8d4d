"""The image networks: sizes, precision, dropout, and each part against NumPy."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import quick
from helpers import assert_trees_close, differ, filled_like, normals
from jax.sharding import Mesh, PartitionSpec
from released import recipe, reference_config

from ddaebm_jax import models
from ddaebm_jax.config import choices
from ddaebm_jax.models import Players, encoder, layers, ncsnpp, resample

BATCH, SIDE, NZ = 4, 8, 6
TIMES = jnp.array([0, 3, 1, 2])


def tiny(**changes: Any) -> ml_collections.ConfigDict:
    """Return a tiny `model` section with attention, filters and a pyramid."""
    model = reference_config().model
    model.nz = NZ
    model.encoder.t_emb_dim = 8
    model.encoder.ngf = 4
    for field in ("dtype", "remat"):
        if field in changes:
            model[field] = changes.pop(field)
    unet = {
        "nf": 8,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (4,),
        "dropout": 0.0,
        "z_emb_dim": 8,
        "n_mlp": 1,
    }
    model.unet.update({**unet, **changes})
    return model


def trunk_of(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the arguments of a U-Net."""
    others = ("dropout", "z_emb_dim", "n_mlp")
    trunk = {name: model.unet[name] for name in model.unet if name not in others}
    return {**trunk, "dropout_rate": 0.0, "dtype": model.dtype, "remat": model.remat}


@functools.cache
def networks_of(side: int = SIDE, channels: int = 3, **changes: Any) -> models.Networks:
    return models.build(tiny(**changes), (side, side, channels))


@functools.cache
def shapes_of(networks: models.Networks) -> Players:
    return jax.eval_shape(networks.init, jax.random.key(0))


def small_networks(**changes: Any) -> models.Networks:
    """Return networks of one level, the quickest to compile."""
    return networks_of(SIDE, 1, ch_mult=(1,), attn_resolutions=(SIDE,), **changes)


def filled(networks: models.Networks) -> Players:
    return filled_like(shapes_of(networks))


def run(module: Any, *inputs: Any) -> tuple[Any, dict]:
    """Return a module's output, and the parameters it was computed with."""
    variables = filled_like(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return quick.jit(module.apply)(variables, *inputs), variables["params"]


def inputs(channels: int = 3):
    """Return (x_t, x_{t+1}, t), z of a batch."""
    shape = (BATCH, SIDE, SIDE, channels)
    return (normals(0, *shape), normals(1, *shape), TIMES), normals(2, BATCH, NZ)


@functools.cache
def forward_of(networks: models.Networks):
    """Return all three networks as one program."""

    @quick.jit
    def forward(variables, x_t, x_next, t, z, keys=None):
        mean, logvar = networks.posterior(variables.posterior, x_t, x_next, t)
        return {
            "energy": networks.energy(variables.energy, x_t, t, keys),
            "generator": networks.generator(variables.generator, x_next, t, z, keys),
            "mean": mean,
            "logvar": logvar,
        }

    return forward


@pytest.fixture(scope="module")
def plain() -> dict[str, jax.Array]:
    """Outputs of the tiny networks in float32 without dropout."""
    networks = networks_of()
    x, z = inputs()
    return jax.device_get(forward_of(networks)(filled(networks), *x, z))


def test_cifar10_parameter_counts():
    shapes = shapes_of(models.build(recipe("cifar10").model, (32, 32, 3)))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in shapes]
    energy, generator, posterior = 40_279_171, 48_432_515, 4_772_872
    assert Players(*counts) == Players(energy, generator, posterior)


# Resampling and blocks against NumPy in double precision.


def naive_fir(
    x: np.ndarray, up: int, down: int, before: int, after: int, gain: float
) -> np.ndarray:
    """Insert zeros, pad, filter by 4×4 taps, keep every `down`-th pixel."""
    batch, height, width, channels = x.shape
    spread = np.zeros((batch, height * up, width * up, channels))
    spread[:, ::up, ::up] = x
    pads = (before, after)
    spread = np.pad(spread, ((0, 0), pads, pads, (0, 0)))
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64 * gain**2
    height, width = spread.shape[1] - 3, spread.shape[2] - 3
    out = np.zeros((batch, height, width, channels))
    for i, j in itertools.product(range(4), range(4)):
        out += taps[i, j] * spread[:, i : i + height, j : j + width]
    return out[:, ::down, ::down]


@pytest.mark.parametrize("sides", [(1, 2), (2, 5), (7, 3), (8, 4), (6, 9)])
def test_fir_resampling(sides: tuple[int, int]):
    x = normals(0, 2, *sides, 3)
    up, down, filtered = quick.jit(
        lambda x: (resample.fir_up(x), resample.fir_down(x), resample.fir_filter(x))
    )(x)
    for actual, expected, resized in (
        (up, naive_fir(x, 2, 1, 2, 1, 2.0), [2 * side for side in sides]),
        (down, naive_fir(x, 1, 2, 1, 1, 1.0), [side // 2 for side in sides]),
        (filtered, naive_fir(x, 1, 1, 2, 2, 1.0), [side + 1 for side in sides]),
    ):
        assert actual.shape == expected.shape == (2, *resized, 3)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def naive_conv(x: np.ndarray, layer: dict, pad: int, stride: int = 1) -> np.ndarray:
    """Return a convolution as a sum of shifted slices."""
    kernel = np.asarray(layer["kernel"], np.float64)
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    sides = kernel.shape[:2]
    tall, wide = (
        (length - side) // stride + 1
        for length, side in zip(x.shape[1:3], sides, strict=True)
    )
    out = np.zeros((len(x), tall, wide, kernel.shape[3]))
    for i, j in itertools.product(*map(range, sides)):
        window = x[:, i : i + stride * tall : stride, j : j + stride * wide : stride]
        out += window @ kernel[i, j]
    return out + layer.get("bias", 0.0)


def naive_dense(x: np.ndarray, layer: dict) -> np.ndarray:
    return x @ np.asarray(layer["kernel"], np.float64) + layer["bias"]


def naive_norm(x: np.ndarray, groups: int) -> np.ndarray:
    """Return a group norm without an affine function."""
    parts = np.asarray(x, np.float64).reshape(*x.shape[:3], groups, -1)
    mean = parts.mean(axis=(1, 2, 4), keepdims=True)
    var = ((parts - mean) ** 2).mean(axis=(1, 2, 4), keepdims=True)
    return ((parts - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0.0, x, 0.2 * x)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def naive_time(t: jax.Array, dim: int, layers: dict) -> np.ndarray:
    """Return the encoders' time embedding."""
    w = [math.exp(-i * math.log(10000.0) / (dim / 2 - 1)) for i in range(dim // 2)]
    phase = np.outer(t, w)
    h = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
    h = leaky(naive_dense(h, layers["dense_0"]))
    return leaky(naive_dense(h, layers["dense_1"]))


def naive_down_block(x: np.ndarray, time: np.ndarray, layers: dict) -> np.ndarray:
    def halve(x: np.ndarray) -> np.ndarray:
        return naive_fir(x, 1, 2, 1, 1, 1.0)

    h = naive_conv(leaky(x), layers["conv_0"], pad=1)
    h = leaky(h + naive_dense(time, layers["time"])[:, None, None])
    h = naive_conv(halve(h), layers["conv_1"], pad=1)
    return (naive_conv(halve(x), layers["skip"], pad=0) + h) / math.sqrt(2)


def naive_residual_block(
    x: np.ndarray, time: np.ndarray, style: np.ndarray | None, resize: Any, layers: dict
) -> np.ndarray:
    def norm(h: np.ndarray, layer: dict) -> np.ndarray:
        normed = naive_norm(h, h.shape[3] // 4)
        if style is None:
            return normed * layer["scale"] + layer["bias"]
        affine = naive_dense(style, layer["style"])[:, None, None]
        scale, shift = np.split(affine, 2, axis=3)
        return scale * normed + shift

    h = resize(silu(norm(x, layers["norm_0"])))
    h = naive_conv(h, layers["conv_0"], pad=1)
    h = h + naive_dense(time, layers["time"])[:, None, None]
    h = naive_conv(silu(norm(h, layers["norm_1"])), layers["conv_1"], pad=1)
    x = resize(x)
    if "skip" in layers:
        x = naive_conv(x, layers["skip"], pad=0)
    return (x + h) / math.sqrt(2)


NAIVE_RESIZE = {
    None: lambda x: x,
    resample.mean_down: lambda x: sum(
        x[:, i::2, j::2] / 4 for i in range(2) for j in range(2)
    ),
    resample.repeat_up: lambda x: np.kron(x, np.ones((1, 2, 2, 1))),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("resampling", "features"),
    [(None, 8), (None, 12), (resample.mean_down, 8), (resample.repeat_up, 8)],
)
def test_residual_block(resampling: Any, features: int, adaptive: bool):
    module = ncsnpp.ResidualBlock(features, "float32", 0.0, resampling)
    x, time = 2.0 * normals(0, 3, 4, 6, 8) + 0.5, normals(1, 3, 5)
    style = normals(2, 3, 7) if adaptive else None
    actual, params = run(module, x, time, style, None)
    # A 1×1 convolution where the width or the side changes.
    assert ("skip" in params) == (resampling is not None or features != 8)
    x, time, style = jax.device_get((x, time, style))
    expected = naive_residual_block(x, time, style, NAIVE_RESIZE[resampling], params)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_softmax_attention():
    x = 2.0 * normals(0, 2, 2, 3, 8)
    actual, params = run(ncsnpp.Attention("float32"), x)
    # Two groups of four channels.
    h = naive_norm(x, 2).reshape(2, 6, 8)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    query, key, value = (naive_dense(h, params[k]) for k in ("query", "key", "value"))
    logits = np.einsum("bic,bjc->bij", query, key) / np.sqrt(8)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    h = naive_dense(np.einsum("bij,bjc->bic", weights, value), params["out"])
    expected = (x + h.reshape(x.shape)) / np.sqrt(2)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_patch_is_one_position_of_the_u_net():
    x = normals(0, 2, 4, 8, 3)
    patches = ncsnpp.to_patches(x, 2)
    assert patches.shape == (2, 2, 4, 12)
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(12))
    np.testing.assert_array_equal(ncsnpp.from_patches(patches, 2), x)

    trunk = trunk_of(tiny(ch_mult=(1,), attn_resolutions=(), patch_size=2))
    t = jnp.array([0, 3])
    actual, params = run(ncsnpp.UNet(**trunk), x, t)
    network = ncsnpp.UNet(**trunk | {"patch_size": 1})
    expected = quick.jit(network.apply)({"params": params}, patches, t)
    np.testing.assert_allclose(ncsnpp.to_patches(actual, 2), expected, rtol=1e-5)


def test_adaptive_group_norms_start_at_the_identity():
    module = ncsnpp.AdaptiveGroupNorm("float32")
    x, style = normals(0, 3, 2, 2, 8), normals(1, 3, 5)
    start = module.init(jax.random.key(0), x, style)["params"]["style"]
    np.testing.assert_array_equal(start["bias"], [1.0] * 8 + [0.0] * 8)


def test_the_u_net_starts_near_zero():
    """So that f starts near −½‖x‖²."""
    networks = small_networks()
    (x, _, t), _ = inputs(channels=1)

    @quick.jit
    def start(key):
        variables = networks.init(key)
        f = networks.energy(variables.energy, x, t)
        return f, variables.energy["params"], variables.posterior["params"]

    key = jax.random.key(0, impl="unsafe_rbg")  # Compiles fast.
    f, energy, posterior = start(key)
    np.testing.assert_allclose(f, -0.5 * (x**2).sum(axis=(1, 2, 3)), rtol=1e-3)
    for name, layer in energy["trunk"].items():
        if "block" in name:
            assert np.abs(layer["conv_1"]["kernel"]).max() < 1e-4, name
            assert 0.01 < np.abs(layer["conv_0"]["kernel"]).max() < 1.0, name
        if "attention" in name:
            assert np.abs(layer["out"]["kernel"]).max() < 1e-4, name
    for name in ("conv_0", "conv_1", "mu", "logvar"):
        kernel = np.asarray(posterior[name]["kernel"])
        bound = math.prod(kernel.shape[:-1]) ** -0.5
        assert 0.9 * bound < np.abs(kernel).max() <= bound, name
        assert "bias" in posterior[name] or name.startswith("conv"), name


# Invariances and precision.


def test_bfloat16_is_near_float32(plain):
    networks = networks_of(dtype="bfloat16")
    x, z = inputs()
    low = jax.device_get(forward_of(networks)(filled(networks), *x, z))
    assert all(value.dtype == np.float32 for value in low.values())
    np.testing.assert_allclose(low["energy"], plain["energy"], rtol=0.01)
    for name in ("generator", "mean", "logvar"):
        np.testing.assert_allclose(low[name], plain[name], atol=0.05, err_msg=name)
        assert differ(low[name], plain[name]), name


def output_dtypes(module: Any, *args: Any) -> dict[str, set[Any]]:
    """Return the types of each layer's outputs, by the layer's path."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    apply = functools.partial(
        module.apply, capture_intermediates=True, mutable=["intermediates"]
    )
    _, found = jax.eval_shape(apply, shapes, *args)
    dtypes: dict[str, set[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(found["intermediates"]):
        names = [part.key for part in path if hasattr(part, "key")]
        assert names[-1] == "__call__"
        dtypes.setdefault("/".join(names[:-1]), set()).add(leaf.dtype)
    for path, leaf in jax.tree.leaves_with_path(shapes["params"]):
        # Parameters are float32, and all layers that have some are in `dtypes`.
        assert leaf.dtype == jnp.float32, path
        assert "/".join(part.key for part in path[:-1]) in dtypes
    return dtypes


@pytest.mark.parametrize(
    "name", ["energy", "energy_without_fir", "generator", "conv", "residual"]
)
def test_every_layer_computes_in_bfloat16(name: str):
    """But for inputs of sums of squares and exponentials, and the norms' scales."""
    changes = {"energy_without_fir": {"fir": False, "progressive_input": "none"}}
    trunk = trunk_of(tiny(dtype="bfloat16", **changes.get(name, {})))
    (x, x_next, t), z = inputs()
    heads = {"", "trunk", "trunk/norm_out", "trunk/conv_out"}
    if name.startswith("energy"):
        dtypes = output_dtypes(ncsnpp.Energy(trunk), x, t)
    elif name == "generator":
        dtypes = output_dtypes(ncsnpp.Generator(8, 1, trunk), x_next, t, z)
        heads |= {layer for layer in dtypes if layer.endswith("/style")}
        assert len(heads) == 4 + 10 * 2  # Ten blocks of two norms.
    else:
        if name == "residual":
            module = encoder.ResidualEncoder(5, 1, 4, "bfloat16")
            x = x_next = jnp.zeros((BATCH, 64, 64, 1))
        else:
            module = encoder.ConvEncoder(5, 4, 4, "bfloat16")
        dtypes = output_dtypes(module, x, x_next, t)
        heads = {"", "mu", "logvar"}
    assert len(dtypes) > 2 * len(heads)
    for layer, found in dtypes.items():
        expected = jnp.float32 if layer in heads else jnp.bfloat16
        assert found == {jnp.dtype(expected)}, layer
    assert heads <= dtypes.keys()


def test_recomputing_blocks_changes_nothing():
    (x, _, t), _ = inputs(channels=1)
    found = {}
    for remat in choices.ALLOWED["model.remat"]:
        networks = small_networks(remat=remat)

        def energy(variables, x, networks=networks):
            return networks.energy(variables, x, t).mean()

        variables = filled(networks).energy
        traced = str(jax.make_jaxpr(energy)(variables, x))
        assert ("checkpoint" in traced or "remat" in traced) == (remat == "blocks")
        value_and_grad = jax.value_and_grad(energy, argnums=(0, 1))
        found[remat] = quick.jit(value_and_grad)(variables, x)
    assert_trees_close(found["blocks"], found["none"], rtol=1e-4, atol=1e-4)
    _, (gradients, _) = found["none"]
    for path, gradient in jax.tree.leaves_with_path(gradients):
        # The softmax does not see the keys' bias.
        if path[-2].key != "key" or path[-1].key != "bias":
            assert np.abs(gradient).max() > 1e-3, jax.tree_util.keystr(path)


# Dropout.


def dropout_keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), BATCH)


def test_dropout_draws_a_mask_for_each_example_and_layer():
    x, keys = normals(0, BATCH, 50, 50, 8) + 9.0, dropout_keys(0)

    @quick.jit
    def drop(x, keys):
        masks = layers.dropout_masks(keys, 0.3, [x.shape[1:], (3,), x.shape[1:]])
        assert masks[1].shape == (len(x), 3)
        return [layers.dropout(x, 0.3, kept) for kept in masks[::2]]

    whole, elsewhere = jax.device_get(drop(x, keys))
    halves = [drop(x[part], keys[part])[0] for part in (slice(0, 2), slice(2, 4))]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    kept = whole > 0
    np.testing.assert_allclose(whole, np.where(kept, x / 0.7, 0.0), rtol=1e-5)
    # No two examples or layers share a mask.
    for first, second in itertools.combinations([*kept, *(elsewhere > 0)], 2):
        assert differ(first, second)
    # 80,000 units: these means have standard deviations of 0.02 and 0.0016.
    np.testing.assert_allclose(whole.mean(), x.mean(), atol=0.1)
    np.testing.assert_allclose((whole == 0.0).mean(), 0.3, atol=0.01)
    assert np.all(layers.dropout_masks(keys, 1e-6, [(9,)])[0])
    # Nor do neighbours, which are halves of one number, drop out together.
    first, second = kept.reshape(-1, 2).T
    np.testing.assert_allclose((first & second).mean(), 0.49, atol=0.01)


def test_every_block_has_its_own_dropout(monkeypatch):
    masks, shapes = [], shapes_of(networks_of()).energy

    def spy(x, rate, kept):
        assert rate == 0.25 and kept.shape == x.shape
        masks.append(kept)
        return x

    monkeypatch.setattr(ncsnpp, "dropout", spy)
    networks = models.build(tiny(dropout=0.25), (SIDE, SIDE, 3))
    (x, _, t), _ = inputs()
    jax.eval_shape(networks.energy, shapes, x, t, dropout_keys(0))
    names = " ".join(shapes["params"]["trunk"])
    blocks = names.count("block") + names.count("resample")
    assert len({id(kept) for kept in masks}) == len(masks) == blocks == 10


def test_examples_are_independent_of_each_other_also_in_dropout(plain):
    networks = networks_of(dropout=0.5)
    variables, (x, z) = filled(networks), inputs()
    forward = forward_of(networks)
    keys = dropout_keys(0)
    first = forward(variables, *x, z, keys)
    other = forward(variables, *x, z, dropout_keys(1))
    for name in ("energy", "generator"):
        for i in range(BATCH):
            assert differ(first[name][i], other[name][i]), name
            assert differ(first[name][i], plain[name][i]), name
    # An example's masks depend on its key alone, not on its place or neighbours.
    order = np.array([2, 0, 0, 3])
    moved = forward(variables, *(part[order] for part in (*x, z, keys)))
    for name, rows in first.items():
        np.testing.assert_allclose(
            moved[name], rows[order], rtol=1e-5, atol=1e-6, err_msg=name
        )


# The encoders.


def test_conv_encoder():
    module = encoder.ConvEncoder(nz=5, ngf=2, t_emb_dim=4, dtype="float32")
    x_t, x_next = normals(0, BATCH, 16, 16, 1), normals(1, BATCH, 16, 16, 1)
    actual, params = run(module, x_t, x_next, TIMES)
    time = naive_time(TIMES, 4, params["time"])
    h = np.concatenate([x_t, x_next], axis=3)
    for i, (stride, side) in enumerate([(1, 16), (2, 8), (2, 4)]):
        h = leaky(naive_conv(h, params[f"conv_{i}"], pad=1, stride=stride))
        h = h + naive_dense(time, params[f"time_{i}"])[:, None, None]
        assert h.shape == (BATCH, side, side, 2 * 2**i)
    for moment, name in zip(actual, ("mu", "logvar"), strict=True):
        expected = naive_conv(h, params[name], pad=0)[:, 0, 0]
        np.testing.assert_allclose(moment, expected, rtol=1e-4, atol=1e-4)


def test_residual_encoder():
    """At the smallest side at which a sum over space is not a mean."""
    module = encoder.ResidualEncoder(nz=5, ngf=1, t_emb_dim=4, dtype="float32")
    x_t, x_next = normals(0, BATCH, 128, 128, 1), normals(1, BATCH, 128, 128, 1)
    found, params = run(module, x_t, x_next, TIMES)
    time = naive_time(TIMES, 4, params["time"])
    h = naive_conv(np.concatenate([x_t, x_next], axis=3), params["conv_in"], pad=0)
    for i in range(6):
        h = naive_down_block(h, time, params[f"block_{i}"])
    assert h.shape == (BATCH, 2, 2, 8)
    # The whole batch is one group of four.
    spread = np.sqrt(h.var(axis=0) + 1e-8).mean()
    h = np.concatenate([h, np.full((BATCH, 2, 2, 1), spread)], axis=3)
    h = leaky(naive_conv(h, params["conv_out"], pad=1)).sum(axis=(1, 2))
    mean = naive_dense(h, params["mu"])
    logvar = -np.logaddexp(0.0, naive_dense(h, params["logvar"]))
    for actual, expected in zip(found, (mean, logvar), strict=True):
        assert actual.shape == (BATCH, 5)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        # Examples differ by much more than that.
        assert actual.std(axis=0).min() > 2e-3


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (3, 3), (6, 3), (7, 1), (8, 4)])
def test_minibatch_stddev(batch: int, group: int):
    h = normals(batch, batch, 2, 3, 4)
    found = np.asarray(encoder.minibatch_stddev(h))
    np.testing.assert_array_equal(found[..., :-1], h)
    for i in range(batch):
        first = i // group * group
        members = np.asarray(h[first : first + group], np.float64)
        expected = np.sqrt(members.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(found[i, ..., -1], expected, rtol=1e-4)


@pytest.mark.parametrize("share", [1, 3, 4, 6])
def test_minibatch_stddev_of_shares_is_that_of_the_whole_batch(share: int):
    """Its gradient too, where groups of 4 cross devices."""
    h = normals(share, 4 * share, 2, 3, 4)
    weights = normals(share + 1, 4 * share, 2, 3, 5)
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    rows = PartitionSpec("data")

    def of_share(h, weights):
        def score(h):
            return (weights * encoder.minibatch_stddev(h, "data")).sum()

        return encoder.minibatch_stddev(h, "data"), jax.grad(score)(h)

    split = jax.shard_map(
        of_share, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    found, gradient = jax.jit(split)(h, weights)
    np.testing.assert_allclose(found, encoder.minibatch_stddev(h), rtol=1e-6)
    expected = jax.grad(lambda h: (weights * encoder.minibatch_stddev(h)).sum())(h)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
