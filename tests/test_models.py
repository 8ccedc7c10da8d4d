"""The perceptrons: parameters, input widths, batch norm."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from helpers import NZ, filled_variables, mlp_config, normals

from ddaebm_jax import models
from ddaebm_jax.config import choices
from ddaebm_jax.models import layers

BATCH = 5
TIMES = jnp.array([0, 1, 2, 3, 1])


def parameters(tree: dict, part: str) -> list[jax.Array]:
    return [
        leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if f"'{part}'" in jax.tree_util.keystr(path)
    ]


# The released toy networks.


def released(norm: str = "batch") -> models.Networks:
    config = mlp_config(
        nz=2,
        x_widths=(16, 32),
        t_embed_dim=16,
        t_widths=(16, 32),
        hidden=(300, 300),
        norm=norm,
        posterior_features=16,
    )
    return models.build(config, (2,))


@pytest.mark.parametrize(
    ("player", "inputs", "out", "heads"),
    [
        ("energy", 2, 1, []),
        ("generator", 4, 2, []),
        ("posterior", 4, 16, [(16, 2), (16, 2)]),
    ],
)
def test_released_shapes(player: str, inputs: int, out: int, heads: list):
    own = getattr(jax.eval_shape(released().init, jax.random.key(0)), player)
    kernels = [(inputs, 16), (16, 32), (16, 16), (16, 32)]
    kernels += [(64, 300), (300, 300), (300, out), *heads]
    # Batch norm follows every hidden layer but the time encoder's.
    norms = [] if player == "energy" else [(16,), (300,), (300,)]

    def shapes(part: str) -> list:
        return sorted(leaf.shape for leaf in parameters(own["params"], part))

    assert shapes("kernel") == sorted(kernels)
    assert shapes("bias") == sorted([kernel[1:] for kernel in kernels] + norms)
    assert shapes("scale") == norms
    assert ("batch_stats" in own) == (player != "energy")
    # One slope after each of the four hidden layers.
    assert shapes("slope") == [()] * 4


def test_released_initial_ranges():
    """Kernels and biases fill ±1/√fan_in; slopes start at ¼."""
    init = quick.jit(lambda key: released("none").init(key).generator["params"])
    params = init(jax.random.key(0, impl="unsafe_rbg"))  # Compiles fast.
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    kernels = {k: v for k, v in leaves.items() if "'kernel'" in k}
    assert len(kernels) == 7
    for name, kernel in kernels.items():
        bound = kernel.shape[0] ** -0.5
        bias = leaves[name.replace("'kernel'", "'bias'")]
        for values in (kernel, bias):
            assert np.abs(values).max() <= bound, name
        assert np.abs(kernel).max() > 0.9 * bound, name
        if kernel.size > 1000:
            np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
            assert abs(float(kernel.mean())) < 0.05 * bound
    biases = np.concatenate([v for k, v in leaves.items() if "bias" in k])
    assert len(np.unique(biases)) == len(biases)
    assert all(float(s) == 0.25 for s in parameters(params, "slope"))


# The layers.


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 13), (3, 3, 7, 12)])
def test_initial_kernels_are_jax_s_own(shape: tuple[int, ...]):
    key = jax.random.key(3)
    expected = jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
    np.testing.assert_array_equal(layers.uniform(key, shape, 0.5), expected)
    for scale in (1e-10, 0.1, 1.0):
        init = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
        found = layers.variance_scaling(scale)(key, shape)
        np.testing.assert_allclose(found, init(key, shape), rtol=1e-6)


def test_networks_by_hand():
    """Energy and posterior, layer by layer."""
    networks = models.build(mlp_config(), (2,))
    variables = filled_variables(networks)
    x, x_next = normals(0, BATCH, 2), normals(1, BATCH, 2)

    def dense(layer, h):
        kernel, bias = layer["dense"]["kernel"], layer["dense"]["bias"]
        return h @ np.asarray(kernel) + np.asarray(bias)

    def prelu(layer, h):
        return np.where(h > 0, h, float(layer["slope"]) * h)

    def trunk(p, h):
        layer = [p[f"UniformDense_{i}"] for i in range(7)]
        slope = [p[f"PReLU_{i}"] for i in range(4)]
        angle = np.asarray(TIMES)[:, None] * np.array([[1.0, 1e-4]])
        s = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        h = dense(layer[1], prelu(slope[0], dense(layer[0], h)))
        s = dense(layer[3], prelu(slope[1], dense(layer[2], s)))
        h = np.concatenate([h, s], axis=1)
        for i in (2, 3):
            h = prelu(slope[i], dense(layer[i + 2], h))
        return dense(layer[6], h)

    f, mu, logvar = quick.jit(
        lambda v: (
            networks.energy(v.energy, x, TIMES),
            *networks.posterior(v.posterior, x, x_next, TIMES),
        )
    )(variables)
    expected = trunk(variables.energy["params"]["Trunk_0"], np.asarray(x))[:, 0]
    np.testing.assert_allclose(f, expected, rtol=1e-4, atol=1e-5)

    params = variables.posterior["params"]
    h = trunk(params["Trunk_0"], np.concatenate([x, x_next], axis=1))
    np.testing.assert_allclose(mu, dense(params["mu"], h), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logvar, dense(params["logvar"], h), rtol=1e-4, atol=1e-5)


def test_every_activation_builds():
    for name in choices.ALLOWED["model.mlp.activation"]:
        networks = models.build(mlp_config(activation=name), (2,))
        variables = jax.eval_shape(networks.init, jax.random.key(0))
        slopes = parameters(variables.energy["params"], "slope")
        assert len(slopes) == (4 if name == "prelu" else 0)


def test_time_embedding():
    embedding = layers.sinusoidal_embedding(jnp.array([0, 3]), 16)
    w = 10_000.0 ** (-np.arange(8) / 7)
    for row, t in zip(embedding, (0, 3), strict=True):
        expected = np.concatenate([np.sin(t * w), np.cos(t * w)])
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    for width in (5, 2):
        with pytest.raises(ValueError, match=f"width is {width}"):
            layers.sinusoidal_embedding(jnp.array([0]), width)


def test_batch_norm():
    """Training uses the batch, evaluation what training has averaged."""
    module = layers.BatchNorm()
    x = 3.0 * normals(0, 64, 4) + 5.0
    variables = module.init(jax.random.key(0), x, train=False)
    apply = jax.jit(lambda v: module.apply(v, x, train=True, mutable=["batch_stats"]))
    y, moved = apply(variables)
    mean, var = np.asarray(x).mean(axis=0), np.asarray(x).var(axis=0)
    expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    stats = moved["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
    for _ in range(150):
        _, moved = apply({**variables, **moved})
    settled = module.apply({**variables, **moved}, x, train=False)
    np.testing.assert_allclose(settled, y, atol=1e-3)


def test_batch_norm_couples_examples_in_training_only():
    networks = models.build(mlp_config(norm="batch"), (2,))
    variables = filled_variables(networks)
    x, z = normals(0, BATCH, 2), normals(1, BATCH, NZ)
    v, w = variables.generator, variables.posterior

    @quick.jit
    def first_rows(rows):
        """Return each network's first row in evaluation, and in training."""
        evaluated = (
            networks.generator(v, rows, TIMES, z)[0],
            networks.posterior(w, rows, x, TIMES)[0][0],
        )
        trained = (
            networks.train_generator(v, rows, TIMES, z)[0][0],
            networks.train_posterior(w, rows, x, TIMES)[0][0][0],
        )
        return evaluated, trained

    evaluated, trained = first_rows(x)
    evaluated_other, trained_other = first_rows(x.at[1:].multiply(-2.0))
    for a, b in zip(evaluated, evaluated_other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(trained, trained_other, strict=True):
        assert np.abs(a - b).max() > 1e-3


def test_a_confined_energy_falls_off_in_every_direction():
    config = mlp_config()
    plain = models.build(config, (2,))
    config.confinement = 0.5
    confined = models.build(config, (2,))
    variables = filled_variables(plain).energy
    angles = np.linspace(0, 2 * np.pi, 60)
    circle = jnp.asarray(
        np.stack([np.cos(angles), np.sin(angles)], axis=1), jnp.float32
    )
    t = jnp.ones(60, jnp.int32)
    x = 1.5 * circle
    expected = plain.energy(variables, x, t) - 0.25 * (x**2).sum(axis=1)
    np.testing.assert_allclose(confined.energy(variables, x, t), expected, rtol=1e-6)
    radii = [confined.energy(variables, r * circle, t) for r in (1e2, 1e3, 1e4)]
    assert all((far < near).all() for near, far in itertools.pairwise(radii))
