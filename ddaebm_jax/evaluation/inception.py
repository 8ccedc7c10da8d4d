"""The Inception-v3 network behind the FID and the Inception Score.

Szegedy et al. 2016 (arXiv 1512.00567) describe the network; Heusel et al. 2017 (arXiv
1706.08500) the distance. The weights are those of TensorFlow's graph of 2015-12-05,
and the layers are that graph's, which is not torchvision's network: average pools do
not count their padding, and the last block pools by maximum. The names of the weights
are those of pytorch-fid (https://github.com/mseitzer/pytorch-fid) and torch-fidelity
(https://github.com/toshas/torch-fidelity), which took the graph to PyTorch.

The layers' widths are those of the weights file, so that a small network with the
same names is a network too.
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

from ddaebm_jax import sharding as parallel
from ddaebm_jax.config.choices import PREPROCESSINGS
from ddaebm_jax.data.npz_files import shown
from ddaebm_jax.errors import InputError

SIDE = 299

_BATCH_NORM_EPSILON = 1e-3

_HIGHEST = jax.lax.Precision.HIGHEST

Widths = Mapping[str, Any]
Inputs = Float[Array, "n height width channels"]
Outputs = Float[Array, "n height2 width2 features"]


# The network. Widths in the code are the published ones; the weights file overrides.


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm by its running statistics, ReLU.

    Attributes:
      features: channels of the output.
      kernel: its height and width.
      stride: in both directions.
      padded: whether a border of zeros keeps the sides (at stride 1).
    """

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        border = [
            (side // 2, side // 2) if self.padded else (0, 0) for side in self.kernel
        ]
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=border,
            use_bias=False,
            precision=_HIGHEST,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=True, epsilon=_BATCH_NORM_EPSILON, name="bn"
        )(x)
        return nn.relu(x)


def _maker(widths: Widths) -> Callable[..., Any]:
    """Returns what adds a layer to the module that is being called."""

    def layer(
        x: Array,
        name: str,
        features: int,
        kernel: int | tuple[int, int] = 1,
        **kwargs: Any,
    ) -> Array:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        return ConvNorm(widths.get(name, features), sides, **kwargs, name=name)(x)

    return layer


def average_pool(x: Inputs) -> Outputs:
    """Returns means over 3 × 3 places, of those that lie within the image."""
    border = ((1, 1), (1, 1))
    return nn.avg_pool(x, (3, 3), padding=border, count_include_pad=False)


def max_pool(x: Inputs) -> Outputs:
    """Returns maxima over 3 × 3 places; sides stay."""
    return nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))


def halving_max_pool(x: Inputs) -> Outputs:
    """Returns maxima over 3 × 3 places, every second one; there is no border."""
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _joined(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """Mixed_5b, 5c and 5d, at 35 × 35 (figure 5 of Szegedy et al. 2016).

    Attributes:
      widths: of its layers, by name, where they are not the published ones.
      pool_features: published width of the layer behind the pool.
    """

    widths: Widths
    pool_features: int

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _maker(self.widths)
        one = layer(x, "branch1x1", 64)
        five = layer(x, "branch5x5_1", 48)
        five = layer(five, "branch5x5_2", 64, 5)
        three = layer(x, "branch3x3dbl_1", 64)
        three = layer(three, "branch3x3dbl_2", 96, 3)
        three = layer(three, "branch3x3dbl_3", 96, 3)
        pool = layer(average_pool(x), "branch_pool", self.pool_features)
        return _joined(one, five, three, pool)


class BlockB(nn.Module):
    """Mixed_6a, which takes 35 × 35 to 17 × 17.

    Attributes:
      widths: of its layers, by name, where they are not the published ones.
    """

    widths: Widths

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _maker(self.widths)
        three = layer(x, "branch3x3", 384, 3, stride=2, padded=False)
        double = layer(x, "branch3x3dbl_1", 64)
        double = layer(double, "branch3x3dbl_2", 96, 3)
        double = layer(double, "branch3x3dbl_3", 96, 3, stride=2, padded=False)
        return _joined(three, double, halving_max_pool(x))


class BlockC(nn.Module):
    """Mixed_6b to 6e, at 17 × 17 (figure 6).

    Attributes:
      widths: of its layers, by name, where they are not the published ones.
      inner: published width of the layers within.
    """

    widths: Widths
    inner: int

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer, inner = _maker(self.widths), self.inner
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
    """Mixed_7a, which takes 17 × 17 to 8 × 8.

    Attributes:
      widths: of its layers, by name, where they are not the published ones.
    """

    widths: Widths

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _maker(self.widths)
        three = layer(x, "branch3x3_1", 192)
        three = layer(three, "branch3x3_2", 320, 3, stride=2, padded=False)
        seven = layer(x, "branch7x7x3_1", 192)
        seven = layer(seven, "branch7x7x3_2", 192, (1, 7))
        seven = layer(seven, "branch7x7x3_3", 192, (7, 1))
        seven = layer(seven, "branch7x7x3_4", 192, 3, stride=2, padded=False)
        return _joined(three, seven, halving_max_pool(x))


class BlockE(nn.Module):
    """Mixed_7b and 7c, at 8 × 8 (figure 7).

    Attributes:
      widths: of its layers, by name, where they are not the published ones.
      pool: of the last branch: by average in 7b, by maximum in 7c.
    """

    widths: Widths
    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Inputs) -> Outputs:
        layer = _maker(self.widths)
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


