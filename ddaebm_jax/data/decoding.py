"""Decodes an image by Pillow and converts it to a model's shape.

Alpha, colour and 16 bits are refused where the model has no place for them.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

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
# What undoes the EXIF orientations 2, 3, ….
_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
# Takes what a user should know about an image that is read.
Remark = Callable[[str], Any]


def silent(_: str) -> None:
    """Takes remarks that nobody reads."""


def prepare(
    image: Image.Image,
    size: int,
    channels: int,
    crop: Crop | None = None,
    name: str = "the image",
    remark: Remark = silent,
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
    image = _opaque(_upright(image, remark))
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


def _upright(image: Image.Image, remark: Remark) -> Image.Image:
    """Returns an image turned as its EXIF data say, which may be damaged."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        turn = _TURNS[orientation - 2] if orientation in range(2, 9) else None
    except MemoryError:
        raise
    except Exception:  # Damaged bytes show themselves in many kinds.
        remark("have unreadable EXIF data and are taken as upright")
        return image
    return image if turn is None else image.transpose(turn)


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
    path: Path,
    name: str,
    size: int,
    channels: int,
    crop: Crop | None,
    remark: Remark = silent,
) -> UInt8[np.ndarray, "size size channels"]:
    """Decodes a file of one of the `FORMATS`, and prepares its image.

    Pillow's limits on pixels and text hold. Of a file with several pictures the first
    is taken. Damaged text of a PNG is left out. The file is called `name` in messages.

    Raises UnusableRecord if the file is damaged, too large or not usable by `prepare`,
    another InputError if the file system fails.
    """
    how = size, channels, crop, name, remark
    kinds = f"a whole file of {', '.join(FORMATS)} is needed"
    with (
        reading(name, f"{kinds}; fetch it again or remove it"),
        open_regular(path, MAX_FILE_BYTES, name) as file,
    ):
        try:
            return _decode(file, *how)
        except (InputError, MemoryError):
            raise
        except Exception:
            file.seek(0)
            pixels_only = _pixels_of_png(file.read())
            if pixels_only is None:
                raise
        image = _decode(io.BytesIO(pixels_only), *how)
        remark("have damaged text or EXIF data, which is ignored")
        return image


def _decode(file: io.BufferedIOBase, *how: Any) -> np.ndarray:
    *_, name, remark = how
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
        image.load()
        pixels = prepare(image, *how)
        if remark is not silent:  # To count pictures takes time, and may fail.
            with contextlib.suppress(Exception):
                if getattr(image, "n_frames", 1) > 1:
                    remark("hold several pictures, of which the first is taken")
        return pixels


def _is_deep(kind: str, arguments: Any) -> bool:
    """Whether the arguments of Pillow's decoder tell of more than 8 bits a channel."""
    if kind == "PPM" and isinstance(arguments, tuple):
        return arguments[1] > 255
    return ";16" in str(arguments) and kind != "BMP"  # There it is of all channels.


def _pixels_of_png(data: bytes) -> bytes | None:
    """Returns a PNG file of the pixels, their transparency and whole EXIF data alone.

    None if it is no PNG file, or no end of it is found.
    """
    kept, start, kind = [data[:8]], 8, b""
    if kept != [b"\x89PNG\r\n\x1a\n"]:
        return None
    while kind != b"IEND":
        if len(data) < start + 12:
            return None
        length, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + 12 + length]
        start += 12 + length
        needed = kind[:1].isupper() or kind == b"tRNS"
        checksum = zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if needed or (kind == b"eXIf" and checksum == chunk[-4:]):
            kept.append(chunk)
    return b"".join(kept)
