"""The FID's Inception-v3 against plain NumPy and PyTorch; its files; its features."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import tiny_inception
from helpers import assert_trees_equal
from jax.sharding import Mesh
from test_weights import write_legacy, write_safetensors, write_zip
from untrusted import refused

from ddaebm_jax.evaluation import inception, inception_weights


@pytest.fixture(scope="module")
def weights() -> tiny_inception.Weights:
    return tiny_inception.weights()


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> inception.Network:
    path = tiny_inception.write(tmp_path_factory.mktemp("inception") / "tiny.npz")
    return inception_weights.load_network(str(path))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Five images of coarse blocks and noise."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (5, 4, 3, 3)).repeat(6, axis=1).repeat(8, axis=2)
    noise = rng.integers(-40, 40, coarse.shape)
    return np.clip(coarse + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(weights, pictures) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features and logits of the pictures, of NumPy's in float64."""
    x = np.asarray(inception.preprocess(pictures, "tf"), np.float64)
    return tiny_inception.evaluate(weights, x.transpose(0, 3, 1, 2))


def mesh_of(count: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:count]), ("data",))


# The network.


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_published_size():
    shapes = inception.variable_shapes({})
    assert count(shapes["params"]) == 23_850_960
    assert count(shapes["batch_stats"]) == 34_432
    images = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    pool, logits = jax.eval_shape(inception.InceptionV3({}).apply, shapes, images)
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008)


def test_names_and_shapes_are_the_published_ones():
    table = tiny_inception.shapes()
    assert sorted(inception_weights._paths()) == sorted(table)
    kernels = sum(math.prod(s) for name, s in table.items() if "running" not in name)
    assert kernels == 23_850_960


def channels_into(name: str, weights: tiny_inception.Weights) -> int:
    first = tiny_inception.BLOCKS[name].layers[0].name
    return weights[f"{name}.{first}.conv.weight"].shape[1]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("Mixed_5b", (inception.BlockA, 32)),
        ("Mixed_5c", (inception.BlockA, 64)),
        ("Mixed_6a", (inception.BlockB,)),
        ("Mixed_6b", (inception.BlockC, 128)),
        ("Mixed_6e", (inception.BlockC, 192)),
        ("Mixed_7a", (inception.BlockD,)),
        ("Mixed_7b", (inception.BlockE, inception.average_pool)),
        ("Mixed_7c", (inception.BlockE, inception.max_pool)),
    ],
)
def test_blocks_are_numpys(name, block, network, weights):
    """On odd sides, negative numbers included: the border counts as it should."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 7, 9, channels_into(name, weights))).astype(np.float32)
    make, *arguments = block
    module = make(network.widths[name], *arguments)
    variables = {kind: tree[name] for kind, tree in network.variables.items()}
    actual = quick.jit(module.apply)(variables, x)
    wanted = tiny_inception.run_block(
        weights, name, x.astype(np.float64).transpose(0, 3, 1, 2)
    )
    np.testing.assert_allclose(
        actual, wanted.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("pool", "kind"),
    [
        (inception.average_pool, "avg"),
        (inception.max_pool, "max"),
        (inception.halving_max_pool, "pool"),
    ],
)
@pytest.mark.parametrize("sides", [(3, 3), (4, 7), (8, 8)])
def test_pools_at_the_border(pool, kind, sides):
    x = np.random.default_rng(3).normal(size=(1, *sides, 2)).astype(np.float32) - 5.0
    wanted = tiny_inception.pool(x.transpose(0, 3, 1, 2), kind)
    actual = pool(jnp.asarray(x))
    np.testing.assert_allclose(actual, wanted.transpose(0, 2, 3, 1), rtol=1e-5)
    # A constant stays one: what lies outside does not count.
    np.testing.assert_allclose(pool(jnp.full_like(x, -2.0)), -2.0, rtol=1e-6)


def test_the_network_is_numpys(network, pictures, expected):
    module = inception.InceptionV3(network.widths, network.num_classes)
    x = inception.preprocess(pictures, "tf")
    pool, logits = quick.jit(module.apply)(network.variables, x)
    assert pool.shape == (5, 128) and logits.shape == (5, 63)
    for actual, wanted in zip((pool, logits), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * wanted.std())
    # The weights keep activations of order one, and images can be told apart.
    assert 0.3 < expected[0].std() < 3.0
    assert expected[0].std(axis=0).mean() > 0.01


# Images.


def resized_by_loops(image: np.ndarray, convention: str) -> np.ndarray:
    """One channel [h, w], by the conventions' formulas, a pixel at a time."""

    def places(side: int) -> list[tuple[int, int, float]]:
        found = []
        for i in range(299):
            if convention == "tf":
                place = i * side / 299
            else:
                place = max((i + 0.5) * side / 299 - 0.5, 0.0)
            # Whole places may come out of the division a hair too low.
            place = round(place, 9)
            low = min(math.floor(place), side - 1)
            found.append((low, min(low + 1, side - 1), place - low))
        return found

    if convention == "pytorch_fid":
        image = image / 255
    columns = places(image.shape[1])
    out = np.empty((299, 299))
    for i, (top, bottom, down) in enumerate(places(image.shape[0])):
        row = image[top] * (1 - down) + image[bottom] * down
        for j, (left, right, across) in enumerate(columns):
            out[i, j] = row[left] * (1 - across) + row[right] * across
    return 2 * out - 1 if convention == "pytorch_fid" else (out - 128) / 128


