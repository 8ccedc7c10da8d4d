"""The weights of `inception`'s network: read, checked, fetched once, converted.

  python -m ddaebm_jax.evaluation.inception_weights --weights=FILE.pth --output=FILE.npz

Files are data from outside: no pickle is executed, sizes are bounded, and every name,
shape and number is checked.
"""

import functools
import hashlib
import http.client
import os
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddaebm_jax import torch_files
from ddaebm_jax.data.npz_files import NpzFile, shown
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation.inception import Network, variable_shapes
from ddaebm_jax.files import cache_directory, open_regular, written_atomically

PUBLISHED_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED_BYTES = 95_628_359

_SUFFIXES = (".pth", ".pt", ".npz", ".safetensors")
# Of an NPZ file; the published weights take 95 MB.
_MOST_BYTES = 2**30

_TIMEOUT_SECONDS = 30.0
_SECONDS_BETWEEN_REPORTS = 5.0
_CHUNK_BYTES = 2**20


def load_network(path: str = "") -> Network:
    """Reads the network's weights.

    Args:
      path: a state_dict as `.pth`, `.pt`, `.npz` or `.safetensors`; "": the published
        one, from the cache directory ($XDG_CACHE_HOME or ~/.cache, ddaebm_jax/
        inception/), into which it is fetched once (96 MB).

    Raises:
      InputError: if the file is not there or damaged, cannot be fetched, or does not
        hold this network's weights.
    """
    if not path:
        file = _published_file()
        return _network(torch_files.read_state_dict(file), str(file), published=True)
    file = Path(path).expanduser()
    if file.suffix not in _SUFFIXES:
        raise InputError(
            f"{file}: the suffix is {shown(file.suffix)}; allowed: "
            f"{', '.join(_SUFFIXES)}"
        )
    if not file.is_file():
        raise InputError(f"{file}: no such file; check the path")
    if file.suffix == ".npz":
        return _network(_read_npz(file), path, published=False)
    if file.suffix == ".safetensors":
        return _network(torch_files.read_safetensors(file), path, published=False)
    published = file.stat().st_size == PUBLISHED_BYTES and (
        _sha256(file) == PUBLISHED_SHA256
    )
    return _network(torch_files.read_state_dict(file), path, published)


def save_npz(network: Network, path: str | Path) -> None:
    """Writes the weights under their PyTorch names, so that `load_network` reads them.

    The file does not say where they came from: what is read from it is not
    `published`, but has the same fingerprint.

    Raises:
      InputError: if the file exists already, or its suffix is not `.npz`.
    """
    path = _new_npz(path)
    arrays = {
        _torch_name(_keys(place)): np.ascontiguousarray(_torch_layout(np.asarray(leaf)))
        for place, leaf in jax.tree.leaves_with_path(network.variables)
    }
    with written_atomically(path) as file:
        np.savez(file, **arrays)


def _new_npz(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path}: the suffix is {shown(path.suffix)}; use .npz")
    if path.exists():
        raise InputError(f"{path} exists already; name a new file")
    return path


_LAST_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _keys(place: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in place)


def _torch_name(keys: tuple[str, ...]) -> str:
    """(params, Mixed_5b, branch1x1, bn, scale) → Mixed_5b.branch1x1.bn.weight."""
    return ".".join((*keys[1:-1], _LAST_NAMES[keys[-1]]))


def _torch_layout(array: np.ndarray) -> np.ndarray:
    """Returns a view: HWIO → OIHW and [in, out] → [out, in]; vectors stay."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return array if axes is None else array.transpose(axes)


def _flax_layout(array: np.ndarray) -> np.ndarray:
    """Undoes `_torch_layout`."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return array if axes is None else array.transpose(axes)


@functools.cache
def _published_names() -> tuple[str, ...]:
    shapes = variable_shapes({})
    return tuple(
        _torch_name(_keys(place)) for place, _ in jax.tree.leaves_with_path(shapes)
    )


