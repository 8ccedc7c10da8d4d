"""The FID's Inception-v3 against plain NumPy; its files; its features."""

import hashlib
import math
from collections.abc import Callable
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
from test_weights import write_legacy, write_npz, write_safetensors, write_zip
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
    """Return five images of coarse blocks and noise."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (5, 4, 3, 3)).repeat(6, axis=1).repeat(8, axis=2)
    noise = rng.integers(-40, 40, coarse.shape)
    return np.clip(coarse + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(weights, pictures) -> tuple[np.ndarray, np.ndarray]:
    """Return pooled features and logits in float64."""
    x = np.asarray(inception.preprocess(pictures, "tf"), np.float64)
    return tiny_inception.evaluate(weights, x.transpose(0, 3, 1, 2))


def mesh_of(count: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:count]), ("data",))


def load(path: str | Path = "") -> inception.Network:
    return inception_weights.load_network(str(path))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The network.


def test_the_published_size():
    shapes = inception.variable_shapes({})
    for kind, expected in (("params", 23_850_960), ("batch_stats", 34_432)):
        leaves = jax.tree.leaves(shapes[kind])
        assert sum(math.prod(leaf.shape) for leaf in leaves) == expected
    images = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    pool, logits = jax.eval_shape(inception.InceptionV3({}).apply, shapes, images)
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008)


def test_the_network_against_numpy(network, pictures, expected):
    module = inception.InceptionV3(network.widths, network.num_classes)
    x = inception.preprocess(pictures, "tf")
    pool, logits = quick.jit(module.apply)(network.variables, x)
    assert pool.shape == (5, 128) and logits.shape == (5, 63)
    for ours, theirs in zip((pool, logits), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.std())
    # The weights keep activations of order one, and images differ.
    assert 0.3 < expected[0].std() < 3.0
    assert expected[0].std(axis=0).mean() > 0.01


# Images.


def resized_by_loops(image: np.ndarray, convention: str) -> np.ndarray:
    """Resize one channel [h, w] by the convention's formula, a pixel at a time."""

    def places(side: int) -> list[tuple[int, int, float]]:
        found = []
        for i in range(299):
            if convention == "tf":
                place = i * side / 299
            else:
                place = max((i + 0.5) * side / 299 - 0.5, 0.0)
            # The division may round whole places down.
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


@pytest.mark.parametrize("convention", inception.PREPROCESSINGS)
@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_against_its_formula(size, convention):
    channels = 3 if size == (8, 8) else 1
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (1, *size, channels), np.uint8)
    actual = inception.preprocess(images, convention)
    assert actual.shape == (1, 299, 299, 3) and actual.dtype == jnp.float32
    for channel in range(3):
        plane = images[0, :, :, channel % channels].astype(np.float64)
        expected = resized_by_loops(plane, convention)
        np.testing.assert_allclose(actual[0, :, :, channel], expected, atol=2e-6)


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
        lambda: inception.preprocess(np.zeros((1, 8, 8, 3), np.uint8), "lanczos"),
        lambda: inception.make_extractor(network, mesh_of(1), "lanczos"),
    ):
        refused(make, "'lanczos'", "tf, pytorch_fid")


# Features.


@pytest.mark.parametrize(("devices", "batch"), [(1, 5), (2, 4), (2, 5), (8, 5), (8, 1)])
def test_features_do_not_depend_on_devices_or_batches(
    devices, batch, network, pictures, expected
):
    extract = inception.make_extractor(network, mesh_of(devices), "tf")
    for actual, whole in zip(extract(pictures[:batch]), expected, strict=True):
        assert actual.dtype == np.float32
        scale = np.abs(whole).max()
        np.testing.assert_allclose(actual, whole[:batch], atol=1e-5 * scale, rtol=0)
    none = extract(pictures[:0])
    assert none.pool.shape == (0, 128) and none.logits.shape == (0, 63)


# Files.


