"""The Inception-v3 network behind the FID and the Inception Score.

Network: Szegedy et al. 2016 (arXiv 1512.00567); FID: Heusel et al. 2017 (arXiv
1706.08500). Weights and layers are those of TensorFlow's graph of 2015-12-05, which
differs from torchvision's network: average pools exclude their padding, and the last
block pools by maximum. Weights are named as in the PyTorch conversions of that graph,
pytorch-fid (https://github.com/mseitzer/pytorch-fid) and torch-fidelity
(https://github.com/toshas/torch-fidelity).

The widths of the layers are those of the weights, so a narrow network works too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from ddaebm_jax import sharding
from ddaebm_jax.config.choices import PREPROCESSINGS
from ddaebm_jax.errors import InputError
from ddaebm_jax.torch_layout import format_shape

SIDE = 299

_HIGHEST = jax.lax.Precision.HIGHEST

Widths = Mapping[str, Any]
Inputs = Float[Array, "n height width channels"]
Outputs = Float[Array, "n height2 width2 features"]


# The network. Attributes named `widths` are the widths of a module's layers, nested by
# name; layers without an entry have the published width.


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with running statistics, ReLU."""

    features: int
    kernel: tuple[int, int]  # Height and width.
    stride: int = 1
    padded: bool = True  # With zeros, which keep the sides at stride 1.

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        pads = [side // 2 if self.padded else 0 for side in self.kernel]
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=[(pad, pad) for pad in pads],
            use_bias=False,
            precision=_HIGHEST,
            name="conv",
        )(x)
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")
        return nn.relu(norm(x))


def _layers(widths: Widths) -> Callable[..., Array]:
    """Return a function that adds a `ConvNorm` to the module being called."""

    def layer(
        x: Array, name: str, features: int, kernel: int | tuple = 1, **kwargs: Any
    ) -> Array:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        return ConvNorm(widths.get(name, features), sides, **kwargs, name=name)(x)

    return layer


def average_pool(x: Inputs) -> Outputs:
    """Return means over 3×3 windows without their padding; sides stay."""
    pads = ((1, 1), (1, 1))
    return nn.avg_pool(x, (3, 3), padding=pads, count_include_pad=False)


def max_pool(x: Inputs) -> Outputs:
    """Return maxima over 3×3 windows; sides stay."""
    return nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))