def _network(arrays: Mapping[str, np.ndarray], origin: str, published: bool) -> Network:
    """Checks a state_dict and brings it to Flax's layout.

    Raises:
      InputError: if names are missing or unknown, shapes do not fit one another, or
        numbers are not finite.
    """
    named = {
        name: array
        for name, array in arrays.items()
        if not name.endswith(".num_batches_tracked")
        and not name.startswith("AuxLogits.")
    }
    _check_names(named, origin)
    named = {name: _float32(name, array, origin) for name, array in named.items()}
    widths = _widths(named, origin)
    num_classes = named["fc.weight"].shape[0]
    shapes = variable_shapes(widths, num_classes)

    def converted(place: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _torch_name(_keys(place))
        array = _flax_layout(named[name])
        if array.shape != shape.shape:
            # Of a view of one number: the shape may be of any size.
            wanted = _torch_layout(np.broadcast_to(np.float32(0), shape.shape)).shape
            raise InputError(
                f"{origin}: {name} is {_dims(named[name].shape)}, but {_dims(wanted)} "
                "is needed behind the layers before it; use an Inception-v3 of the "
                "FID, not another network's weights"
            )
        return np.ascontiguousarray(array)

    return Network(
        variables=jax.tree.map_with_path(converted, shapes),
        fingerprint=_fingerprint(named),
        published=published,
        num_features=named["fc.weight"].shape[1],
        num_classes=num_classes,
        widths=widths,
    )


def _dims(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _check_names(named: Mapping[str, np.ndarray], origin: str) -> None:
    wanted = _published_names()
    faults = []
    for fault, names in (
        ("missing", [name for name in wanted if name not in named]),
        ("unknown", [name for name in named if name not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            faults.append(f"{fault}: {', '.join(map(shown, names[:3]))}{more}")
    if faults:
        raise InputError(
            f"{origin} does not hold the weights of the FID's Inception-v3; "
            f"{'; '.join(faults)}; use pytorch-fid's state_dict, {PUBLISHED_URL}"
        )


def _float32(name: str, array: np.ndarray, origin: str) -> np.ndarray:
    array = torch_files.finite_float32(name, array, origin, "fetch the file again")
    if name.endswith(".running_var") and (array < 0).any():
        raise InputError(
            f"{origin}: {name} holds {array.min():.3g}, and a variance cannot be below "
            "0; fetch the file again"
        )
    return array


def _widths(named: Mapping[str, np.ndarray], origin: str) -> dict:
    """Returns the output channels of every convolution, nested by name."""
    widths: dict = {}
    for name, array in named.items():
        is_kernel = name.endswith(".conv.weight")
        wanted = 4 if is_kernel else 2 if name == "fc.weight" else 1
        if array.ndim != wanted or 0 in array.shape:
            raise InputError(
                f"{origin}: {name} is {_dims(array.shape)}; {wanted} axes, none of "
                "length 0, are needed; use pytorch-fid's state_dict"
            )
        if is_kernel:
            *blocks, layer = name.removesuffix(".conv.weight").split(".")
            node = widths
            for block in blocks:
                node = node.setdefault(block, {})
            node[layer] = array.shape[0]
    return widths


def _fingerprint(named: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of float32 weights in PyTorch's layout."""
    sha256 = hashlib.sha256()
    for name in sorted(named):
        array = named[name]
        sha256.update(f"{name} {array.shape}\n".encode())
        sha256.update(array.astype("<f4", copy=False).tobytes())
    return sha256.hexdigest()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    advice = "write it with numpy.savez(path, **arrays)"
    with NpzFile(path, _MOST_BYTES, advice) as file:
        return {name: file.read(array) for name, array in file.arrays.items()}


# The published file.


def _sha256(path: Path) -> str:
    with open_regular(path, 2 * PUBLISHED_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published_file() -> Path:
    """Returns the published file, which is fetched if it is not there.

    Raises:
      InputError: if what is there or comes is another file, or nothing comes.
    """
    path = cache_directory("inception") / PUBLISHED_URL.rsplit("/", 1)[-1]
    if not path.exists():
        _fetch(path)
        return path
    found = _sha256(path)
    if found != PUBLISHED_SHA256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {found}, and the published file's is "
            f"{PUBLISHED_SHA256}; remove it, and it is fetched again"
        )
    return path


def _fetch(path: Path) -> None:
    """Fetches the published file; it appears whole and checked, or not at all."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes may fetch at once.
        handle, name = tempfile.mkstemp(".partial", path.name + ".", path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            num_bytes = _download(file)
        found = _sha256(partial)
        if found != PUBLISHED_SHA256:
            raise InputError(
                f"{PUBLISHED_URL} gave {num_bytes} bytes with the SHA-256 {found}; the "
                f"published file has {PUBLISHED_BYTES} with {PUBLISHED_SHA256}; try "
                "again, or fetch it elsewhere and give it as --inception_weights=FILE"
            )
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the FID's Inception weights, {path.name}, could not be fetched from "
            f"{PUBLISHED_URL} to {path.parent} ({reason}); fetch that file elsewhere "
            "and give it as --inception_weights=FILE (=none: do without)"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _download(file: Any) -> int:
    """Writes what the URL gives; stops soon after the published number of bytes."""
    from absl import logging

    logging.info("fetching %s", PUBLISHED_URL)
    written, reported = 0, time.monotonic()
    with urllib.request.urlopen(PUBLISHED_URL, timeout=_TIMEOUT_SECONDS) as response:
        while written <= PUBLISHED_BYTES and (chunk := response.read(_CHUNK_BYTES)):
            file.write(chunk)
            written += len(chunk)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logging.info("%d of %d MB", written // 10**6, PUBLISHED_BYTES // 10**6)
    return written


# The command.


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a bad one ends the program with one line."""
    from absl import flags

    from ddaebm_jax.commands import command_line

    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        command_line.fail(f"{error}; --help lists the flags")


def main(argv: list[str]) -> None:
    """Converts what the flags name."""
    from absl import flags

    from ddaebm_jax.commands import command_line

    values = flags.FLAGS
    if len(argv) > 1:
        command_line.fail(f"what is {argv[1]!r}? Flags start with --")

    def convert() -> None:
        output = _new_npz(values.output)  # Before anything is fetched.
        save_npz(load_network(values.weights), output)

    command_line.in_one_line(convert)
    print(values.output)


if __name__ == "__main__":
    from absl import app, flags

    flags.DEFINE_string(
        "weights", "", "The state_dict to read; by default the published one."
    )
    flags.DEFINE_string("output", None, "The NPZ file to write.")
    flags.mark_flags_as_required(["output"])
    app.run(main, flags_parser=_parse_flags)
