"""Three exact forms of the FIR resampling, timed against each other.

  python benchmarks/resample.py

Slices (polyphase; what the networks use), matrices, and a depthwise convolution;
forward, and forward with gradient. Ratios are to the slices of the same run.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array
from timing import device_name, median_seconds

from ddaebm_jax.models import resample

_SHAPES = flags.DEFINE_list(
    "shapes", ["16x16x16x256", "4x32x32x128"], "batch x height x width x channels."
)

_TAPS = np.array([1.0, 3.0, 3.0, 1.0])


def _down_matrix(side: int) -> np.ndarray:
    matrix = np.zeros((side // 2, side), np.float32)
    for i in range(side // 2):
        for k, tap in enumerate(_TAPS / 8, start=2 * i - 1):
            if 0 <= k < side:
                matrix[i, k] += tap
    return matrix


def _by_matrix(x: Array, matrix: np.ndarray) -> Array:
    return jnp.einsum("ih,bhwc,jw->bijc", matrix, x, matrix)


def _depthwise(x: Array, gain: float, **kwargs) -> Array:
    channels = x.shape[-1]
    kernel = jnp.asarray(gain * np.outer(_TAPS, _TAPS) / 64, jnp.float32)
    return jax.lax.conv_general_dilated(
        x,
        jnp.tile(kernel[:, :, None, None], (1, 1, 1, channels)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        **kwargs,
    )


def _forms(side: int) -> dict[str, dict[str, Callable[[Array], Array]]]:
    down, up = _down_matrix(side), 2 * _down_matrix(2 * side).T
    return {
        "down": {
            "slices": resample.fir_down,
            "matrices": lambda x: _by_matrix(x, down),
            "depthwise": lambda x: _depthwise(
                x, 1.0, window_strides=(2, 2), padding=((1, 1), (1, 1))
            ),
        },
        "up": {
            "slices": resample.fir_up,
            "matrices": lambda x: _by_matrix(x, up),
            "depthwise": lambda x: _depthwise(
                x,
                4.0,
                window_strides=(1, 1),
                padding=((2, 2), (2, 2)),
                lhs_dilation=(2, 2),
            ),
        },
    }


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    print(f"{device_name()}, jax {jax.__version__}")
    print(f"{'shape':<14} {'':<5} {'form':<10} {'ms':>8} {'ratio':>7} {'grad ms':>9}")
    for text in _SHAPES.value:
        shape = tuple(map(int, text.split("x")))
        x = jax.random.normal(jax.random.key(0), shape)
        for way, forms in _forms(shape[1]).items():
            expected, base = forms["slices"](x), 0.0
            for name, form in forms.items():
                np.testing.assert_allclose(form(x), expected, atol=1e-4)
                forward, grad = (
                    jax.jit(form),
                    jax.jit(jax.grad(lambda x, form=form: (form(x) ** 2).sum())),
                )
                seconds = median_seconds(lambda f=forward, x=x: f(x))
                gradient = median_seconds(lambda g=grad, x=x: g(x))
                base = base or seconds
                print(
                    f"{text:<14} {way:<5} {name:<10} {1e3 * seconds:>8.2f} "
                    f"{seconds / base:>7.1f} {1e3 * gradient:>9.2f}"
                )


if __name__ == "__main__":
    app.run(main)
