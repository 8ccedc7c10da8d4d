"""Features collected, held against a reference, and the reference kept: no network.

In the place of Inception a fixed random projection of the pixels, so that all is seen
in a second; `test_inception` and `test_image_runs` have the network itself.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddaebm_jax import sharding as parallel
from ddaebm_jax.data import images
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import fid, image_quality, inception, inception_weights

NUM_FEATURES, NUM_CLASSES = 6, 4
_RNG = np.random.default_rng(0)
_TO_POOL = _RNG.normal(size=(64, NUM_FEATURES)) / 8
_TO_LOGITS = _RNG.normal(size=(NUM_FEATURES, NUM_CLASSES))


def extract(pixels: np.ndarray) -> inception.Features:
    pool = pixels.reshape(len(pixels), -1) / 255.0 @ _TO_POOL
    return inception.Features(
        pool.astype(np.float32), (pool @ _TO_LOGITS).astype(np.float32)
    )


def pictures(num: int, seed: int = 0, low: int = 0) -> np.ndarray:
    shape = (num, 8, 8, 1)
    return np.random.default_rng(seed).integers(low, 256, shape, dtype=np.uint8)


def in_chunks(pixels: np.ndarray, size: int):
    return (pixels[start : start + size] for start in range(0, len(pixels), size))


def image_set(seed: int = 0) -> images.ImageSet:
    train, test = pictures(300, seed), pictures(40, seed + 1)
    return images.ImageSet(
        "made", (8, 8, 1), train, test, fingerprint=f"content {seed}"
    )


def settings(**changes: Any) -> SimpleNamespace:
    values = {
        "inception_weights": "weights.npz",
        "preprocessing": "tf",
        "reference": "train",
        "reference_path": "",
        "num_kept_features": 100,
        "batch_size": 64,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands a projection in for the network, and a folder for the user's cache."""

    def load(path: str) -> inception.Network:
        return inception.Network(
            {}, f"network of {path}", False, NUM_FEATURES, NUM_CLASSES, {}
        )

    monkeypatch.setattr(inception_weights, "load_network", load)
    monkeypatch.setattr(inception, "make_extractor", lambda *_: extract)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(seed: int = 0, **changes: Any) -> image_quality.Meter:
    mesh = parallel.make_mesh(1)
    return image_quality.open_meter(settings(**changes), image_set(seed), mesh)


@given(st.integers(1, 80), st.integers(0, 10**6))
def test_what_is_collected_does_not_depend_on_the_batches(size: int, seed: int):
    pixels = pictures(75, seed)
    keep = np.array([0, 3, 17, 18, 74])
    found = image_quality.collect(extract, in_chunks(pixels, size), keep, True)
    whole = extract(pixels)
    np.testing.assert_array_equal(found.features, whole.pool[keep])
    np.testing.assert_array_equal(found.logits, whole.logits)
    assert found.moments.count == 75
    expected = fid.moments(whole.pool)
    np.testing.assert_allclose(found.moments.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.moments.scatter, expected.scatter, atol=1e-10)


def test_one_shape_of_batch_only():
    shapes = set()

    def seen(pixels: np.ndarray) -> inception.Features:
        shapes.add(pixels.shape)
        return extract(pixels)

    image_quality.collect(seen, in_chunks(pictures(75), 32), np.arange(0), False)
    assert shapes == {(32, 8, 8, 1)}


def test_figures_are_those_of_the_features():
    meter, samples = opened(), pictures(200, 5, low=60)
    found = meter.measure(in_chunks(samples, 64))
    real, fake = extract(image_set().train), extract(samples)
    assert found["fid"] == pytest.approx(
        fid.frechet_distance_of_points(real.pool, fake.pool), rel=1e-6
    )
    score = fid.inception_score(fake.logits)
    assert found["inception_score"] == pytest.approx(score.mean)
    assert found["inception_score_std"] == pytest.approx(score.std)
    near = fid.neighbours(meter.reference.features, fake.pool[:100])
    assert (found["precision"], found["coverage"]) == (near.precision, near.coverage)
    assert found["num_images"] == 200 and found["num_reference"] == 300
    assert found["num_compared"] == 100
    assert "kid_error" not in found  # One subset does not tell it.
    assert found["preprocessing"] == "tf" and found["reference"] == "train"
    assert found["inception_weights_published"] is False
    json.dumps(found)  # Plain values: they go into reports.
    # Its own images come out best.
    own = meter.measure(in_chunks(image_set().train, 50))
    assert own["fid"] < 1e-6 < found["fid"] / 100
    assert abs(own["kid"]) < found["kid"] / 10


