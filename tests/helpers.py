"""Tiny games, networks and inputs that several test modules share."""

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddaebm_jax import diffusion, models
from ddaebm_jax.game import Game

DIM, NZ, STEPS, HIDDEN = 2, 3, 4, 5

SCHEDULE = diffusion.make_schedule(STEPS, min_posterior_var=1e-4)

# Every term takes part, with a weight of its own.
GAME = Game(
    gamma=0.3,
    lazy_reg=1,
    lambda_z=0.7,
    lambda_f=0.6,
    energy_l2=0.0,
    recon="nll",
    recon_latent="posterior",
    recon_floor=1e-2,
    latent=True,
    posterior=True,
    divergence="jeffreys",
)


@contextlib.contextmanager
def x64(on: bool = True) -> Iterator[None]:
    """Compute in double precision."""
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def normals(seed: int, *shape: int) -> jax.Array:
    """Return standard normal numbers in float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp_config(nz: int = NZ, **changes: Any) -> SimpleNamespace:
    """Return a tiny `model` section; `changes` go to `mlp`."""
    mlp = {
        "x_widths": (4, 4),
        "t_embed_dim": 4,
        "t_widths": (4, 4),
        "hidden": (8, 8),
        "activation": "prelu",
        "norm": "none",
        "posterior_features": 4,
    }
    section = SimpleNamespace(**mlp | changes)
    return SimpleNamespace(name="mlp", nz=nz, confinement=0.0, mlp=section)


def filled_like(shapes: Any, seed: int = 0) -> Any:
    """Return variables as large as trained ones."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return drawn / np.float32(math.prod(leaf.shape[:-1]) ** 0.5)
        return np.float32(path[-1].key in ("scale", "var")) + np.float32(0.1) * drawn

    return jax.tree.map_with_path(fill, shapes)


def filled_variables(networks: models.Networks) -> models.Players:
    """Return variables without compiling the initialisers."""
    return filled_like(jax.eval_shape(networks.init, jax.random.key(0)))


def _smooth_layer(params: dict, x: jax.Array, t: jax.Array) -> jax.Array:
    """Return tanh(x·w + b_t)·v + c_t, one hidden layer conditioned on time."""
    hidden = jnp.tanh(x @ params["w"] + params["b"][t])
    return hidden @ params["v"] + params["c"][t]


def _smooth_params(rng: np.random.Generator, inputs: int, out: int) -> dict:
    shapes = {
        "w": (inputs, HIDDEN),
        "b": (STEPS, HIDDEN),
        "v": (HIDDEN, out),
        "c": (STEPS, out),
    }
    return {k: jnp.asarray(0.5 * rng.normal(size=s), "f") for k, s in shapes.items()}


def smooth_networks(
    dim: int = DIM, nz: int = NZ, running_averages: bool = False
) -> models.Networks:
    """Return networks of one smooth layer each: quick to compile, everywhere C^∞.

    With `running_averages` generator and posterior average the inputs that they are
    trained on, as batch norm does.
    """

    def init(key: jax.Array) -> models.Players:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        variables = [
            {"params": _smooth_params(rng, inputs, out)}
            for inputs, out in ((dim, 1), (dim + nz, dim), (2 * dim, 2 * nz))
        ]
        if running_averages:
            for one in variables[1:]:
                one["batch_stats"] = {"seen": jnp.zeros((dim,))}
        return models.Players(*variables)

    def energy(variables, x, t, rngs=None):
        return _smooth_layer(variables["params"], x, t)[:, 0]

    def generator(variables, x_next, t, z, rngs=None):
        inputs = jnp.concatenate([x_next, z], axis=1)
        return _smooth_layer(variables["params"], inputs, t)

    def posterior(variables, x_t, x_next, t):
        inputs = jnp.concatenate([x_t, x_next], axis=1)
        moments = _smooth_layer(variables["params"], inputs, t)
        return moments[:, :nz], moments[:, nz:]

    def seen(variables, x):
        if not running_averages:
            return {}
        return {"seen": 0.5 * variables["batch_stats"]["seen"] + 0.5 * x.mean(axis=0)}

    return models.Networks(
        init=init,
        energy=energy,
        generator=generator,
        posterior=posterior,
        train_generator=lambda variables, x_next, t, z, rngs=None: (
            generator(variables, x_next, t, z),
            seen(variables, x_next + z[:, :1]),
        ),
        train_posterior=lambda variables, x_t, x_next, t: (
            posterior(variables, x_t, x_next, t),
            seen(variables, x_t),
        ),
        event_shape=(dim,),
        nz=nz,
    )


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float = 0.0):
    """Assert equal structures and nearly equal numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def assert_trees_equal(actual: Any, expected: Any):
    """Assert that two pytrees are the same, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def differ(first: Any, second: Any) -> bool:
    """Return whether any leaf of two pytrees of one structure differs."""
    return any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
