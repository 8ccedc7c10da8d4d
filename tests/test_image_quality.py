"""Metrics by features compared with a reference, which is saved and loaded again.

A fixed random projection of the pixels stands in for Inception, which is tested in
`test_inception` and `test_image_runs`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stubs import experiment

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
    return images.ImageSet("made", (8, 8, 1), train, test, f"content {seed}")


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


def opened(seed: int = 0, **changes: Any) -> image_quality.Meter | None:
    settings = {
        "inception": True,
        "inception_weights": "weights.npz",
        "preprocessing": "tf",
        "reference": "train",
        "reference_path": "",
        "num_kept_features": 100,
        "batch_size": 64,
    }
    made = experiment((8, 8, 1), image_set=image_set(seed), **(settings | changes))
    return image_quality.open_meter(made)


@given(st.integers(1, 80), st.integers(0, 10**6))
def test_what_is_collected_does_not_depend_on_the_batches(size: int, seed: int):
    pixels, shapes = pictures(75, seed), set()

    def recorded(part: np.ndarray) -> inception.Features:
        shapes.add(part.shape)
        return extract(part)

    keep = np.array([0, 3, 17, 18, 74])
    found = image_quality.collect(recorded, in_chunks(pixels, size), keep, True)
    assert shapes == {(min(size, 75), 8, 8, 1)}  # So that one program serves all.
    whole = extract(pixels)
    np.testing.assert_array_equal(found.features, whole.pool[keep])
    np.testing.assert_array_equal(found.logits, whole.logits)
    assert found.moments.count == 75
    expected = fid.moments(whole.pool)
    np.testing.assert_allclose(found.moments.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.moments.scatter, expected.scatter, atol=1e-10)


def test_metrics_are_those_of_the_features():
    meter, samples = opened(), pictures(200, 5, low=60)
    found = meter.measure(in_chunks(samples, 64))
    real, fake = extract(image_set().train), extract(samples)
    assert found["fid"] == pytest.approx(
        fid.frechet_distance(fid.moments(real.pool), fid.moments(fake.pool)), rel=1e-6
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
    for num in (40, 150):
        found = [meter.measure([pictures(num, 100 + i)]) for i in range(20)]
        assert {one["num_compared"] for one in found} == {num}
        coverage = np.mean([one["coverage"] for one in found])
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
    assert "cannot be saved" in caplog.text


def test_the_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    assert opened(inception=False) is None
    first = opened()
    monkeypatch.setattr(inception, "make_extractor", lambda *_: pytest.fail)
    again = opened()
    assert again.reference.fingerprint == first.reference.fingerprint
    np.testing.assert_array_equal(again.reference.features, first.reference.features)
    np.testing.assert_equal(again.reference.moments, first.reference.moments)
    # Some of the images, of all of the set.
    assert len(first.reference.features) == 100 and first.reference.moments.count == 300


@pytest.mark.parametrize(
    ("seed", "changes", "named"),
    [
        (1, {}, "images is 'content 0', expected 'content 1'"),
        (0, {"preprocessing": "pytorch_fid"}, "preprocessing is 'tf', expected"),
        (0, {"inception_weights": "other.npz"}, "network is 'network of weights"),
        (0, {"reference": "test"}, "split is 'train', expected 'test'"),
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
    with pytest.raises(InputError, match="no array 'count'; found: 'mu'"):
        opened(reference_path=str(path))
    with pytest.raises(InputError, match=r"ends in \.npz"):
        opened(reference_path=str(tmp_path / "reference.pkl"))
    whole = {
        "count": 9,
        "mean": np.zeros(3),
        "scatter": np.eye(3),
        "features": np.zeros((9, 3)),
        "fingerprint": "{}",
    }
    np.savez(path, **whole)
    assert image_quality.load_reference(path, {}).moments.count == 9
    for changes in (
        {"fingerprint": "[1]"},
        {"fingerprint": "no json"},
        {"fingerprint": "[" * 100_000},
        {"count": 1},
        {"count": np.inf},
        {"scatter": np.eye(2)},
        {"features": np.zeros((9, 2))},
        {"mean": np.array([0, np.nan, 0])},
        {"mean": np.array(["a", "b", "c"])},
    ):
        np.savez(path, **(whole | changes))
        with pytest.raises(InputError, match=r"reference\.npz: damaged .*remove it"):
            image_quality.load_reference(path, {})


def test_a_damaged_cached_reference_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    expected = opened().reference
    (path,) = (tmp_path / "cache" / "ddaebm_jax" / "reference").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with caplog.at_level("WARNING"):
        found = opened().reference
    assert "unusable" in caplog.text and str(path) in caplog.text
    np.testing.assert_array_equal(found.features, expected.features)
    assert path.read_bytes() == whole


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
