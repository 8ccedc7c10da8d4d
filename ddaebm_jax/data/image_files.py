"""Images from folders and NPZ files."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8

from ddaebm_jax.data.decoding import Crop, decode_file
from ddaebm_jax.data.records import (
    ImageSet,
    Records,
    Subset,
    digest,
    hold_out,
    split_set,
    stack,
)
from ddaebm_jax.data.threads import TIMEOUT, in_parallel
from ddaebm_jax.errors import InputError, listed
from ddaebm_jax.files import choose_array, npz_headers, printable, read_npz
from ddaebm_jax.paths import user_path

SUFFIXES = (".png", ".jpg", ".jpeg")
# Most bytes of decoded images that are kept in memory.
MAX_BYTES = 4 * 2**30


class FolderImages(NamedTuple):
    """The usable images of a folder, in the order of their names."""

    records: Records
    names: tuple[str, ...]  # Printable.
    num_skipped: int
    content_sha256: str


@dataclasses.dataclass
class _Files:
    """Images that are decoded whenever they are read; `how`: size, channels, crop."""

    folder: Path
    names: tuple[str, ...]
    how: tuple[int, int, Crop | None]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        return decode_file(self.folder / name, printable(name), *self.how)


def read_folder(
    path: str | Path,
    size: int,
    channels: int,
    crop: Crop | None = None,
    skip_corrupt: bool = False,
    timeout: int | float = TIMEOUT,
) -> FolderImages:
    """Reads and prepares every PNG and JPEG file of a folder and its subfolders.

    Every file is decoded, so that all unusable ones are found at once; with
    `skip_corrupt` they are skipped with a warning. Images are kept in memory if they
    take at most `MAX_BYTES`, else read again on demand. Hidden files are left out.

    Raises FileNotFoundError, or InputError if there is no image or an unusable file,
    or no progress for `timeout` seconds.
    """
    folder = user_path(path, "data.path")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; check the path")
    paths = (p.relative_to(folder) for p in folder.rglob("*"))
    visible = (p for p in paths if not any(part[0] == "." for part in p.parts))
    images = (p.as_posix() for p in visible if p.suffix.lower() in SUFFIXES)
    names = tuple(sorted(images))
    if not names:
        raise InputError(
            f"{folder}: not a folder with images in it or below it; files that end in "
            f"{', '.join(SUFFIXES)} are needed; check the path"
        )
    files = _Files(folder, names, (size, channels, crop))
    keep = len(names) * size * size * channels <= MAX_BYTES
    kept = np.empty((len(names) if keep else 0, size, size, channels), np.uint8)

    def decode(index: int) -> bytes | InputError:
        try:
            image = files[index]
        except InputError as error:
            return error
        if keep:
            kept[index] = image
        return hashlib.sha256(image).digest()

    results = in_parallel(decode, len(names), f"{folder}: decoding images", timeout)
    errors = {names[i]: r for i, r in enumerate(results) if isinstance(r, InputError)}
    records: Records = kept if keep else files
    if errors:
        first, *_ = errors.values()
        found = f"{folder}: {len(errors)} of {len(names)} images are unusable"
        if len(errors) == len(names) or not skip_corrupt:
            raise InputError(
                f"{found}: {listed(map(printable, errors), 5)}; the first: {first}; or "
                "skip them, unless none is left: --config.data.skip_corrupt=True in "
                "training, --skip_corrupt in scoring"
            )
        logging.warning("%s and are skipped: %s", found, listed(errors.values(), 99))
        good = [i for i, name in enumerate(names) if name not in errors]
        records = Subset(records, np.array(good))
        names = tuple(names[i] for i in good)
    pixels = b"".join(result for result in results if isinstance(result, bytes))
    content = digest("\n".join(names).encode(errors="surrogateescape"), pixels)
    return FolderImages(records, tuple(map(printable, names)), len(errors), content)


def load_folder(data: Any, seed: int) -> ImageSet:
    """Loads the folder that a config's `data` section names, split by the seed.

    Raises what `read_folder` does.
    """
    size, channels = data.image_size, data.channels
    if not user_path(data.path).exists():
        raise FileNotFoundError(
            f"data.path is {data.path}: no such folder; give --config.data.path=… in "
            "training, --data_path=… to evaluate, where the images lie now"
        )
    folder = read_folder(
        data.path, size, channels, data.crop, data.skip_corrupt, data.timeout
    )
    return split_set(
        "folder",
        folder.records,
        (size, size, channels),
        hold_out(len(folder.names), data.test_fraction, seed, f"{data.path}: images"),
        folder.content_sha256,
        skipped=folder.num_skipped,
    )


def read_images(
    path: str | Path,
    event_shape: tuple[int, int, int],
    skip_corrupt: bool = False,
    crop: Crop | None = None,
    timeout: int | float = TIMEOUT,
) -> tuple[UInt8[np.ndarray, "n height width channels"], tuple[str, ...]]:
    """Returns images from outside, to be scored, and their names.

    A folder is read as by `read_folder`; a file's name is its path in the folder. An
    NPZ file's images are its array `x`, or its only 4-D array: uint8 [n, height,
    width, channels] of the model's shape, or [n, height, width] for one channel; their
    names are their indices. Raises FileNotFoundError, or InputError for what cannot
    be used.
    """
    path = user_path(path, "--input")
    if path.suffix.lower() == ".npz" and not path.is_dir():
        images = _read_npz(path, event_shape)
        return images, tuple(map(str, range(len(images))))
    size, _, channels = event_shape
    folder = read_folder(path, size, channels, crop, skip_corrupt, timeout)
    num_bytes = len(folder.names) * math.prod(event_shape)
    if num_bytes > MAX_BYTES:
        raise InputError(
            f"{path}: {len(folder.names)} images take {num_bytes} bytes; at most "
            f"{MAX_BYTES} are allowed; score the folder in parts"
        )
    found = stack(folder.records, None, f"{path}: reading images", timeout)
    return found, folder.names


def _read_npz(
    path: Path, event_shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "n height width channels"]:
    array = choose_array(path, npz_headers(path, MAX_BYTES), 4)
    if array.dtype != np.uint8 and not array.dtype.hasobject:
        raise InputError(
            f"{path}: the array {array} is not of uint8; pixels 0 … 255 are needed; "
            "for floats in [-1, 1] save numpy.round((x + 1) * 127.5).astype('uint8')"
        )
    allowed = [event_shape] + [event_shape[:2]] * (event_shape[2] == 1)
    if array.shape[1:] not in allowed or not array.shape[0]:
        shapes = " or ".join("n×" + "×".join(map(str, shape)) for shape in allowed)
        raise InputError(
            f"{path}: the array {array} is empty or not of the model's shape; {shapes} "
            "is needed; resize the images, or give them as a folder of files"
        )
    images = read_npz(path, MAX_BYTES, [array.name])[array.name]
    if images.max() == 1:
        raise InputError(
            f"{path}: the array {array} holds nothing above 1, so hardly pixels "
            "0 … 255; save (255 * x).astype('uint8')"
        )
    return images.reshape(-1, *event_shape)
