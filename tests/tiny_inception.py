"""A small Inception-v3 of the FID in NumPy, with random weights.

Its layers are a table, written from the published network's description.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU.

    Attributes:
      name: within its block.
      width: output channels in the published network.
      kernel: height and width.
      source: layer that it reads; "in": the block's input; "avg", "max": that pooled.
      stride: in both directions.
      pad: zeros on each side, vertically and horizontally.
    """

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    source: str = "in"
    stride: int = 1
    pad: tuple[int, int] = (0, 0)


class Block(NamedTuple):
    """Layers, and those that are concatenated; "pool": the halved input."""

    layers: tuple[Conv, ...]
    out: tuple[str, ...]


def _a(pool: int) -> Block:
    layers = (
        Conv("branch1x1", 64),
        Conv("branch5x5_1", 48),
        Conv("branch5x5_2", 64, (5, 5), "branch5x5_1", pad=(2, 2)),
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3), "branch3x3dbl_1", pad=(1, 1)),
        Conv("branch3x3dbl_3", 96, (3, 3), "branch3x3dbl_2", pad=(1, 1)),
        Conv("branch_pool", pool, source="avg"),
    )
    return Block(layers, ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"))


def _b() -> Block:
    layers = (
        Conv("branch3x3", 384, (3, 3), stride=2),
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3), "branch3x3dbl_1", pad=(1, 1)),
        Conv("branch3x3dbl_3", 96, (3, 3), "branch3x3dbl_2", stride=2),
    )
    return Block(layers, ("branch3x3", "branch3x3dbl_3", "pool"))


def _c(c7: int) -> Block:
    wide, tall = {"kernel": (1, 7), "pad": (0, 3)}, {"kernel": (7, 1), "pad": (3, 0)}
    layers = (
        Conv("branch1x1", 192),
        Conv("branch7x7_1", c7),
        Conv("branch7x7_2", c7, source="branch7x7_1", **wide),
        Conv("branch7x7_3", 192, source="branch7x7_2", **tall),
        Conv("branch7x7dbl_1", c7),
        Conv("branch7x7dbl_2", c7, source="branch7x7dbl_1", **tall),
        Conv("branch7x7dbl_3", c7, source="branch7x7dbl_2", **wide),
        Conv("branch7x7dbl_4", c7, source="branch7x7dbl_3", **tall),
        Conv("branch7x7dbl_5", 192, source="branch7x7dbl_4", **wide),
        Conv("branch_pool", 192, source="avg"),
    )
    return Block(layers, ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"))


def _d() -> Block:
    layers = (
        Conv("branch3x3_1", 192),
        Conv("branch3x3_2", 320, (3, 3), "branch3x3_1", stride=2),
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7), "branch7x7x3_1", pad=(0, 3)),
        Conv("branch7x7x3_3", 192, (7, 1), "branch7x7x3_2", pad=(3, 0)),
        Conv("branch7x7x3_4", 192, (3, 3), "branch7x7x3_3", stride=2),
    )
    return Block(layers, ("branch3x3_2", "branch7x7x3_4", "pool"))


def _e(pool: str) -> Block:
    wide, tall = {"kernel": (1, 3), "pad": (0, 1)}, {"kernel": (3, 1), "pad": (1, 0)}
    layers = (
        Conv("branch1x1", 320),
        Conv("branch3x3_1", 384),
        Conv("branch3x3_2a", 384, source="branch3x3_1", **wide),
        Conv("branch3x3_2b", 384, source="branch3x3_1", **tall),
        Conv("branch3x3dbl_1", 448),
        Conv("branch3x3dbl_2", 384, (3, 3), "branch3x3dbl_1", pad=(1, 1)),
        Conv("branch3x3dbl_3a", 384, source="branch3x3dbl_2", **wide),
        Conv("branch3x3dbl_3b", 384, source="branch3x3dbl_2", **tall),
        Conv("branch_pool", 192, source=pool),
    )
    out = ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a")
    return Block(layers, (*out, "branch3x3dbl_3b", "branch_pool"))


