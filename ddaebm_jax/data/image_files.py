"""Images from folders and NPZ files, and images as PNG files."""

import collections
import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, UInt8
from PIL import Image

from ddaebm_jax.data.decoding import FORMATS, MAX_FILE_BYTES, Crop, decode_file
from ddaebm_jax.data.records import (
    ImageSet,
    Records,
    Subset,
    digest,
    hold_out,
    in_parallel,
    reading,
    split_set,
    stack,
)
from ddaebm_jax.errors import InputError, listed, one_line
from ddaebm_jax.files import (
    choose_array,
    npz_headers,
    open_regular,
    printable,
    read_npz,
    written_atomically,
)
from ddaebm_jax.paths import user_path

SUFFIXES = tuple(
    ".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm".split()
)
# Thumbnails, copies and trash that storage devices and archivers leave; dotted names
# are left out, too.
_LEFT_BY_OTHERS = (
    *("@eaDir", "#recycle", "@Recycle", "@__thumb", "__MACOSX", "$RECYCLE.BIN"),
    *("System Volume Information", "lost+found"),
)
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


def find_images(folder: Path) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Returns the sorted names of images in a folder and below, and what is left out.

    That is a number of files or folders for each reason. Links to folders are
    followed, but no folder is read twice, nor one that holds this one.

    Raises InputError for a folder that cannot be read, and a link to nothing.
    """
    names, left_out = [], collections.Counter()
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    folders, links = [""], []  # Links come last: a folder is known by its own name.
    while folders or links:
        name = (folders or links).pop()
        place = os.path.realpath(folder / name)
        if place in seen:
            left_out["linked folders that are read already or hold this one"] += 1
            continue
        seen.add(place)
        try:
            with os.scandir(folder / name) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            kinds = [entry.is_dir() for entry in entries]
        except OSError as error:
            raise InputError(
                f"{folder / printable(name)}: cannot be read ({one_line(error)}); give "
                "this user the right to read it, or leave it out of the folder"
            ) from error
        for entry, is_folder in zip(entries, kinds, strict=True):
            path = f"{name}/{entry.name}" if name else entry.name
            suffix = os.path.splitext(entry.name)[1]
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif is_folder and entry.name in _LEFT_BY_OTHERS:
                left_out[f"folders {entry.name}"] += 1
            elif is_folder:
                (links if entry.is_symlink() else folders).append(path)
            elif suffix.lower() in SUFFIXES:
                names.append(path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise InputError(
                    f"{folder / printable(path)}: a link to nothing that this user "
                    "can read; mend it or remove it"
                )
            else:
                left_out[f"*{printable(suffix)}" if suffix else "without suffix"] += 1
    return tuple(sorted(names)), left_out


def _counts(numbers: Mapping[str, int]) -> str:
    return listed(f"{number} {what}" for what, number in sorted(numbers.items()))


def read_folder(
    path: str | Path,
    size: int,
    channels: int,
    crop: Crop | None = None,
    skip_corrupt: bool = False,
) -> FolderImages:
    """Reads and prepares every image of a folder and its subfolders.

    Those are the files of `find_images`, all of which are decoded, so that unusable
    ones are found at once; with `skip_corrupt` they are skipped with a warning. Images
    are kept in memory if they take at most `MAX_BYTES`, else read again on demand. One
    line of the log says how many there are and what is left out.

    Raises FileNotFoundError, or InputError if there is no image or an unusable file.
    """
    folder = user_path(path, "data.path")
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; check the path; if a run's images have moved, "
            "give --config.data.path in training, --data_path in evaluation"
        )
    names, left_out = find_images(folder) if folder.is_dir() else ((), {})
    if not names:
        raise InputError(
            f"{folder}: not a folder with images in it or below it; files that end in "
            f"{', '.join(SUFFIXES)} are needed; check the path; left out: "
            f"{_counts(left_out)}"
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

    results = in_parallel(decode, len(names))
    errors = {names[i]: r for i, r in enumerate(results) if isinstance(r, InputError)}
    records: Records = kept if keep else files
    if errors:
        first, *_ = errors.values()
        found = f"{folder}: {len(errors)} of {len(names)} images are unusable"
        if len(errors) == len(names) or not skip_corrupt:
            raise InputError(
                f"{found}: {listed(map(printable, errors), 5)}; the first: {first}; if "
                "others are left, --config.data.skip_corrupt=True in training, or "
                "--skip_corrupt in scoring, skips them"
            )
        logging.warning("%s and are skipped: %s", found, listed(errors.values(), 99))
        good = [i for i, name in enumerate(names) if name not in errors]
        records = Subset(records, np.array(good))
        names = tuple(names[i] for i in good)
    logging.info(
        f"{folder}: {len(names)} images are read; left out: {_counts(left_out)}"
    )
    hashes = b"".join(result for result in results if isinstance(result, bytes))
    content = digest("\n".join(names).encode(errors="surrogateescape"), hashes)
    return FolderImages(records, tuple(map(printable, names)), len(errors), content)


def load_folder(data: Any, seed: int) -> ImageSet:
    """Loads the folder, or NPZ file, that `data.path` names, split by the seed.

    Raises what `read_folder` and `read_images` do.
    """
    size, channels = data.image_size, data.channels
    path = user_path(data.path, "data.path")
    if _is_npz(path):
        if data.crop is not None or data.skip_corrupt:
            raise InputError(
                f"{path}: data.crop and data.skip_corrupt are for folders of files; "
                "leave them out"
            )
        images = _read_npz(path, (size, size, channels))
        numbers = tuple(map(str, range(len(images))))
        folder = FolderImages(images, numbers, 0, digest(images))
    else:
        folder = read_folder(path, size, channels, data.crop, data.skip_corrupt)
    what = f"{data.path}: images"
    split = hold_out(len(folder.names), data.test_fraction, seed, what)
    return split_set(
        "folder",
        folder.records,
        (size, size, channels),
        split,
        folder.content_sha256,
        skipped=folder.num_skipped,
    )


def read_images(
    path: str | Path,
    event_shape: tuple[int, int, int],
    skip_corrupt: bool = False,
    crop: Crop | None = None,
    exact: bool = False,
) -> tuple[UInt8[np.ndarray, "n height width channels"], tuple[str, ...]]:
    """Returns images from outside, to be scored or restored, and their names.

    A folder is read as by `read_folder`; a file's name is its path in the folder. An
    NPZ file's images are its array `x`, or its only 4-D array: uint8 [n, height,
    width, channels] of the model's shape, or [n, height, width] for one channel; their
    names are their indices. Raises FileNotFoundError, or InputError for what cannot
    be used; if `exact`, also for files of another size, which are else resized.
    """
    path = user_path(path, "--input")
    if _is_npz(path):
        images = _read_npz(path, event_shape)
        return images, tuple(map(str, range(len(images))))
    size, _, channels = event_shape
    for name in find_images(path)[0] if exact and path.is_dir() else ():
        _check_size(path / name, printable(name), size)
    folder = read_folder(path, size, channels, crop, skip_corrupt)
    num_bytes = len(folder.names) * math.prod(event_shape)
    if num_bytes > MAX_BYTES:
        raise InputError(
            f"{path}: {len(folder.names)} images take {num_bytes} bytes; at most "
            f"{MAX_BYTES} are allowed; score the folder in parts"
        )
    found = stack(folder.records)
    return found, folder.names


def _check_size(path: Path, name: str, side: int) -> None:
    """Raises InputError for an image file that is not of this side."""
    with (
        reading(name, f"a file of {', '.join(FORMATS)} is needed; fetch it again"),
        open_regular(path, MAX_FILE_BYTES, name) as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        width, height = image.size
    if (width, height) != (side, side):
        raise InputError(
            f"{name}: {width}×{height} pixels; exactly {side}×{side} are needed, as "
            "nothing is resized or cropped; bring it to that size"
        )


def read_mask(path: str | Path, side: int) -> Bool[np.ndarray, "side side"]:
    """Returns which pixels of an image of this side are brighter than half."""
    path = user_path(path, "--mask")
    name = f"--mask={path}"
    _check_size(path, name, side)
    known = decode_file(path, name, side, 3, None).mean(axis=2) > 127
    if known.all() or not known.any():
        hidden = "nothing" if known.all() else "everything"
        raise InputError(
            f"{name} hides {hidden}; a hole of black pixels in a white image is needed"
        )
    return known


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz" and not path.is_dir()


def _read_npz(
    path: Path, event_shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "n height width channels"]:
    array = choose_array(path, npz_headers(path, MAX_BYTES), 4)
    allowed = [event_shape] + [event_shape[:2]] * (event_shape[2] == 1)
    if array.shape[1:] not in allowed or not array.shape[0]:
        shapes = " or ".join("n×" + "×".join(map(str, shape)) for shape in allowed)
        raise InputError(
            f"{path}: the array {array} is empty or not of the model's shape; {shapes} "
            "is needed; bring the images to that size"
        )
    images = read_npz(path, MAX_BYTES, [array.name])[array.name]
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: the array {array} holds no real numbers")
    low, high = float(images.min()), float(images.max())
    if array.dtype != np.uint8 or high == 1:
        raise InputError(
            f"{path}: the array {array} holds values from {low:g} to {high:g}; pixels "
            f"0 … 255 of uint8 are needed; {_as_pixels(low, high)}"
        )
    return images.reshape(-1, *event_shape)


def _as_pixels(low: float, high: float) -> str:
    """Returns how to make pixels of numbers in a range; says so rather than guesses."""
    if 0 <= low <= high <= 1:
        levels = "255.0 * x"
    elif -1 <= low <= high <= 1:
        levels = "(x + 1) * 127.5"
    elif 0 <= low <= high <= 255:
        levels = "x"
    else:  # NaN, too.
        return "bring them to that range"
    return f"save numpy.round({levels}).astype('uint8')"


def write_images(folder: Path, images: np.ndarray, names: Sequence[str] = ()) -> None:
    """Writes uint8 images [n, height, width, channels] as PNG files.

    They are called by `names`, paths of other image files, or else by number.
    """
    digits = len(str(len(images) - 1))
    stems = [name.rpartition(".")[0] for name in names]
    if len({*stems}) < len(stems):  # Such as a.jpg and a.bmp.
        stems = names
    stems = stems or [f"{i:0{digits}}" for i in range(len(images))]

    def save(i: int) -> None:
        write_image(folder / f"{stems[i]}.png", images[i])

    in_parallel(save, len(images))


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 image [height, width, channels] as a PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    with written_atomically(path) as file:
        Image.fromarray(pixels).save(file, "PNG")
