"""Decodes an image by Pillow and converts it to a model's shape.

Alpha, colour and 16 bits are refused where the model has no place for them.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddaebm_jax.data.records import reading
from ddaebm_jax.errors import InputError
from ddaebm_jax.files import open_regular

# Files of these formats are read, whatever their suffix says.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_FILE_BYTES = 256 * 2**20
# Pillow copies rows that are much longer for hours.
_MAX_SIDE = 2**16

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
    antialiased), and cropped at the centre. One that is of the size already stays.
    Opaque alpha is dropped; colour profiles are not applied.

    Raises InputError, with the image's `name`, if it is smaller than `size` or
    than the box, or has what the result cannot hold: alpha, colour, more than 8 bits.
    """
    modes = _LOSSLESS[channels]
    image = _opaque(ImageOps.exif_transpose(image))
    transparent = "transparency" in image.info
    if transparent or image.mode not in modes:
        raise InputError(
            f"{name}: its mode is {image.mode}{' with transparency' * transparent}; "
            f"allowed for data.channels = {channels}: {', '.join(modes)}, without "
            f"transparency; convert it to {modes[0]} first"
            + (", or set data.channels = 3" if channels == 1 else "")
        )
    image = image.convert(modes[0])
    if crop is not None and image.size != (size, size):
        left, top, right, bottom = crop
        width, height = image.size
        if right > width or bottom > height:
            raise InputError(
                f"{name}: {width}×{height} pixels, and data.crop is {crop} "
                "(left, top, right, bottom); a box inside of the image is needed"
            )
        image = image.crop(crop)
    width, height = image.size
    short = min(width, height)
    if short < size:
        raise InputError(
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


def _opaque(image: Image.Image) -> Image.Image:
    """Returns an image without its alpha where that says nothing."""
    if image.mode not in ("RGBA", "PA", "LA") and "transparency" not in image.info:
        return image
    if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return image
    opaque = image.convert("L" if image.mode in ("LA", "L") else "RGB")
    opaque.info.pop("transparency", None)
    return opaque


def decode_file(
    path: Path, name: str, size: int, channels: int, crop: Crop | None
) -> UInt8[np.ndarray, "size size channels"]:
    """Decodes a file of one of the `FORMATS`, and prepares its image.

    Pillow's limits on pixels and text hold. The file is called `name` in messages.

    Raises UnusableRecord if the file is damaged, too large or not usable by `prepare`,
    another InputError if the file system fails.
    """
    kinds = f"a whole file of {', '.join(FORMATS)} is needed"
    with (
        reading(name, f"{kinds}; fetch it again or remove it"),
        open_regular(path, MAX_FILE_BYTES, name) as file,
    ):
        return _decode(file, size, channels, crop, name)


def _decode(file: io.BufferedIOBase, *how: Any) -> np.ndarray:
    *_, name = how
    with Image.open(file, formats=FORMATS) as image:
        if max(image.size) > _MAX_SIDE:
            width, height = image.size
            raise InputError(
                f"{name}: {width}×{height} pixels; at most {_MAX_SIDE} a side are "
                "allowed; cut it into parts"
            )
        # Pillow would drop half of the bits without a word.
        if any(_is_deep(image.format, tile.args) for tile in image.tile):
            raise InputError(
                f"{name}: 16 bits a channel; 8 are allowed; convert it first"
            )
        # MPO: a camera's JPEG, with previews of its picture.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise InputError(f"{name}: it holds several pictures; save each by itself")
        image.load()
        return prepare(image, *how)


def _is_deep(kind: str, arguments: Any) -> bool:
    """Whether the arguments of Pillow's decoder tell of more than 8 bits a channel."""
    if kind == "PPM" and isinstance(arguments, tuple):
        return arguments[1] > 255
    return ";16" in str(arguments) and kind != "BMP"  # There it is of all channels.
