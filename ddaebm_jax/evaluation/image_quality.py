"""Metrics of generated images by Inception's features, compared with a reference set.

Every report names the preprocessing, the network and the reference, without which a
FID means nothing.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt8

from ddaebm_jax import progress
from ddaebm_jax.data.records import Records, Subset, stack
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import fid, inception, inception_weights
from ddaebm_jax.evaluation.inference import evaluation_mesh
from ddaebm_jax.experiment import Experiment
from ddaebm_jax.files import read_npz, written_atomically
from ddaebm_jax.paths import cache_directory

_FORMAT_VERSION = 1
# Above 2048² moments and the most features that may be kept, 10⁶ × 2048 floats.
_MAX_REFERENCE_BYTES = 9 * 2**30
# Of the features that are kept, and of the kernel distance's subsets.
_SEED = 1_004

Extract = Callable[[np.ndarray], inception.Features]


class Statistics(NamedTuple):
    """Statistics of many images.

    Attributes:
      moments: of all their features.
      features: of some of the images, float32.
      logits: of all images, float32; None: not asked for.
    """

    moments: fid.Moments
    features: Float[np.ndarray, "kept d"]
    logits: Float[np.ndarray, "n classes"] | None = None


def collect(
    extract: Extract,
    chunks: Iterable[UInt8[np.ndarray, "n height width channels"]],
    keep: np.ndarray,
    keep_logits: bool,
) -> Statistics:
    """Returns statistics of images, of which two chunks at a time are in memory.

    Kept are the features of the images of the ascending numbers `keep`. The first
    chunk is the largest.

    Raises:
      InputError: if there is no image.
    """
    total: fid.Moments | None = None
    kept, logits, start = [], [], 0

    def started() -> Iterator[tuple[int, inception.Features] | None]:
        size = 0
        for images in chunks:
            size = max(size, len(images))
            # A smaller last chunk is filled up, so that one program serves all.
            filling = np.repeat(images[:1], size - len(images), axis=0)
            yield len(images), extract(np.concatenate([images, filling]))
        yield None

    # Features are fetched when the next ones are under way.
    for (count, features), _ in itertools.pairwise(started()):
        pool = np.asarray(features.pool)[:count]
        total = fid.add(total, fid.moments(pool))
        kept.append(pool[keep[(keep >= start) & (keep < start + count)] - start])
        if keep_logits:
            logits.append(np.asarray(features.logits)[:count])
        start += count
    if total is None:
        raise InputError("there is no image to measure; give at least two")
    logits = np.concatenate(logits) if keep_logits else None
    return Statistics(total, np.concatenate(kept), logits)


def save_reference(path: Path, reference: Statistics) -> None:
    """Writes reference statistics atomically, while other processes may do the same."""
    own = path.with_name(f"{path.stem}.{jax.process_index()}.{os.getpid()}.npz")
    with written_atomically(own) as file:
        np.savez(file, **reference.moments._asdict(), features=reference.features)
    own.replace(path)


def load_reference(path: Path) -> Statistics:
    """Reads what `save_reference` wrote.

    Raises:
      InputError: if the file is damaged.
    """
    names = (*fid.Moments._fields, "features")
    arrays = read_npz(path, _MAX_REFERENCE_BYTES, names)
    count, mean, scatter, features = (arrays[name] for name in names)
    return Statistics(fid.Moments(int(count), mean, scatter), features)


class Meter(NamedTuple):
    """Measures generated images by one reference.

    Attributes:
      extract: images → their features and logits.
      reference: what they are compared with.
      about: how it measures, as plain JSON values, for reports.
      num_kept: most samples whose neighbours are looked for.
    """

    extract: Extract
    reference: Statistics
    about: dict[str, Any]
    num_kept: int

    def measure(
        self, chunks: Iterable[UInt8[np.ndarray, "n height width channels"]]
    ) -> dict[str, Any]:
        """Returns the metrics of generated images, as plain JSON values.

        - `fid`: Fréchet Inception distance of all images to the whole reference.
        - `inception_score`, `inception_score_std`: over 10 splits; left out for fewer
          than 10 images.
        - `kid`, `kid_error`: kernel Inception distance and its standard error over
          subsets of 1,000; the error is left out for fewer than 2,000 images.
        - `precision`, `recall` (k = 3), `density`, `coverage` (k = 5), left out for
          fewer than 6 images.
        - `num_images`, `num_reference`; `num_compared`, of images and of the reference
          each, at most `num_kept`: `kid` and `precision` to `coverage` are of these,
          and all of them change with it.
        - `about`.

        Raises:
          InputError: for fewer than two images.
        """
        found = collect(self.extract, chunks, np.arange(self.num_kept), True)
        count = found.moments.count
        if count < 2:
            raise InputError(
                f"there is {count} image; a covariance needs at least 2: give more"
            )
        _warn_of_few("images", found.moments)
        _warn_of_few("reference images", self.reference.moments)
        # As many of either set, at random: they may be in some order.
        num = min(len(self.reference.features), len(found.features))
        rng = np.random.default_rng(_SEED)
        real, fake = (
            points[np.sort(rng.permutation(len(points))[:num])]
            for points in (self.reference.features, found.features)
        )
        kernel = fid.kernel_distance(real, fake, seed=_SEED)
        metrics: dict[str, Any] = {
            "fid": fid.frechet_distance(self.reference.moments, found.moments),
            "kid": kernel.value,
        }
        if kernel.error is not None:
            metrics["kid_error"] = kernel.error
        if count >= 10:
            score = fid.inception_score(found.logits)
            metrics["inception_score"] = score.mean
            metrics["inception_score_std"] = score.std
        if num > 5:
            metrics |= fid.neighbours(real, fake)._asdict()
        return metrics | {
            "num_images": count,
            "num_reference": self.reference.moments.count,
            "num_compared": num,
            **self.about,
        }


def _warn_of_few(what: str, moments: fid.Moments) -> None:
    if moments.count <= len(moments.mean):
        logging.warning(
            "%d %s are too few for %d features: the covariance is singular and the "
            "FID too large; it compares with FIDs of as many images only",
            moments.count,
            what,
            len(moments.mean),
        )


def open_meter(experiment: Experiment) -> Meter | None:
    """Returns a meter, with reference statistics loaded or computed.

    The reference images are those that the networks are trained on, or the held-out
    ones, cropped and resized, not flipped. None unless config.evaluation.inception.

    Raises:
      InputError: without weights, or for weights or statistics that do not fit.
    """
    settings, image_set = experiment.config.evaluation, experiment.source.image_set
    if not settings.inception:
        return None
    records = getattr(image_set, settings.reference)
    if len(records) < 2:
        raise InputError(
            f"evaluation.reference is '{settings.reference}', of {len(records)} image; "
            "a covariance needs at least 2: give more, or another reference"
        )
    network = inception_weights.load_network(settings.inception_weights)
    if not network.published:
        logging.warning(
            "the Inception weights are not the published file (content %s…): their "
            "metrics compare with no one else's, unless you converted that very file",
            network.fingerprint[:16],
        )
    mesh = evaluation_mesh(experiment)
    extract = inception.make_extractor(network, mesh, settings.preprocessing)
    images = image_set.metadata()["fingerprint"]
    fingerprint = {
        "format": _FORMAT_VERSION,
        "images": images,
        "split": settings.reference,
        "num_images": len(records),
        "network": network.fingerprint,
        "preprocessing": settings.preprocessing,
        "num_features_kept": min(settings.num_kept_features, len(records)),
    }
    reference = _open_reference(settings, records, extract, fingerprint)
    about = {
        "preprocessing": settings.preprocessing,
        "reference": settings.reference,
        "reference_images": images,
        "inception_weights": network.fingerprint,
        "inception_weights_published": network.published,
        "num_features": network.num_features,
        "num_kept_features": settings.num_kept_features,
    }
    return Meter(extract, reference, about, settings.num_kept_features)


def _open_reference(
    settings: Any, records: Records, extract: Extract, fingerprint: dict[str, Any]
) -> Statistics:
    """Loads the reference statistics from the user's cache, or computes and saves them.

    The fingerprint identifies the images, the network and the preprocessing.
    """
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode())
    path = cache_directory("reference") / f"{key.hexdigest()[:32]}.npz"
    reference = None
    if path.exists():
        try:
            reference = load_reference(path)
        except InputError as error:
            logging.warning("cached reference statistics are unusable: %s", error)
    # Together: the devices of all processes compute what one of them lacks.
    if multihost_utils.process_allgather(np.array(reference is not None)).all():
        return reference
    num, size = len(records), settings.batch_size
    keep = np.random.default_rng(_SEED).permutation(num)
    keep = np.sort(keep[: fingerprint["num_features_kept"]])

    def chunks() -> Iterator[np.ndarray]:
        with progress.loop_bar(num, "image", "reference statistics") as bar:
            for part in np.split(np.arange(num), range(size, num, size)):
                yield stack(Subset(records, part))
                bar.update(len(part))

    with progress.phase(f"computing the reference statistics of {num} images once"):
        found = collect(extract, chunks(), keep, keep_logits=False)
    try:
        save_reference(path, found)
        logging.info("saved the reference statistics in %s", path)
    except OSError as error:
        logging.warning("the reference statistics cannot be saved: %s", error)
    return found