# None: a pool over 3 × 3 places with stride 2.
STEM: tuple[Conv | None, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2),
    Conv("Conv2d_2a_3x3", 32, (3, 3)),
    Conv("Conv2d_2b_3x3", 64, (3, 3), pad=(1, 1)),
    None,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3)),
    None,
)
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("avg"),
    "Mixed_7c": _e("max"),
}
CLASSES = 1008


def shapes(divisor: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, widths divided by `divisor`."""
    found: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, layer: Conv, channels: int) -> int:
        width = layer.width // divisor
        name = prefix + layer.name
        found[f"{name}.conv.weight"] = (width, channels, *layer.kernel)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{statistic}"] = (width,)
        return width

    channels = 3
    for layer in STEM:
        channels = channels if layer is None else add("", layer, channels)
    for name, block in BLOCKS.items():
        widths = dict.fromkeys(("in", "avg", "max", "pool"), channels)
        for layer in block.layers:
            widths[layer.name] = add(f"{name}.", layer, widths[layer.source])
        channels = sum(widths[branch] for branch in block.out)
    found["fc.weight"] = (CLASSES // divisor, channels)
    found["fc.bias"] = (CLASSES // divisor,)
    return found


def weights(seed: int = 0, divisor: int = 16) -> Weights:
    """Return random float32 weights that keep activations of order one."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("bn.weight") or name.endswith("running_var"):
            return rng.uniform(0.7, 1.4, shape)
        if len(shape) == 1:
            return 0.2 * rng.normal(size=shape)
        return rng.normal(size=shape) * (2.0 / np.prod(shape[1:])) ** 0.5

    return {
        name: draw(name, shape).astype(np.float32)
        for name, shape in shapes(divisor).items()
    }


def write(path: Path, seed: int = 0, divisor: int = 16) -> Path:
    """Write an NPZ of `weights`, and return its path."""
    np.savez(path, **weights(seed, divisor))
    return path


# The network in NumPy, in float64, on arrays [n, channels, height, width].


def evaluate(found: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled features and the logits of images [n, 3, 299, 299]."""
    for layer in STEM:
        x = pool(x, "pool") if layer is None else _run(found, layer.name, layer, x)
    for name, block in BLOCKS.items():
        seen = {"in": x, **{kind: pool(x, kind) for kind in ("avg", "max", "pool")}}
        for layer in block.layers:
            inputs = seen[layer.source]
            seen[layer.name] = _run(found, f"{name}.{layer.name}", layer, inputs)
        x = np.concatenate([seen[branch] for branch in block.out], axis=1)
    features = x.mean((2, 3))
    return features, features @ found["fc.weight"].T


def _run(found: Weights, name: str, layer: Conv, x: np.ndarray) -> np.ndarray:
    kernel = found[f"{name}.conv.weight"]
    patches = _patches(_padded(x, layer.pad, 0.0), kernel.shape[2:], layer.stride)
    n, _, height, width = patches.shape[:4]
    columns = patches.transpose(0, 2, 3, 1, 4, 5).reshape(n * height * width, -1)
    x = columns @ kernel.reshape(len(kernel), -1).T.astype(np.float64)
    scale, shift, mean, var = (
        found[f"{name}.bn.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    x = np.maximum((x - mean) / np.sqrt(var + 1e-3) * scale + shift, 0.0)
    return x.reshape(n, height, width, -1).transpose(0, 3, 1, 2)


def pool(x: np.ndarray, kind: str) -> np.ndarray:
    """Return 3 × 3 pools: "avg", "max", or the halving maximum, "pool"."""
    if kind == "pool":
        return _patches(x, (3, 3), 2).max(axis=(4, 5))
    if kind == "max":
        return _patches(_padded(x, (1, 1), -np.inf), (3, 3), 1).max(axis=(4, 5))
    return np.nanmean(_patches(_padded(x, (1, 1), np.nan), (3, 3), 1), axis=(4, 5))


def _patches(x: np.ndarray, kernel: tuple, stride: int) -> np.ndarray:
    """Return [n, channels, height, width, *kernel]."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))
    return windows[:, :, ::stride, ::stride]


def _padded(x: np.ndarray, pad: tuple, value: float) -> np.ndarray:
    border = ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1]))
    return np.pad(x, border, constant_values=value)