class Stem(NamedTuple):
    """One layer before the blocks, at 299 × 299 to 35 × 35."""

    name: str
    features: int
    kernel: int
    stride: int = 1
    padded: bool = False
    pooled: bool = False


_STEM = (
    Stem("Conv2d_1a_3x3", 32, 3, stride=2),
    Stem("Conv2d_2a_3x3", 32, 3),
    Stem("Conv2d_2b_3x3", 64, 3, padded=True, pooled=True),
    Stem("Conv2d_3b_1x1", 80, 1),
    Stem("Conv2d_4a_3x3", 192, 3, pooled=True),
)


class Classifier(nn.Module):
    """The last layer. Its bias is part of the weights and is not added.

    Attributes:
      num_classes: of the logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, pool: Float[Array, "n d"]) -> Float[Array, "n classes"]:
        zeros = nn.initializers.zeros_init()
        kernel = self.param("kernel", zeros, (pool.shape[-1], self.num_classes))
        self.param("bias", zeros, (self.num_classes,))
        return jnp.matmul(pool, kernel, precision=_HIGHEST)


class InceptionV3(nn.Module):
    """The whole network, of images that `preprocess` gives.

    Attributes:
      widths: of its layers, nested by name, where they are not the published ones.
      num_classes: of the logits.
    """

    widths: Widths
    num_classes: int = 1008

    @nn.compact
    def __call__(
        self, x: Float[Array, "n 299 299 3"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "n classes"]]:
        layer = _maker(self.widths)
        for name, features, kernel, stride, padded, pooled in _STEM:
            x = layer(x, name, features, kernel, stride=stride, padded=padded)
            x = halving_max_pool(x) if pooled else x
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
    """Returns the shapes of a network's variables; nothing is computed.

    Args:
      widths: of layers that are not as published, nested by name.
      num_classes: of the logits.
    """
    network = InceptionV3(widths, num_classes)
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), image)


# Images.


def preprocess(
    images: Shaped[Array | np.ndarray, "..."], convention: str
) -> Float[Array, "n 299 299 3"]:
    """Returns images as the network sees them, about −1 … 1.

    `tf`, which the FID was published with (Heusel et al. 2017): TensorFlow 1's
    bilinear `resize` (no `align_corners`, no half pixels) to 299 × 299, so output
    pixel i lies at i·side/299, then (x − 128)/128. `pytorch_fid`: x/255, output pixel
    i at max((i + ½)·side/299 − ½, 0) (PyTorch's `interpolate` without
    `align_corners`), then 2x − 1. Neither widens its filter when an image shrinks.
    Grey images become three equal channels.

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
    """Returns the weights of bilinear interpolation along one axis; rows sum to 1."""
    out = np.arange(SIDE)
    if convention == "tf":
        # In whole numbers: the place in the image is an exact ratio.
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
            f"the preprocessing is {shown(convention)}; allowed: "
            f"{', '.join(PREPROCESSINGS)}"
        )


def _check_images(images: Any) -> None:
    shape = "×".join(map(str, images.shape)) or "a scalar"
    if images.dtype != np.uint8:
        raise InputError(
            f"images are of {images.dtype} ({shape}); uint8 is needed, 0 … 255; floats "
            "in [−1, 1] become that by ddaebm_jax.data.images.to_uint8"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise InputError(
            f"images are {shape}; n×height×width×1 (grey) or n×height×width×3 (colour) "
            "is needed; one image becomes that by images[None]"
        )


# Features.


class Network(NamedTuple):
    """A network's weights, on the host.

    Attributes:
      variables: what `InceptionV3` takes, float32.
      fingerprint: SHA-256 of the weights' names, shapes and numbers; the same for
        every format of file.
      published: whether the file was, byte for byte, the published `.pth`. A file of
        another format is never taken for it, whatever it holds.
      num_features: width of the pooled features; published: 2048.
      num_classes: of the logits; published: 1008.
      widths: of all layers, nested by name.
    """

    variables: Any
    fingerprint: str
    published: bool
    num_features: int
    num_classes: int
    widths: Widths


class Features(NamedTuple):
    """What the network says of images, on the host.

    Attributes:
      pool: activations averaged over space, of the FID.
      logits: of the classes, without the bias, of the Inception Score.
    """

    pool: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n classes"]


def make_extractor(
    network: Network, mesh: Mesh, preprocessing: str
) -> Callable[[Shaped[Array | np.ndarray, "..."]], Features]:
    """Returns what computes the features of uint8 images [n, height, width, 1 or 3].

    The batch is split over the mesh; any n will do, and each shape of batch is
    compiled once. On a mesh that spans processes, all of them call it with the same
    images, and each gets all features.

    Args:
      network: the weights; they are put on every device of the mesh.
      mesh: with the axis `parallel.DATA_AXIS`.
      preprocessing: one of `PREPROCESSINGS`.

    Raises:
      InputError: for another preprocessing; when called, for other images, see
        `preprocess`.
    """
    _check_convention(preprocessing)
    module = InceptionV3(network.widths, network.num_classes)
    whole = parallel.replicated(mesh)
    variables = jax.device_put(network.variables, whole)

    # The variables are an argument: as constants they would be part of the program.
    @functools.partial(jax.jit, out_shardings=whole)
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
        pool, logits = compute(variables, parallel.split_rows(mesh, images))
        return Features(np.asarray(pool)[:count], np.asarray(logits)[:count])

    return extract