SIZES = [(8, 8), (32, 32), (64, 64), (299, 299), (400, 400), (1, 7), (45, 310)]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("convention", inception.PREPROCESSINGS)
@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_its_formula(size, convention):
    images = noise(1, *size, 1)
    wanted = resized_by_loops(images[0, :, :, 0].astype(np.float64), convention)
    actual = inception.preprocess(images, convention)
    assert actual.shape == (1, 299, 299, 3) and actual.dtype == jnp.float32
    for channel in range(3):
        np.testing.assert_allclose(actual[0, :, :, channel], wanted, atol=2e-6)


@pytest.mark.parametrize("convention", inception.PREPROCESSINGS)
def test_preprocessing_takes_channels_apart(convention):
    images = noise(2, 5, 6, 3)
    together = inception.preprocess(images, convention)
    for channel in range(3):
        alone = inception.preprocess(images[..., channel : channel + 1], convention)
        np.testing.assert_allclose(
            together[..., channel], alone[..., 0], rtol=0, atol=1e-6
        )


def test_the_conventions_ends():
    for level, tf in ((0, -1.0), (128, 0.0), (255, 127 / 128)):
        images = np.full((1, 9, 9, 1), level, np.uint8)
        np.testing.assert_allclose(inception.preprocess(images, "tf"), tf, atol=1e-6)
        np.testing.assert_allclose(
            inception.preprocess(images, "pytorch_fid"), level / 127.5 - 1, atol=1e-6
        )


def test_images_that_are_refused(network):
    extract = inception.make_extractor(network, mesh_of(1), "tf")
    for images, parts in (
        (np.zeros((2, 8, 8, 3), np.float32), ("float32 (2×8×8×3)", "to_uint8")),
        (np.zeros((8, 8, 3), np.uint8), ("images are 8×8×3", "images[None]")),
        (np.zeros((1, 8, 8, 4), np.uint8), ("1×8×8×4", "n×height×width×3")),
        (np.zeros((1, 0, 8, 3), np.uint8), ("1×0×8×3",)),
        (np.zeros((), np.uint8), ("a scalar",)),
    ):
        refused(lambda images=images: extract(images), *parts)
        refused(lambda images=images: inception.preprocess(images, "tf"), *parts)
    for make in (
        lambda: inception.preprocess(noise(1, 8, 8, 3), "lanczos"),
        lambda: inception.make_extractor(network, mesh_of(1), "lanczos"),
    ):
        refused(make, "'lanczos'", "tf, pytorch_fid")


# Features.


@pytest.mark.parametrize(("devices", "batch"), [(1, 5), (2, 4), (2, 5), (8, 5), (8, 1)])
def test_features_do_not_depend_on_devices_or_batches(
    devices, batch, network, pictures, expected
):
    extract = inception.make_extractor(network, mesh_of(devices), "tf")
    features = extract(pictures[:batch])
    for actual, wanted in zip(features, expected, strict=True):
        assert isinstance(actual, np.ndarray) and actual.dtype == np.float32
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(actual, wanted[:batch], atol=1e-5 * scale, rtol=0)


def test_no_images_have_no_features(network):
    extract = inception.make_extractor(network, mesh_of(2), "pytorch_fid")
    features = extract(np.zeros((0, 8, 8, 1), np.uint8))
    assert features.pool.shape == (0, 128) and features.logits.shape == (0, 63)


# Files.


def test_all_formats_give_one_network(network, weights, tmp_path: Path):
    more = {
        **weights,
        "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7),
        "AuxLogits.fc.weight": np.zeros((2, 3), np.float32),
    }
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for name, write, arrays in (
        ("more.npz", np.savez_compressed, more),
        ("wide.npz", np.savez, wide),
        ("more.pth", write_zip, more),
        ("wide.pt", write_legacy, wide),
        ("more.safetensors", write_safetensors, more),
    ):
        path = tmp_path / name
        if path.suffix == ".npz":
            write(path, **arrays)
        else:
            write(path, arrays)
        loaded = inception_weights.load_network(str(path))
        assert loaded.fingerprint == network.fingerprint
        assert not loaded.published
        assert_trees_equal(loaded.variables, network.variables)