def halving_max_pool(x: Inputs) -> Outputs:
    """Return maxima over 3×3 windows with stride 2 and no padding."""
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _joined(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """Mixed_5b, 5c and 5d, at 35×35 (figure 5 of Szegedy et al. 2016)."""

    widths: Widths
    pool_features: int  # Published width of the layer after the pool.

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _layers(self.widths)
        one = layer(x, "branch1x1", 64)
        five = layer(x, "branch5x5_1", 48)
        five = layer(five, "branch5x5_2", 64, 5)
        three = layer(x, "branch3x3dbl_1", 64)
        three = layer(three, "branch3x3dbl_2", 96, 3)
        three = layer(three, "branch3x3dbl_3", 96, 3)
        pool = layer(average_pool(x), "branch_pool", self.pool_features)
        return _joined(one, five, three, pool)


class BlockB(nn.Module):
    """Mixed_6a, from 35×35 to 17×17."""

    widths: Widths

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _layers(self.widths)
        three = layer(x, "branch3x3", 384, 3, stride=2, padded=False)
        double = layer(x, "branch3x3dbl_1", 64)
        double = layer(double, "branch3x3dbl_2", 96, 3)
        double = layer(double, "branch3x3dbl_3", 96, 3, stride=2, padded=False)
        return _joined(three, double, halving_max_pool(x))


class BlockC(nn.Module):
    """Mixed_6b to 6e, at 17×17 (figure 6)."""

    widths: Widths
    inner: int  # Published width of all layers but the last of each branch.

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer, inner = _layers(self.widths), self.inner
        one = layer(x, "branch1x1", 192)
        seven = layer(x, "branch7x7_1", inner)
        seven = layer(seven, "branch7x7_2", inner, (1, 7))
        seven = layer(seven, "branch7x7_3", 192, (7, 1))
        double = layer(x, "branch7x7dbl_1", inner)
        double = layer(double, "branch7x7dbl_2", inner, (7, 1))
        double = layer(double, "branch7x7dbl_3", inner, (1, 7))
        double = layer(double, "branch7x7dbl_4", inner, (7, 1))
        double = layer(double, "branch7x7dbl_5", 192, (1, 7))
        pool = layer(average_pool(x), "branch_pool", 192)
        return _joined(one, seven, double, pool)


class BlockD(nn.Module):
    """Mixed_7a, from 17×17 to 8×8."""

    widths: Widths

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _layers(self.widths)
        three = layer(x, "branch3x3_1", 192)
        three = layer(three, "branch3x3_2", 320, 3, stride=2, padded=False)
        seven = layer(x, "branch7x7x3_1", 192)
        seven = layer(seven, "branch7x7x3_2", 192, (1, 7))
        seven = layer(seven, "branch7x7x3_3", 192, (7, 1))
        seven = layer(seven, "branch7x7x3_4", 192, 3, stride=2, padded=False)
        return _joined(three, seven, halving_max_pool(x))


class BlockE(nn.Module):
    """Mixed_7b and 7c, at 8×8 (figure 7)."""

    widths: Widths
    pool: Callable[[Array], Array]  # By average in 7b, by maximum in 7c.

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _layers(self.widths)
        one = layer(x, "branch1x1", 320)
        three = layer(x, "branch3x3_1", 384)
        three_a = layer(three, "branch3x3_2a", 384, (1, 3))
        three_b = layer(three, "branch3x3_2b", 384, (3, 1))
        double = layer(x, "branch3x3dbl_1", 448)
        double = layer(double, "branch3x3dbl_2", 384, 3)
        double_a = layer(double, "branch3x3dbl_3a", 384, (1, 3))
        double_b = layer(double, "branch3x3dbl_3b", 384, (3, 1))
        pool = layer(self.pool(x), "branch_pool", 192)
        return _joined(one, three_a, three_b, double_a, double_b, pool)


class Classifier(nn.Module):
    """The last layer. Its bias is one of the weights, but is not added."""

    num_classes: int

    @nn.compact
    def __call__(self, pool: Float[Array, "n d"]) -> Float[Array, "n classes"]:
        zeros = nn.initializers.zeros_init()
        kernel = self.param("kernel", zeros, (pool.shape[-1], self.num_classes))
        self.param("bias", zeros, (self.num_classes,))
        return jnp.matmul(pool, kernel, precision=_HIGHEST)


class InceptionV3(nn.Module):
    """The whole network: preprocessed images → (pooled features, logits)."""

    widths: Widths
    num_classes: int = 1008

    @nn.compact
    def __call__(
        self, x: Float[Array, "n 299 299 3"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "n classes"]]:
        layer = _layers(self.widths)
        x = layer(x, "Conv2d_1a_3x3", 32, 3, stride=2, padded=False)
        x = layer(x, "Conv2d_2a_3x3", 32, 3, padded=False)
        x = halving_max_pool(layer(x, "Conv2d_2b_3x3", 64, 3))
        x = layer(x, "Conv2d_3b_1x1", 80)
        x = halving_max_pool(layer(x, "Conv2d_4a_3x3", 192, 3, padded=False))
        blocks: dict[str, tuple] = {
            "Mixed_5b": (BlockA, 32),
            "Mixed_5c": (BlockA, 64),
            "Mixed_5d": (BlockA, 64),
            "Mixed_6a": (BlockB,),
            "Mixed_6b": (BlockC, 128),
            "Mixed_6c": (BlockC, 160),
            "Mixed_6d": (BlockC, 160),
            "Mixed_6e": (BlockC, 192),
            "Mixed_7a": (BlockD,),
            "Mixed_7b": (BlockE, average_pool),
            "Mixed_7c": (BlockE, max_pool),
        }
        for name, (block, *arguments) in blocks.items():
            x = block(self.widths.get(name, {}), *arguments, name=name)(x)
        pool = x.mean(axis=(1, 2))
        return pool, Classifier(self.num_classes, name="fc")(pool)


def variable_shapes(widths: Widths, num_classes: int = 1008) -> dict:
    """Return the shapes of a network's variables; see `InceptionV3`."""
    network = InceptionV3(widths, num_classes)
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), image)


