"""Quality of samples of small labelled images, judged by a classifier of real ones.

Made for scikit-learn's 8 × 8 digits; any small labelled set of images works. Pixels are
bytes; distances between images are in units in which a pixel goes from 0 to 1.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from ddaebm_jax.evaluation import fid

# Chosen on the digits: accuracy 0.977 on held-out ones with a mean top probability of
# 0.971. Less weight decay is as accurate, but surer of noise; more is too unsure.
_HIDDEN_WIDTHS = (128, 64)
_WEIGHT_DECAY = 0.1
# An upper limit: training stops by itself, after about 300 passes.
_MAX_PASSES = 1_000

_CONFIDENT = 0.9
# Share of an equal share above which a class counts as present.
_PRESENT = 0.1
# Percentile of the held-out images' distances up to which a sample is a near copy.
_NEAR_COPY_PERCENTILE = 1.0

# The Fréchet distance of a single pair of random sets is noisy (on the digits 0.30 ±
# 0.09): the mean over so many is reported.
_RANDOM_PAIRS = 20


def train_judge(
    images: UInt8[np.ndarray, "n h w c"], labels: Integer[np.ndarray, " n"], seed: int
) -> Any:
    """Returns an `MLPClassifier` with two hidden layers, trained on integer labels.

    The seed is of its initial weights and of the order of the images.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    judge = MLPClassifier(
        _HIDDEN_WIDTHS,
        activation="relu",
        alpha=_WEIGHT_DECAY,
        max_iter=_MAX_PASSES,
        random_state=seed,
    )
    with threadpool_limits(1):  # Of small matrices, which threads only slow down.
        judge.fit(_rows(images) / 255.0, labels)
    return judge


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64)


def features(
    judge: Any, images: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n d"]:
    """Returns the activations of the judge's last hidden layer; d = 64."""
    hidden = _rows(images) / 255.0
    layers = zip(judge.coefs_[:-1], judge.intercepts_[:-1], strict=True)
    for weights, biases in layers:
        hidden = np.maximum(hidden @ weights + biases, 0.0)
    return hidden


def probabilities(
    judge: Any, images: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n classes"]:
    """Returns the judge's probability of each class, in the order of its `classes_`."""
    return judge.predict_proba(_rows(images) / 255.0)


def nearest(
    queries: UInt8[np.ndarray, "n h w c"], references: UInt8[np.ndarray, "m h w c"]
) -> tuple[Integer[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the place of each query's nearest reference, and its Euclidean distance.

    In units in which a pixel goes from 0 to 1; exactly 0 for a copy.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    # Of whole numbers far below 2⁵³, whose squares and their differences are exact.
    places, distances = pairwise_distances_argmin_min(_rows(queries), _rows(references))
    return places, distances / 255.0


def evaluate_digits(
    samples: UInt8[np.ndarray, "n h w c"],
    train: UInt8[np.ndarray, "m h w c"],
    train_labels: Integer[np.ndarray, " m"],
    test: UInt8[np.ndarray, "k h w c"],
    test_labels: Integer[np.ndarray, " k"],
    seed: int,
) -> dict[str, Any]:
    """Returns the metrics of a model's samples, as plain JSON values.

    `train` are the real images that the model was trained on, `test` held-out ones.
    The judge is `train_judge(train, train_labels, seed)`. Fréchet distances are in its
    features, so they compare only between samples judged with the same images and
    seed, which is also that of the random draws.

    - `num_samples`, `num_train`, `num_held_out`.
    - `classifier_accuracy`: the judge's, on the held-out images.
    - `frechet_samples`: from the samples to the held-out images.
    - `frechet_train`: from the training images to the held-out images. Low for a split
      that keeps the classes' shares, which a model's random draws do not.
    - `frechet_train_drawn`: from as many training images as there are samples, drawn
      with replacement, to the held-out images; the mean over 20 draws. What a model
      that returns training images reaches: the figure to compare `frechet_samples`
      with.
    - `precision`, `recall`: in the judge's features (`fid.neighbours`), of as many
      samples and held-out images as there are of the fewer; none for at most 5.
    - `confident_share`, `confident_share_held_out`: the share of the samples, and of
      the held-out images, whose top probability is above 0.9.
    - `class_histogram`: the share of the samples predicted as each class, in the
      order of the sorted labels. `class_share_least`: the least of them.
    - `classes_present`: how many of them are at least a tenth of an equal share, so
      1% of the samples for ten classes.
    - `nearest_train_mean`, `nearest_train_mean_held_out`: the distance (`nearest`) of
      the samples and of the held-out images to the nearest training image.
    - `near_copy_distance`: the first percentile of the held-out images' distances.
      `near_copy_share`: the share of the samples that are no farther than that from a
      training image. About 0.01 for fresh real images, and 1 for copies. Blur too
      brings samples nearer to the training images: copies show by a share far above
      0.01 together with good Fréchet and confident figures.
    """
    from threadpoolctl import threadpool_limits

    judge = train_judge(train, train_labels, seed)
    by_sample, by_held_out = (probabilities(judge, x) for x in (samples, test))
    accuracy = (judge.classes_[by_held_out.argmax(axis=1)] == test_labels).mean()
    with threadpool_limits(1):  # As in `train_judge`.
        by_features = _feature_metrics(judge, samples, train, test, seed)
    return {
        "num_samples": len(samples),
        "num_train": len(train),
        "num_held_out": len(test),
        "classifier_accuracy": float(accuracy),
        **by_features,
        **_class_metrics(by_sample, by_held_out),
        **_nearness_metrics(samples, train, test),
    }


def _feature_metrics(judge, samples, train, test, seed) -> dict[str, float]:
    sampled, seen, unseen = (features(judge, x) for x in (samples, train, test))

    def distance(first: np.ndarray, second: np.ndarray = unseen) -> float:
        return fid.frechet_distance(fid.moments(first), fid.moments(second))

    rng = np.random.default_rng(seed)
    drawn = [distance(rng.choice(seen, len(samples))) for _ in range(_RANDOM_PAIRS)]
    found = {
        "frechet_samples": distance(sampled),
        "frechet_train": distance(seen),
        "frechet_train_drawn": float(np.mean(drawn)),
    }
    num = min(len(sampled), len(unseen))
    if num > fid.MOST_NEIGHBOURS:
        # Not the first held-out images: a set in the order of its labels is cut, too.
        overlap = fid.neighbours(rng.permutation(unseen)[:num], sampled[:num])
        found |= {"precision": overlap.precision, "recall": overlap.recall}
    return found


def _class_metrics(by_sample: np.ndarray, by_held_out: np.ndarray) -> dict[str, Any]:
    num_samples, classes = by_sample.shape
    shares = np.bincount(by_sample.argmax(axis=1), minlength=classes) / num_samples
    both = by_sample, by_held_out
    sure, sure_held_out = ((x.max(axis=1) > _CONFIDENT).mean() for x in both)
    return {
        "confident_share": float(sure),
        "confident_share_held_out": float(sure_held_out),
        "classes_present": int((shares >= _PRESENT / classes).sum()),
        "class_histogram": shares.tolist(),
        "class_share_least": float(shares.min()),
    }


def _nearness_metrics(samples, train, test) -> dict[str, float]:
    ours, held_out = (nearest(images, train)[1] for images in (samples, test))
    near = np.percentile(held_out, _NEAR_COPY_PERCENTILE)
    return {
        "nearest_train_mean": float(ours.mean()),
        "nearest_train_mean_held_out": float(held_out.mean()),
        "near_copy_distance": float(near),
        "near_copy_share": float((ours <= near).mean()),
    }
