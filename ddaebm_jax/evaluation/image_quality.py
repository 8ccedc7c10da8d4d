"""Figures of generated images by Inception's features, against a reference set.

What goes in, who computes the features, what they are held against: all of it is
written into every report, since a FID means nothing without.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from ddaebm_jax import sharding as parallel
from ddaebm_jax.data.images import ImageSet, Subset, stack
from ddaebm_jax.data.npz_files import NpzFile
from ddaebm_jax.data.records import digest
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.evaluation import fid, inception, inception_weights
from ddaebm_jax.files import cache_directory

_FORMAT_VERSION = 1
# Above 2048² moments and the most features that may be kept, 10⁶ × 2048 floats.
_MAX_REFERENCE_BYTES = 9 * 2**30
# Of the features that are kept, and of the kernel distance's subsets.
_SEED = 1_004

Extract = Callable[[np.ndarray], inception.Features]


class Collected(NamedTuple):
    """What is kept of many images.

    Attributes:
      moments: of all their features.
      features: of some of the images, float32.
      logits: of all images, float32; None: not wanted.
    """

    moments: fid.Moments
    features: Float[np.ndarray, "kept d"]
    logits: Float[np.ndarray, "n classes"] | None


def collect(
    extract: Extract,
    chunks: Iterable[UInt8[np.ndarray, "n height width channels"]],
    keep: np.ndarray,
    keep_logits: bool,
) -> Collected:
    """Goes once through images; only features, and only some, stay in memory.

    Args:
      extract: images → their features and logits.
      chunks: the images.
      keep: ascending numbers of the images whose features are kept.
      keep_logits: whether the logits of all images are.

    Raises:
      InputError: if there is no image.
    """
    total: fid.Moments | None = None
    kept, logits, start, full = [], [], 0, 0
    for images in chunks:
        full = max(full, len(images))
        found = _extract_padded(extract, images, full)
        total = fid.add(total, fid.moments(found.pool))
        stop = start + len(images)
        here = keep[(keep >= start) & (keep < stop)] - start
        kept.append(found.pool[here])
        if keep_logits:
            logits.append(found.logits)
        start = stop
    if total is None:
        raise InputError("there is no image to measure; give at least two")
    return Collected(
        total, np.concatenate(kept), np.concatenate(logits) if keep_logits else None
    )


def _extract_padded(
    extract: Extract, images: np.ndarray, size: int
) -> inception.Features:
    """Fills the last, smaller batch up, so that one program serves all."""
    count = len(images)
    missing = size - count
    if missing:
        images = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
    found = extract(images)
    return inception.Features(found.pool[:count], found.logits[:count])


class Reference(NamedTuple):
    """What generated images are held against.

    Attributes:
      moments: of the features of all reference images.
      features: of some of them.
      fingerprint: what tells the images, the network and the preprocessing.
    """

    moments: fid.Moments
    features: Float[np.ndarray, "kept d"]
    fingerprint: dict[str, Any]


def _chunks_of(records: Any, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(records), size):
        part = np.arange(start, min(start + size, len(records)))
        yield stack(Subset(records, part))


def save_reference(path: Path, reference: Reference) -> None:
    """Writes a reference; never half of one, never over a file that is there."""
    handle, name = tempfile.mkstemp(".partial", path.name + ".", path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                count=reference.moments.count,
                mean=reference.moments.mean,
                scatter=reference.moments.scatter,
                features=reference.features,
                fingerprint=json.dumps(reference.fingerprint, sort_keys=True),
            )
        if not path.exists():  # Else another run has been faster.
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_reference(path: Path, fingerprint: dict[str, Any]) -> Reference:
    """Reads what `save_reference` wrote.

    Raises:
      InputError: if the file is not one, or is of other images, another network or
        another preprocessing than asked for.
    """
    advice = "remove it, and it is computed anew"
    names = ("count", "mean", "scatter", "features", "fingerprint")
    with NpzFile(path, _MAX_REFERENCE_BYTES, advice) as file:
        if set(file.arrays) != set(names):
            raise InputError(
                f"{path} holds {', '.join(sorted(file.arrays)) or 'nothing'}; "
                f"reference statistics hold {', '.join(names)}; {advice}"
            )
        values = {name: file.read(file.arrays[name]) for name in names}
    try:
        found = json.loads(str(values["fingerprint"]))
        moments = fid.Moments(int(values["count"]), values["mean"], values["scatter"])
        (width,) = moments.mean.shape
        features = values["features"]
        fits = moments.scatter.shape == (width, width) and moments.count > 1
        fits &= features.shape[1:] == (width,) and isinstance(found, dict)
        numbers = (*moments[1:], features)
        sound = all(x.dtype.kind == "f" and np.isfinite(x).all() for x in numbers)
    # JSON may be nested, and numbers infinite.
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}); {advice}") from error
    if not fits:
        raise InputError(f"{path} is damaged (its shapes do not fit); {advice}")
    if not sound:
        raise InputError(f"{path} is damaged (not all numbers are finite); {advice}")
    differing = [
        f"{name} is {found.get(name)!r}, wanted {wanted!r}"
        for name, wanted in fingerprint.items()
        if found.get(name) != wanted
    ]
    if differing:
        raise InputError(
            f"{path} holds other reference statistics: {'; '.join(differing)}; name "
            "another file in evaluation.reference_path, or leave it empty"
        )
    return Reference(moments, values["features"], found)


class Meter(NamedTuple):
    """Measures generated images against one reference.

    Attributes:
      extract: images → their features and logits.
      reference: what they are held against.
      about: how it measures, as plain JSON values, for reports.
      num_kept: most samples whose neighbours are looked for.
    """

    extract: Extract
    reference: Reference
    about: dict[str, Any]
    num_kept: int

    def measure(
        self, chunks: Iterable[UInt8[np.ndarray, "n height width channels"]]
    ) -> dict[str, Any]:
        """Returns the figures of generated images, as plain JSON values.

        - `fid`: Fréchet Inception distance of all images to the whole reference.
        - `inception_score`, `inception_score_std`: over 10 splits; left out for fewer
          than 10 images.
        - `kid`, `kid_error`: kernel Inception distance and its standard error over
          subsets of 1,000; left out for fewer than 2,000 images.
        - `precision`, `recall` (k = 3), `density`, `coverage` (k = 5), left out for
          fewer than 6 images.
        - `num_images`, `num_reference`; `num_compared`, of images and of the reference
          each, at most `num_kept`: of these are `kid` and `precision` to `coverage`,
          all of which change with it.
        - what `about` holds.

        Raises:
          InputError: for fewer than two images.
        """
        found = collect(self.extract, chunks, np.arange(self.num_kept), True)
        count, width = found.moments.count, len(found.moments.mean)
        if count < 2:
            raise InputError(
                f"there is {count} image; a covariance needs at least 2: give more"
            )
        for what, number in (
            ("images", count),
            ("reference images", self.reference.moments.count),
        ):
            if number <= width:
                logging.warning(
                    "%d %s are too few for %d features: the covariance is singular, "
                    "the FID too large; it compares with FIDs of as many images only",
                    number,
                    what,
                    width,
                )
        real, fake = _as_many(self.reference.features, found.features)
        kernel = fid.kernel_distance(real, fake, seed=_SEED)
        figures: dict[str, Any] = {
            "fid": fid.frechet_distance(self.reference.moments, found.moments),
            "kid": kernel.value,
        }
        if kernel.error is not None:
            figures["kid_error"] = kernel.error
        if count >= 10:
            score = fid.inception_score(found.logits)
            figures["inception_score"] = score.mean
            figures["inception_score_std"] = score.std
        if len(real) > 5:
            figures |= fid.neighbours(real, fake)._asdict()
        return figures | {
            "num_images": count,
            "num_reference": self.reference.moments.count,
            "num_compared": len(real),
            **self.about,
        }


def _as_many(real: np.ndarray, fake: np.ndarray) -> list[np.ndarray]:
    """Chooses as many features of either set, at random: they may be in some order."""
    num, rng = min(len(real), len(fake)), np.random.default_rng(_SEED)
    return [
        points[np.sort(rng.permutation(len(points))[:num])] for points in (real, fake)
    ]


def open_meter(evaluation: Any, image_set: ImageSet, mesh: Any) -> Meter:
    """Loads the network, and loads or computes the reference statistics.

    Args:
      evaluation: the config's section.
      image_set: whose images are the reference: what the networks are trained on or
        what is held out, cropped and resized, not flipped.
      mesh: devices over which images are split.

    Raises:
      InputError: without weights, or for ones or statistics that do not fit.
    """
    network = inception_weights.load_network(evaluation.inception_weights)
    if not network.published:
        logging.warning(
            "the Inception weights are not the published file (content %s…): their "
            "figures compare with no one else's, unless you converted that very file",
            network.fingerprint[:16],
        )
    extract = inception.make_extractor(network, mesh, evaluation.preprocessing)
    records = getattr(image_set, evaluation.reference)
    fingerprint = {
        "format": _FORMAT_VERSION,
        "images": image_set.fingerprint,
        "split": evaluation.reference,
        "num_images": len(records),
        "network": network.fingerprint,
        "preprocessing": evaluation.preprocessing,
        "num_features_kept": min(evaluation.num_kept_features, len(records)),
    }
    return Meter(
        extract,
        _open_reference(evaluation, records, extract, fingerprint),
        {
            "preprocessing": evaluation.preprocessing,
            "reference": evaluation.reference,
            "reference_images": image_set.fingerprint,
            "inception_weights": network.fingerprint,
            "inception_weights_published": network.published,
            "num_features": network.num_features,
            "num_kept_features": evaluation.num_kept_features,
        },
        evaluation.num_kept_features,
    )


def _open_reference(
    evaluation: Any, records: Any, extract: Extract, fingerprint: dict[str, Any]
) -> Reference:
    if evaluation.reference_path:
        path = Path(evaluation.reference_path).expanduser()
        if path.suffix != ".npz":
            raise InputError(
                f"evaluation.reference_path is {path}; a name that ends in .npz is "
                "needed"
            )
    else:
        name = digest(json.dumps(fingerprint, sort_keys=True).encode())[:32]
        path = cache_directory("reference") / f"{name}.npz"
    kept = fault = None
    if path.exists():
        try:
            kept = load_reference(path, fingerprint)
        except InputError as error:
            fault = error
    # Together: what follows is computed on the devices of all processes.
    if parallel.all_agree(kept is not None):
        return kept
    faultless = parallel.all_agree(fault is None)
    if evaluation.reference_path and not faultless:
        raise fault or InputError(
            f"evaluation.reference_path is {path}, which another process cannot read; "
            "look at its message"
        )
    if fault is not None:
        _put_aside(path, fault)
    writable = _is_writable(path.parent)
    if evaluation.reference_path and not writable:
        raise InputError(
            f"evaluation.reference_path is {path}, where no file can be written; name "
            "another, or leave it empty"
        )
    num = len(records)
    logging.info("computing the reference statistics of %d images once", num)
    keep = np.random.default_rng(_SEED).permutation(num)
    keep = np.sort(keep[: fingerprint["num_features_kept"]])
    found = collect(
        extract, _chunks_of(records, evaluation.batch_size), keep, keep_logits=False
    )
    reference = Reference(found.moments, found.features, fingerprint)
    try:
        if not writable:
            raise OSError(f"{path.parent} cannot be written to")
        save_reference(path, reference)
        logging.info("kept them in %s", path)
    except OSError as error:  # They are needed all the same.
        logging.warning("they are not kept for the next time: %s", error)
    return reference


def _put_aside(path: Path, fault: InputError) -> None:
    """Gives a damaged file of the cache another name, so that it is computed anew."""
    aside = path.with_name(path.name + ".damaged")
    logging.warning("%s: it is computed anew; the old one is kept as %s", fault, aside)
    try:
        path.replace(aside)
    except OSError as error:  # Another process was faster, or nothing can be written.
        logging.warning("%s cannot be renamed: %s", path, error)


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)
