"""Images: sets opened by name, batches in a fixed order, and what a step draws.

On the host images are uint8; a step sees float32 in [−1, 1], through `draw`, whether
the whole set lies on the device or batches are fed from the host.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Key, Shaped, UInt8

from ddaebm_jax.data import image_files, image_sets, tfds_images
from ddaebm_jax.data.batches import Batches
from ddaebm_jax.data.image_files import read_images
from ddaebm_jax.data.records import ImageSet, SkipUnusable, stack

__all__ = ["Batches", "ImageSet", "read_images", "stack"]


def open_images(data: Any, seed: int) -> ImageSet:
    """Opens the image set that a config's `data` section names, split by the seed.

    Raises FileNotFoundError, or InputError for images that cannot be trained on.
    """
    if data.name == "digits":
        images = image_sets.load_digits(data, seed)
    elif data.name == "mnist5k":
        images = image_sets.load_mnist5k(data, seed)
    elif data.name == "photos":
        images = image_sets.load_photos(
            data.image_size, data.channels, data.num_patches, data.test_fraction, seed
        )
    elif data.name == "folder":
        images = image_files.load_folder(data, seed)
    else:
        images = tfds_images.load_tfds(data, seed)
    sizes = len(images.train), len(images.test)
    text = "data.name = '%s': %d images to train on, %d held out"
    logging.info(text, data.name, *sizes)
    if not data.skip_corrupt:
        return images
    # After the split: what is held out must not take the place of what is not.
    return dataclasses.replace(
        images,
        train=SkipUnusable(images.train, "the training images"),
        test=SkipUnusable(images.test, "the test images"),
    )


def to_float(images: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x / 127.5 − 1 as float32: 0 … 255 becomes −1 … 1."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """Returns [−1, 1] as 0 … 255, rounded and clipped; undoes `to_float` exactly."""
    levels = (jnp.asarray(images).astype(jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(levels), 0.0, 255.0).astype(jnp.uint8)


def draw(
    arrays: UInt8[Array, "n height width channels"] | None,
    batch: Shaped[Array | np.ndarray, "batch *shape"],
    keys: Key[Array, " batch"],
    flip: bool,
) -> Float[Array, "batch height width channels"]:
    """Returns a batch of x_0 in [−1, 1]; example i depends on its pixels and key i.

    Args:
      arrays: the whole training set, on the device; None: `batch` holds the images.
      batch: int32 indices into `arrays`, or uint8 images.
      keys: one for each example.
      flip: whether to mirror each example left to right with probability one half.
    """
    images = jnp.asarray(batch) if arrays is None else arrays[jnp.asarray(batch)]
    if flip:
        mirrored = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return to_float(images)