def test_all_formats_give_one_network(network, weights, tmp_path: Path):
    more = {
        **weights,
        "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7),
        "AuxLogits.fc.weight": np.zeros((2, 3), np.float32),
    }
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for name, write, arrays in (
        ("more.npz", write_npz, more),
        ("wide.npz", write_npz, wide),
        ("more.pth", write_zip, more),
        ("wide.pt", write_legacy, wide),
        ("more.safetensors", write_safetensors, more),
    ):
        loaded = load(write(tmp_path / name, arrays))
        assert loaded.fingerprint == network.fingerprint
        assert not loaded.published
        assert_trees_equal(loaded.variables, network.variables)


def test_other_weights_have_another_fingerprint(network, weights, tmp_path: Path):
    name = "Mixed_7c.branch_pool.bn.bias"
    changed = {**weights, name: weights[name] + 1e-6}
    loaded = load(write_npz(tmp_path / "w.npz", changed))
    other = load(tiny_inception.write(tmp_path / "other.npz", seed=1))
    assert len({found.fingerprint for found in (network, loaded, other)}) == 3


FIRST, NORM = "Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch1x1.bn.running_var"


def reshape(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda w: w.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop(FIRST), (f"missing: {FIRST};", "pytorch-fid")),
        (reshape(FIRST, 2, 3, 5, 5), (FIRST, "2×3×5×5", "2×3×3×3")),
        (reshape(FIRST, 3, 3, 3, 3), ("Conv2d_1a_3x3.bn", "has shape 2; 3 is needed")),
        (reshape(FIRST, 2, 27), ("2×27", "4 axes")),
        (reshape(FIRST, 0, 3, 3, 3), ("0×3×3×3", "length 1")),
        (reshape("fc.weight", 9, 100), ("fc.", "is needed")),
        (reshape(NORM), (NORM, "a scalar", "1 axes")),
        (lambda w: w.update({NORM: w[NORM] * np.nan}), (NORM, "NaN")),
        (lambda w: w.update({NORM: -w[NORM]}), (NORM, "variance")),
    ],
)
def test_weights_of_another_network(weights, tmp_path: Path, change, parts):
    changed = dict(weights)
    change(changed)
    path = write_npz(tmp_path / "w.npz", changed)
    refused(lambda: load(path), str(path), *parts)


# The published file, represented by a small one.


@pytest.fixture
def release(weights, tmp_path: Path, monkeypatch) -> SimpleNamespace:
    """Publish a small file at a local address."""
    source = tmp_path / "release" / "pt_inception.pth"
    source.parent.mkdir()
    write_legacy(source, weights)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (
        ("URL", source.as_uri()),
        ("SHA256", sha256(source)),
        ("BYTES", source.stat().st_size),
    ):
        monkeypatch.setattr(inception_weights, f"PUBLISHED_{name}", value)
    cached = tmp_path / "cache" / "ddaebm_jax" / "inception" / source.name
    return SimpleNamespace(source=source, cached=cached)


def test_the_published_file_is_fetched_once(release, network):
    fetched = load()
    assert fetched.published and fetched.fingerprint == network.fingerprint
    assert list(release.cached.parent.iterdir()) == [release.cached]
    # It is recognised by its content wherever it lies.
    assert load(release.source).published
    release.source.unlink()
    assert load().published


def test_a_damaged_cache_is_not_used(release):
    load()
    content = bytearray(release.cached.read_bytes())
    content[-1] ^= 1
    release.cached.write_bytes(content)
    sums = (sha256(release.cached), inception_weights.PUBLISHED_SHA256)
    refused(load, str(release.cached), *sums, "remove it")
    assert not load(release.cached).published


@pytest.mark.parametrize("longer", [True, False])
def test_another_file_is_not_kept(release, longer: bool):
    content = release.source.read_bytes()
    release.source.write_bytes(content * 2 if longer else content[:-1])
    sums = [inception_weights.PUBLISHED_SHA256]
    if not longer:
        sums.append(sha256(release.source))
    refused(load, inception_weights.PUBLISHED_URL, *sums, "--inception_weights")
    assert list(release.cached.parent.iterdir()) == []
