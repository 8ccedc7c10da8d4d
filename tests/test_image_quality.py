"""Metrics by features compared with a reference, which is saved and loaded again.

A fixed random projection of the pixels stands in for Inception, which is tested in
`test_inception` and `test_image_runs`.
"""

import json
from collections.abc import Iterator
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


def in_chunks(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return iter(np.split(pixels, range(size, len(pixels), size)))


def image_set(seed: int = 0, num_test: int = 40) -> images.ImageSet:
    train, test = pictures(300, seed), pictures(num_test, seed + 1)
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


def opened(
    seed: int = 0, num_test: int = 40, **changes: Any
) -> image_quality.Meter | None:
    settings = {
        "inception": True,
        "inception_weights": "weights.npz",
        "preprocessing": "tf",
        "reference": "train",
        "num_kept_features": 100,
        "batch_size": 64,
    }
    of = image_set(seed, num_test)
    made = experiment((8, 8, 1), image_set=of, **(settings | changes))
    return image_quality.open_meter(made)


def test_a_reference_of_one_image_is_refused_before_weights_are_loaded():
    with pytest.raises(InputError, match=r"reference is 'test', of 1 image; .*least 2"):
        opened(num_test=1, reference="test")


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
    for actual, expected in zip(found.moments, fid.moments(whole.pool), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-10)


def test_metrics_are_those_of_the_features():
    meter, samples = opened(), pictures(200, 5, low=60)
    found = meter.measure(in_chunks(samples, 64))
    real, fake = extract(image_set().train), extract(samples)
    assert found["fid"] == pytest.approx(
        fid.frechet_distance(fid.moments(real.pool), fid.moments(fake.pool)), rel=1e-6
    )
    score = found["inception_score"], found["inception_score_std"]
    assert score == pytest.approx(fid.inception_score(fake.logits))
    near = fid.neighbours(meter.reference.features, fake.pool[:100])
    assert (found["precision"], found["coverage"]) == (near.precision, near.coverage)
    assert found["num_images"] == 200 and found["num_reference"] == 300
    assert found["num_compared"] == 100
    assert "kid_error" not in found  # One subset does not tell it.
    json.dumps(found)  # Plain values: they go into reports.
    # Its own images come out best.
    own = meter.measure(in_chunks(image_set().train, 50))
    assert own["fid"] < 1e-6 < found["fid"] / 100
    assert abs(own["kid"]) < found["kid"] / 10


def test_a_reference_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "reference"
    monkeypatch.setattr(image_quality, "cache_directory", lambda name: folder)
    with caplog.at_level("WARNING"):
        assert opened().reference.moments.count == 300
    assert "cannot be saved" in caplog.text


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (1, {}),
        (0, {"preprocessing": "pytorch_fid"}),
        (0, {"inception_weights": "other.npz"}),
        (0, {"reference": "test"}),
    ],
)
def test_each_reference_has_a_file_of_its_own(seed: int, changes: dict, tmp_path: Path):
    opened(), opened(seed, **changes)
    assert len(list((tmp_path / "cache/ddaebm_jax/reference").iterdir())) == 2


def test_the_cached_reference_is_computed_once_and_again_if_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    assert opened(inception=False) is None
    expected = opened().reference
    # Some of the images, of all of the set.
    assert len(expected.features) == 100 and expected.moments.count == 300
    (path,) = (tmp_path / "cache/ddaebm_jax/reference").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with caplog.at_level("WARNING"):
        opened()
    assert "unusable" in caplog.text and str(path) in caplog.text
    assert path.read_bytes() == whole
    monkeypatch.setattr(inception, "make_extractor", lambda *_: pytest.fail)
    found = opened().reference
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_equal(found.moments, expected.moments)
