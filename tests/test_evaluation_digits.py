"""Metrics of samples of labelled images: their judge, its distances, the whole."""

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ddaebm_jax.evaluation import digits

SEED = 0


@pytest.fixture(scope="module")
def split():
    """Training images, their labels, held-out images and theirs."""
    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)[..., None]
    train, test, train_labels, test_labels = train_test_split(
        images, raw.target, test_size=0.2, stratify=raw.target, random_state=SEED
    )
    return train, train_labels, test, test_labels


@pytest.fixture(scope="module")
def judge(split):
    return digits.train_judge(split[0], split[1], SEED)


@pytest.fixture
def evaluate(split, judge, monkeypatch):
    """Evaluates samples; the judge is trained once for all tests."""
    monkeypatch.setattr(digits, "train_judge", lambda *args: judge)
    return lambda samples: digits.evaluate_digits(samples, *split, SEED)


def noise(num, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 1), np.uint8)


def test_judge_is_right_about_held_out_digits_and_as_sure_as_right(split, judge):
    _, _, test, test_labels = split
    chances = digits.probabilities(judge, test)
    right = (judge.classes_[chances.argmax(axis=1)] == test_labels).mean()
    assert right >= 0.97
    assert chances.max(axis=1).mean() == pytest.approx(right, abs=0.02)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0)
    assert digits.probabilities(judge, noise(500)).max(axis=1).mean() < 0.8


def test_features_are_what_the_probabilities_are_made_from(split, judge):
    test = split[2]
    found = digits.features(judge, test)
    assert (found.dtype, found.shape) == (np.float64, (len(test), 64))
    expected = softmax(found @ judge.coefs_[-1] + judge.intercepts_[-1], axis=1)
    actual = digits.probabilities(judge, test)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-14)


def test_nearest_distances_are_the_smallest_of_all_and_exact():
    queries, references = noise(11, 1), noise(7, 2)
    gaps = (queries[:, None] / 255.0 - references[None] / 255.0).reshape(11, 7, 64)
    expected = np.linalg.norm(gaps, axis=2).min(axis=1)
    places, found = digits.nearest(queries, references)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    nearest = np.linalg.norm(gaps[np.arange(11), places], axis=1)
    np.testing.assert_allclose(nearest, expected)
    assert not digits.nearest(references[::-1].copy(), references)[1].any()


def test_held_out_digits_are_the_best_samples(split, evaluate):
    found = evaluate(split[2])
    assert json.loads(json.dumps(found)) == found
    assert found["frechet_samples"] < 1e-9
    assert found["precision"] == found["recall"] == 1.0
    assert found["classifier_accuracy"] >= 0.97
    assert found["classes_present"] == 10
    assert sum(found["class_histogram"]) == pytest.approx(1.0)
    assert found["confident_share"] == found["confident_share_held_out"] > 0.85
    near = found["nearest_train_mean"]
    assert 0.9 < near < 1.2 and near == found["nearest_train_mean_held_out"]
    assert 0.0 < found["near_copy_distance"] < near
    assert 0.01 <= found["near_copy_share"] < 0.02


def test_copies_of_training_digits_are_found_out(split, evaluate):
    train = split[0]
    jittered = train + np.random.default_rng(0).integers(-12, 13, train.shape)
    for samples in (train, np.clip(jittered, 0, 255).astype(np.uint8)):
        found = evaluate(samples)
        assert found["near_copy_share"] == 1.0
        assert found["nearest_train_mean"] < 0.5 * found["nearest_train_mean_held_out"]
        assert found["frechet_samples"] == pytest.approx(
            found["frechet_train"], rel=0.1
        )


def test_fresh_digits_are_as_far_as_chance_takes_them(split, evaluate):
    train, train_labels, test, test_labels = split
    half = digits.evaluate_digits(
        test[::2], train, train_labels, test[1::2], test_labels[1::2], SEED
    )
    assert 0.3 < half["frechet_samples"] / half["frechet_train_drawn"] < 3.0
    assert half["near_copy_share"] < 0.1
    found = evaluate(test)
    # Fewer draws are farther away, and a stratified split is nearer than any.
    few = evaluate(test[:60])
    assert few["frechet_train_drawn"] > 2 * found["frechet_train_drawn"]
    assert found["frechet_train_drawn"] > found["frechet_train"] > 0.0


def test_samples_are_compared_with_held_out_digits_of_all_labels(split, judge):
    """However few they are, and in whatever order the held-out ones."""
    train, _, test, labels = split
    ordered = test[np.argsort(labels, kind="stable")]
    few = digits._feature_metrics(judge, train[:90], train, ordered, SEED)
    assert few["precision"] > 0.85


def test_noise_is_far_from_digits_and_unsure(evaluate):
    found = evaluate(noise(500))
    assert found["frechet_samples"] > 20 * found["frechet_train_drawn"]
    assert found["confident_share"] < 0.5 * found["confident_share_held_out"]
    assert found["precision"] < 0.7 and found["recall"] < 0.3
    assert found["nearest_train_mean"] > 2 * found["nearest_train_mean_held_out"]
    assert found["near_copy_share"] == 0.0


def test_a_class_is_present_from_a_tenth_of_an_equal_share(split, judge, evaluate):
    test = split[2]
    predictions = digits.probabilities(judge, test).argmax(axis=1)
    one, other = (test[predictions == label][:1] for label in (3, 8))
    for num, present in ((99, 2), (100, 1)):
        found = evaluate(np.concatenate([np.repeat(one, num, axis=0), other]))
        assert found["classes_present"] == present
        assert found["class_histogram"][8] == 1 / (num + 1)
        assert found["class_share_least"] == 0.0
        assert found["frechet_samples"] > 10 * found["frechet_train_drawn"]
