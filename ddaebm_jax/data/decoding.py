"""Decodes an image by Pillow and converts it to a model's shape.

Nothing of an image is dropped in silence: alpha, colour, 16 bits and missing pixels
are refused where the model has no place for them.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddaebm_jax.data.records import UnusableRecord
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.files import open_regular

MAX_FILE_BYTES = 256 * 2**20

# Left, top, right, bottom, in pixels.
Crop = tuple[int, int, int, int]

# Pillow's modes that convert without loss, by the number of channels; the first is
# the mode that they are converted to.
_LOSSLESS = {1: ("L", "1"), 3: ("RGB", "L", "1", "P")}


def prepare(
    image: Image.Image,
    size: int,
    channels: int,
    crop: Crop | None = None,
    name: str = "the image",
) -> UInt8[np.ndarray, "size size channels"]:
    """Returns a Pillow image as size × size pixels.

    In this order: turned as its EXIF orientation says, converted if that loses
    nothing, cropped to the box, resized so that the short side is `size` (bilinear,
    antialiased), and cropped at the centre. An image that is of the size already, as
    a sample of a model is, is not cropped, and its pixels do not change.

    Raises UnusableRecord, with the image's `name`, if it is smaller than `size` or
    than the box, or has what the result cannot hold: alpha, colour, more than 8 bits.
    """
    modes = _LOSSLESS[channels]
    transparent = "transparency" in image.info
    if transparent or image.mode not in modes:
        raise UnusableRecord(
            f"{name}: its mode is {image.mode}{' with transparency' * transparent}; "
            f"allowed for data.channels = {channels}: {', '.join(modes)}, without "
            f"transparency; convert it to {modes[0]} first"
            + (", or set data.channels = 3" if channels == 1 else "")
        )
    image = ImageOps.exif_transpose(image).convert(modes[0])
    if crop is not None and image.size != (size, size):
        left, top, right, bottom = crop
        width, height = image.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UnusableRecord(
                f"{name}: {width}×{height} pixels, and data.crop is {tuple(crop)} "
                "(left, top, right, bottom); a box inside of the image is needed"
            )
        image = image.crop(tuple(crop))
    width, height = image.size
    short = min(width, height)
    if short < size:
        raise UnusableRecord(
            f"{name}: {width}×{height} pixels{' once cropped' * (crop is not None)}; "
            f"at least {size} a side are needed; lower data.image_size or leave the "
            "image out"
        )
    if short > size:
        width, height = width * size // short, height * size // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.array(image, np.uint8).reshape(size, size, channels)


def decode_file(
    path: Path, name: str, size: int, channels: int, crop: Crop | None
) -> UInt8[np.ndarray, "size size channels"]:
    """Decodes a PNG or JPEG file, and prepares its image.

    Pillow's limits on pixels and text hold. Of a JPEG file with several pictures
    (MPO, as some cameras write) the first is taken; an animated PNG is refused. The
    file is called `name` in messages.

    Raises UnusableRecord if the file is damaged, too large or not usable by `prepare`,
    another InputError if the file system fails.
    """
    try:
        with (
            open_regular(path, MAX_FILE_BYTES, name) as file,
            Image.open(file, formats=("PNG", "JPEG")) as image,
        ):
            _check(image, name)
            image.load()
            return prepare(image, size, channels, crop, name)
    except UnusableRecord:
        raise
    except InputError as error:
        raise UnusableRecord(str(error)) from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged bytes.
        reason = one_line(error).replace(str(path), name)
        # Pillow's own OSErrors have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"{name}: cannot be read ({reason}); check that it is there and the "
                "file system works, and start again"
            ) from error
        raise UnusableRecord(
            f"{name}: cannot be decoded ({reason}); a whole PNG or JPEG file is "
            "needed; fetch it again or remove it"
        ) from error


def _check(image: Image.Image, name: str) -> None:
    """Refuses what Pillow would only warn of, or decode in part, before decoding."""
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UnusableRecord(
            f"{name}: {width}×{height} pixels; at most {limit} are allowed "
            "(PIL.Image.MAX_IMAGE_PIXELS); make it smaller"
        )
    if any(";16" in str(tile.args) for tile in image.tile):
        raise UnusableRecord(
            f"{name}: 16 bits a channel; 8 are allowed; convert it first"
        )
    if image.format == "PNG" and getattr(image, "is_animated", False):
        raise UnusableRecord(
            f"{name}: animated, {image.n_frames} frames; one is allowed; save the "
            "frames as files of their own"
        )