def test_as_many_are_compared_of_either_set():
    """Coverage of equal distributions is 1 − 2⁻⁵ whatever the number of samples."""
    meter = opened(num_kept_features=300)
    found = [
        meter.measure([pictures(num, 100 + i)]) for num in (40, 150) for i in range(20)
    ]
    assert {one["num_compared"] for one in found} == {40, 150}
    for part in (found[:20], found[20:]):
        coverage = np.mean([one["coverage"] for one in part])
        assert coverage == pytest.approx(1 - 2**-5, abs=0.04)


def test_a_reference_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """In the cache it is done without; where the user wanted it, it is an error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no file can be written"):
        opened(reference_path=str(tmp_path / "file" / "reference.npz"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("WARNING"):
        assert opened().reference.moments.count == 300
    assert "not kept for the next time" in caplog.text

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "savez", full)
    assert opened().reference.moments.count == 300
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_the_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    first = opened()
    monkeypatch.setattr(inception, "make_extractor", lambda *_: pytest.fail)
    again = opened()
    assert again.reference.fingerprint == first.reference.fingerprint
    for one, other in zip(
        (*first.reference.moments, first.reference.features),
        (*again.reference.moments, again.reference.features),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    # Some of the images, of all of the set.
    assert len(first.reference.features) == 100 and first.reference.moments.count == 300


@pytest.mark.parametrize(
    ("seed", "changes", "named"),
    [
        (1, {}, "images is 'content 0', wanted 'content 1'"),
        (0, {"preprocessing": "pytorch_fid"}, "preprocessing is 'tf', wanted"),
        (0, {"inception_weights": "other.npz"}, "network is 'network of weights"),
        (0, {"reference": "test"}, "split is 'train', wanted 'test'"),
    ],
)
def test_another_reference_is_an_error(
    seed: int, changes: dict, named: str, tmp_path: Path
):
    path = str(tmp_path / "reference.npz")
    opened(reference_path=path)
    before = Path(path).read_bytes()
    with pytest.raises(InputError, match="holds other reference statistics") as caught:
        opened(seed, reference_path=path, **changes)
    assert named in str(caught.value)
    assert Path(path).read_bytes() == before
    # Without a file of its own, each has one in the cache.
    other = opened(seed, **changes).reference
    assert other.fingerprint != opened().reference.fingerprint
    assert opened(reference_path=path).reference.moments.count == 300


def test_damaged_references_are_refused(tmp_path: Path):
    path = tmp_path / "reference.npz"
    opened(reference_path=str(path))
    whole = path.read_bytes()
    for damaged in (b"", b"no zip", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"reference\.npz"):
            opened(reference_path=str(path))
        assert path.read_bytes() == damaged
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="holds mu, sigma; reference statistics hold"):
        opened(reference_path=str(path))
    with pytest.raises(InputError, match=r"ends in \.npz"):
        opened(reference_path=str(tmp_path / "reference.pkl"))
    values = {"mean": np.zeros(3), "scatter": np.eye(2), "features": np.zeros((9, 3))}
    for fingerprint in ("{}", "[1]", "no json"):
        np.savez(path, count=9, fingerprint=fingerprint, **values)
        with pytest.raises(InputError, match="damaged"):
            opened(reference_path=str(path))


def test_too_few_images_are_told_of(caplog: pytest.LogCaptureFixture):
    meter = opened()
    with caplog.at_level("WARNING"):
        found = meter.measure([pictures(NUM_FEATURES, 9)])
    assert "6 images are too few for 6 features" in caplog.text
    assert found["fid"] > 0
    # What so few do not tell is left out.
    assert "inception_score" not in found and "precision" in found
    assert "precision" not in meter.measure([pictures(5)])
    caplog.clear()
    meter.measure([pictures(NUM_FEATURES + 1)])
    assert "too few" not in caplog.text
    with pytest.raises(InputError, match="at least 2"):
        meter.measure([pictures(1)])
    with pytest.raises(InputError, match="no image"):
        meter.measure([])
