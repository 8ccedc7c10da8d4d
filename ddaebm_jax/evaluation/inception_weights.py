"""The weights of `inception`'s network: download, checks, conversion."""

import functools
import hashlib
import http.client
import shutil
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging

from ddaebm_jax import torch_layout
from ddaebm_jax.errors import InputError, one_line
from ddaebm_jax.evaluation.inception import Network, variable_shapes
from ddaebm_jax.files import open_regular
from ddaebm_jax.paths import cache_directory, user_path
from ddaebm_jax.weights import read_weights

PUBLISHED_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED_BYTES = 95_628_359

_REMEDY = f"use the weights of pytorch-fid's Inception-v3, {PUBLISHED_URL}"
_TIMEOUT_SECONDS = 30.0

Arrays = Mapping[str, np.ndarray]


def load_network(path: str = "") -> Network:
    """Return the network with the weights of a file.

    Args:
      path: of a state_dict as `.pth`, `.pt`, `.npz` or `.safetensors`; "": the
        published one, which is downloaded once (96 MB) into the cache directory,
        ddaebm_jax/inception/ in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      InputError: if the file is missing, damaged, cannot be downloaded, or does not
        hold this network's weights.
    """
    file = user_path(path) if path else _published_file()
    origin, paths = str(file), _paths()
    arrays = {
        name: array
        for name, array in read_weights(file).items()
        if not name.endswith(".num_batches_tracked")
        and not name.startswith("AuxLogits.")
    }
    same_size = file.stat().st_size == PUBLISHED_BYTES
    is_published = same_size and _sha256(file) == PUBLISHED_SHA256
    arrays = torch_layout.select_float32(arrays, paths, origin, _REMEDY)
    _check_values(arrays, origin)
    widths = _widths(arrays)
    num_classes, num_features = arrays["fc.weight"].shape
    shapes = variable_shapes(widths, num_classes)
    return Network(
        variables=torch_layout.to_flax(arrays, paths, shapes, origin, _REMEDY),
        fingerprint=_fingerprint(arrays),
        published=is_published,
        num_features=num_features,
        num_classes=num_classes,
        widths=widths,
    )


@functools.cache
def _paths() -> dict[str, tuple[str, ...]]:
    """Return PyTorch's names with their paths in Flax's variables.

    Mixed_5b.branch1x1.bn.weight → (params, Mixed_5b, branch1x1, bn, scale).
    """
    last = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    last |= {"mean": "running_mean", "var": "running_var"}
    keys = [
        tuple(part.key for part in path)
        for path, _ in jax.tree.leaves_with_path(variable_shapes({}))
    ]
    return {".".join((*path[1:-1], last[path[-1]])): path for path in keys}


def _check_values(arrays: Arrays, origin: str) -> None:
    """Check numbers of axes, from which shapes follow, and variances."""
    for name, array in arrays.items():
        ndim = 4 if ".conv." in name else 2 if name == "fc.weight" else 1
        if array.ndim != ndim or 0 in array.shape:
            raise InputError(
                f"{origin}: {name} has shape {torch_layout.format_shape(array.shape)}; "
                f"{ndim} axes of length 1 or more are needed; {_REMEDY}"
            )
        if name.endswith(".running_var") and (array < 0).any():
            raise InputError(
                f"{origin}: {name} holds {array.min():.3g}, and variances are at least "
                f"0; {_REMEDY}"
            )


def _widths(arrays: Arrays) -> dict:
    """Return the output channels of every convolution, nested by name."""
    widths: dict = {}
    for name, array in arrays.items():
        if name.endswith(".conv.weight"):
            *blocks, layer = name.removesuffix(".conv.weight").split(".")
            node = widths
            for block in blocks:
                node = node.setdefault(block, {})
            node[layer] = array.shape[0]
    return widths


def _fingerprint(arrays: Arrays) -> str:
    """Return the SHA-256 of float32 weights in PyTorch's layout."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        sha256.update(f"{name} {array.shape}\n".encode())
        sha256.update(array.astype("<f4", copy=False).tobytes())
    return sha256.hexdigest()


# The published file.


def _sha256(path: Path) -> str:
    with open_regular(path, 2 * PUBLISHED_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published_file() -> Path:
    """Return the published file in the cache, downloaded if it is missing."""
    path = cache_directory("inception") / PUBLISHED_URL.rsplit("/", 1)[-1]
    if not path.exists():
        _download(path)
    elif (found := _sha256(path)) != PUBLISHED_SHA256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {found} instead of {PUBLISHED_SHA256}; "
            "remove it, and it is downloaded again"
        )
    return path


def _download(path: Path) -> None:
    """Download the published file; it appears complete and checked, or not at all."""
    advice = "download it elsewhere and give it as --inception_weights=FILE"
    logging.info("downloading %s, %d MB", PUBLISHED_URL, PUBLISHED_BYTES // 10**6)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            # A folder of its own: several processes may download at once.
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
            urllib.request.urlopen(PUBLISHED_URL, timeout=_TIMEOUT_SECONDS) as response,
        ):
            partial = Path(folder) / path.name
            with partial.open("wb") as file:
                shutil.copyfileobj(response, file)
            found = _sha256(partial)
            if found != PUBLISHED_SHA256:
                raise InputError(
                    f"{PUBLISHED_URL} gave a file with the SHA-256 {found} instead of "
                    f"{PUBLISHED_SHA256}; try again, or {advice}"
                )
            partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"the FID's Inception weights, {path.name}, could not be downloaded from "
            f"{PUBLISHED_URL} to {path.parent} ({one_line(error)}); {advice} (=none: "
            "skip the FID)"
        ) from error