def test_the_fingerprint_tells_weights_apart(network, weights, tmp_path: Path):
    name = "Mixed_7c.branch_pool.bn.bias"
    np.savez(tmp_path / "w.npz", **{**weights, name: weights[name] + 1e-6})
    assert inception_weights.load_network(str(tmp_path / "w.npz")).fingerprint not in (
        network.fingerprint,
        inception_weights.load_network(
            str(tiny_inception.write(tmp_path / "other.npz", seed=1))
        ).fingerprint,
    )


def without(arrays: dict, *names: str) -> dict:
    return {key: value for key, value in arrays.items() if key not in names}


FIRST, NORM = "Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch1x1.bn.running_var"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: without(w, FIRST), (f"missing: {FIRST};", "pytorch-fid")),
        (lambda w: {**w, "extra": w[FIRST]}, ("unknown: extra;",)),
        (lambda w: {}, ("missing: ", "and 467 more")),
        (
            lambda w: {**w, FIRST: np.zeros((2, 3, 5, 5), "f")},
            (FIRST, "2×3×5×5", "2×3×3×3"),
        ),
        (
            lambda w: {**w, FIRST: np.zeros((3, 3, 3, 3), "f")},
            ("Conv2d_1a_3x3.bn", "has shape 2; 3 is needed"),
        ),
        (lambda w: {**w, FIRST: np.zeros((2, 27), "f")}, ("2×27", "4 axes")),
        (
            lambda w: {**w, FIRST: np.zeros((0, 3, 3, 3), "f")},
            ("0×3×3×3", "length 1"),
        ),
        (
            lambda w: {**w, "fc.weight": np.zeros((9, 100), "f")},
            ("fc.", "is needed"),
        ),
        (lambda w: {**w, NORM: np.array(1.0)}, (NORM, "a scalar", "1 axes")),
        (lambda w: {**w, NORM: w[NORM] * np.nan}, (NORM, "NaN")),
        (lambda w: {**w, NORM: -w[NORM]}, (NORM, "variance")),
        (lambda w: {**w, NORM: np.ones(4, int)}, (NORM, "int64")),
        (lambda w: {**w, NORM: np.full(4, 1e300)}, (NORM, "float32")),
    ],
)
def test_weights_of_another_network(weights, tmp_path: Path, change, parts):
    path = tmp_path / "w.npz"
    np.savez(path, **change(weights))
    refused(lambda: inception_weights.load_network(str(path)), str(path), *parts)


# The published file: here, small ones that stand for it.


@pytest.fixture
def release(weights, tmp_path: Path, monkeypatch) -> SimpleNamespace:
    """A file to fetch, which the module takes for the published one."""
    source = tmp_path / "release" / "pt_inception.pth"
    source.parent.mkdir()
    write_legacy(source, weights)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception_weights, "PUBLISHED_URL", source.as_uri())
    monkeypatch.setattr(
        inception_weights, "PUBLISHED_SHA256", inception_weights._sha256(source)
    )
    monkeypatch.setattr(inception_weights, "PUBLISHED_BYTES", source.stat().st_size)
    cached = tmp_path / "cache" / "ddaebm_jax" / "inception" / source.name
    return SimpleNamespace(source=source, cached=cached)


def test_the_published_file_is_fetched_once(release, network):
    fetched = inception_weights.load_network()
    assert fetched.published and fetched.fingerprint == network.fingerprint
    assert [file.name for file in release.cached.parent.iterdir()] == [
        release.cached.name
    ]
    # It is told by its content, under another name and place too.
    assert inception_weights.load_network(str(release.source)).published
    release.source.unlink()
    assert inception_weights.load_network().published


def test_a_damaged_cache_is_not_used(release):
    inception_weights.load_network()
    content = bytearray(release.cached.read_bytes())
    content[-1] ^= 1
    release.cached.write_bytes(content)
    refused(
        inception_weights.load_network,
        str(release.cached),
        inception_weights._sha256(release.cached),
        inception_weights.PUBLISHED_SHA256,
        "remove it",
    )
    assert not inception_weights.load_network(str(release.cached)).published


@pytest.mark.parametrize("longer", [True, False])
def test_another_file_is_not_kept(release, longer: bool):
    content = release.source.read_bytes()
    release.source.write_bytes(content * 2 if longer else content[:-1])
    parts = [
        inception_weights.PUBLISHED_URL,
        inception_weights.PUBLISHED_SHA256,
        "--inception_weights",
    ]
    if not longer:
        parts.append(inception_weights._sha256(release.source))
    refused(inception_weights.load_network, *parts)
    assert list(release.cached.parent.iterdir()) == []


def test_without_a_network(release):
    release.source.unlink()
    refused(
        inception_weights.load_network,
        "pt_inception.pth",
        inception_weights.PUBLISHED_URL,
        str(release.cached.parent),
        "--inception_weights=FILE",
    )
    assert list(release.cached.parent.iterdir()) == []


def test_without_a_place_to_keep_it(release, monkeypatch, tmp_path: Path):
    (tmp_path / "taken").write_text("a file, no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    refused(inception_weights.load_network, "--inception_weights=FILE")