def preprocess(
    images: Shaped[Array | np.ndarray, "..."], convention: str
) -> Float[Array, "n 299 299 3"]:
    """Return images as the network's input, with values of about −1 … 1.

    `tf`, as the FID was published (Heusel et al. 2017): TensorFlow 1's bilinear resize
    (neither `align_corners` nor half-pixel centres) to 299×299, so output pixel i lies
    at i·side/299; then (x − 128)/128. `pytorch_fid`: x/255; output pixel i lies at
    max((i + ½)·side/299 − ½, 0) (PyTorch's `interpolate` without `align_corners`); then
    2x − 1. Neither is antialiased. Grey images become three equal channels.

    Args:
      images: uint8, [n, height, width, 1 or 3].
      convention: one of `PREPROCESSINGS`.

    Raises:
      InputError: for another convention, or other images.
    """
    _check_convention(convention)
    _check_images(images)
    x = jnp.asarray(images).astype(jnp.float32)
    if convention == "pytorch_fid":
        x = x / 255.0
    rows, columns = (resize_matrix(side, convention) for side in x.shape[1:3])
    x = jnp.einsum("ph,nhwc->npwc", rows, x, precision=_HIGHEST)
    x = jnp.einsum("qw,npwc->npqc", columns, x, precision=_HIGHEST)
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return 2.0 * x - 1.0 if convention == "pytorch_fid" else (x - 128.0) / 128.0


def resize_matrix(side: int, convention: str) -> Float[np.ndarray, "299 side"]:
    """Return the weights of bilinear interpolation along one axis; rows sum to 1."""
    out = np.arange(SIDE)
    if convention == "tf":  # Positions are exact ratios of integers.
        below, rest = np.divmod(out * side, SIDE)
    else:
        doubled = np.maximum((2 * out + 1) * side - SIDE, 0)
        below, rest = np.divmod(doubled, 2 * SIDE)
        rest = rest / 2
    weight = rest / SIDE
    matrix = np.zeros((SIDE, side), np.float64)
    matrix[out, below] += 1.0 - weight
    matrix[out, np.minimum(below + 1, side - 1)] += weight
    return matrix.astype(np.float32)


def _check_convention(convention: str) -> None:
    if convention not in PREPROCESSINGS:
        raise InputError(
            f"the preprocessing is {convention!r}; allowed: {', '.join(PREPROCESSINGS)}"
        )


def _check_images(images: Any) -> None:
    shape = format_shape(images.shape)
    if images.dtype != np.uint8:
        raise InputError(
            f"images are {images.dtype} ({shape}); uint8 in 0 … 255 is needed; convert "
            "floats in [−1, 1] with ddaebm_jax.data.images.to_uint8"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise InputError(
            f"images are {shape}; n×height×width×1 (grey) or n×height×width×3 (colour) "
            "is needed; for one image, give images[None]"
        )


class Network(NamedTuple):
    """A network's weights, on the host.

    Attributes:
      variables: of `InceptionV3`, float32.
      fingerprint: SHA-256 of the weights' names, shapes and numbers, the same for every
        file format.
      published: whether the file was, byte for byte, the published `.pth`.
      num_features: width of the pooled features; published: 2048.
      num_classes: width of the logits; published: 1008.
      widths: of all layers, nested by name.
    """

    variables: Any
    fingerprint: str
    published: bool
    num_features: int
    num_classes: int
    widths: Widths


class Features(NamedTuple):
    """The network's outputs, for use by `numpy.asarray` when they are needed.

    Attributes:
      pool: activations averaged over space, for the FID.
      logits: of the classes, without the bias, for the Inception Score.
    """

    pool: Float[Array | np.ndarray, "n d"]
    logits: Float[Array | np.ndarray, "n classes"]


def make_extractor(
    network: Network, mesh: Mesh, preprocessing: str
) -> Callable[[Shaped[Array | np.ndarray, "..."]], Features]:
    """Return a function from uint8 images [n, height, width, 1 or 3] to `Features`.

    A batch of any size is split over the mesh; each shape is compiled once. On a mesh
    that spans processes, all of them call it with the same images and get all features.

    Raises:
      InputError: for another preprocessing than `PREPROCESSINGS`; when called, for
        other images, see `preprocess`.
    """
    _check_convention(preprocessing)
    module = InceptionV3(network.widths, network.num_classes)
    replicated = sharding.replicated(mesh)
    variables = jax.device_put(network.variables, replicated)

    # The variables are an argument: as constants they would be part of the program.
    @functools.partial(jax.jit, out_shardings=replicated)
    def compute(variables: Any, images: Array) -> tuple[Array, Array]:
        return module.apply(variables, preprocess(images, preprocessing))

    def extract(images: Shaped[Array | np.ndarray, "..."]) -> Features:
        _check_images(images)
        images = np.asarray(images)
        count = len(images)
        if not count:
            return Features(
                np.zeros((0, network.num_features), np.float32),
                np.zeros((0, network.num_classes), np.float32),
            )
        pool, logits = compute(variables, sharding.split_rows(mesh, images))
        return Features(pool[:count], logits[:count])

    return extract
