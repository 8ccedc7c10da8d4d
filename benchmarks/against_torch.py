"""Our training step and a PyTorch one of the same game, by turns in one run.

  pip install torch
  python benchmarks/against_torch.py --recipes=released_gaussians25,photos32
  python benchmarks/against_torch.py --recipes=cifar10 --batch=64 --dtype=bfloat16 \
      --compile

The PyTorch step (`torch_game`) has the same networks, draws, losses and optimisers; the
numbers of parameters are compared before anything is timed. Both get the same random
images, or points of the same distribution, and use the same cores of a CPU, or TF32 for
float32 products on a GPU. A turn is K steps, as many as training takes a dispatch, and
the wait for their result; PyTorch takes its K in a loop. Pairs of turns give the ratio
and its spread. Ours also computes what training reports (each term by t, norms of
gradients and updates), the PyTorch step its two losses only.

The time to the first step starts with networks and data in memory. Ours is that of the
first turn, with tracing and compilation; JAX's cache of compiled programs is off.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# JAX would keep most of a GPU's memory to itself; to be set before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from timing import counted_work, device_name, matmul_rate, print_rows
from torch_game import networks as torch_networks
from torch_game.step import Trainer, check

from ddaebm_jax import config as config_lib
from ddaebm_jax import experiment
from ddaebm_jax.config import recipes
from ddaebm_jax.training.dispatch import Dispatcher, steps_per_dispatch

_RECIPES = flags.DEFINE_list(
    "recipes", ["released_gaussians25", "photos32", "cifar10"], "Files of configs/."
)
_BATCH = flags.DEFINE_integer(
    "batch", 0, "0: the recipe's; of cifar10 on a CPU 4.", lower_bound=0
)
_PAIRS = flags.DEFINE_integer("pairs", 7, "Pairs of turns timed.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of images; in PyTorch by autocast."
)
_COMPILE = flags.DEFINE_bool(
    "compile", False, "Use torch.compile, and images channels last; for a GPU."
)
_CPU_BATCH = {"cifar10": 4}
_POOL = 100_000  # Points from which the PyTorch step draws.

# A turn: takes its steps, awaits them, and returns the losses of both players.
Turn = Callable[[], tuple[float, float]]


def _config(name: str, on_cpu: bool) -> Any:
    """Returns a recipe with the flags' values."""
    config = recipes.load(name)
    if _BATCH.value:
        config.data.batch_size = _BATCH.value
    elif on_cpu:
        config.data.batch_size = _CPU_BATCH.get(name, config.data.batch_size)
    config.model.dtype = _DTYPE.value
    config.parallel.num_devices = 1
    config_lib.validate(config)
    check(config)
    return config


def _our_turn(
    described: experiment.Experiment, steps: int, images: np.ndarray | None
) -> tuple[Turn, Callable[[], int]]:
    """Returns our turn, and a function for the work of one step, FLOP."""
    dispatcher = Dispatcher(described)
    held = [dispatcher.init()]

    def turn():
        held[0], metrics, _ = dispatcher(held[0], steps, images)
        jax.block_until_ready((held[0], metrics))
        return float(metrics["energy/loss"]), float(metrics["generator/loss"])

    def work():
        program = dispatcher.steps.program(steps)
        traced = program.trace(held[0], *dispatcher.inputs(images))
        return counted_work(traced.jaxpr) // steps

    return turn, work


def _torch_turns(
    described: experiment.Experiment,
    networks: dict[str, torch.nn.Module],
    device: torch.device,
    images: np.ndarray | None,
) -> Callable[[int], Turn]:
    """Returns K → PyTorch's turn of K steps."""
    config = described.config
    schedule = {
        name: torch.from_numpy(np.array(values)).to(device)
        for name, values in vars(described.schedule).items()
    }
    trainer = Trainer(config, networks, schedule, _COMPILE.value)
    if images is None:
        pool = torch.from_numpy(np.array(described.source.held_out(_POOL, 0)))
        pool = pool.to(device)
    else:
        batches = torch.from_numpy(images.transpose(0, 1, 4, 2, 3).copy())
        batches = batches.to(device)

    def batch(i: int) -> torch.Tensor:
        if images is not None:
            return batches[i]
        chosen = torch.randint(_POOL, (config.data.batch_size,), device=device)
        return pool[chosen]

    def turns(steps: int) -> Turn:
        def turn():
            losses = [torch.stack(trainer.step(batch(i))) for i in range(steps)]
            energy, generator = torch.stack(losses).mean(dim=0).tolist()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return energy, generator

        return turn

    return turns


def _compare_counts(
    described: experiment.Experiment, networks: dict[str, torch.nn.Module]
) -> str:
    """Returns the numbers of parameters.

    Raises:
      RuntimeError: if a PyTorch network has another number than ours.
    """
    ours = experiment.state_shapes(described).variables
    found = []
    for player, network in networks.items():
        leaves = jax.tree.leaves(getattr(ours, player)["params"])
        own = sum(leaf.size for leaf in leaves)
        other = sum(parameter.numel() for parameter in network.parameters())
        if own != other:
            raise RuntimeError(
                f"the {player} has {own:,} parameters, in PyTorch {other:,}"
            )
        found.append(f"{player} {own:,}")
    return ", ".join(found)


def _seconds(turn: Turn) -> tuple[float, tuple[float, float]]:
    start = time.perf_counter()
    losses = turn()
    return time.perf_counter() - start, losses


def _rows(config: Any, device: torch.device) -> list[tuple[str, str]]:
    """Measures one recipe; returns what to print."""
    steps = config.train.steps_per_dispatch or steps_per_dispatch(config.model.name)
    batch, dtype = config.data.batch_size, jnp.dtype(config.model.dtype)
    described = experiment.build(config, open_images=False)
    shape = described.source.event_shape
    networks = torch_networks.build(config.model, shape)
    counts = _compare_counts(described, networks)
    networks = {player: network.to(device) for player, network in networks.items()}
    images = None
    if described.source.holds_images:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (steps, batch, *shape), np.uint8)

    before = matmul_rate(dtype=dtype)
    our_turn, work = _our_turn(described, steps, images)
    torch_turns = _torch_turns(described, networks, device, images)
    our_first, _ = _seconds(our_turn)
    torch_first, _ = _seconds(torch_turns(1))
    torch_turn = torch_turns(steps)
    our_turn()
    torch_turn()
    ours, others = [], []
    for _ in range(_PAIRS.value):
        seconds, our_losses = _seconds(our_turn)
        ours.append(seconds / steps)
        seconds, torch_losses = _seconds(torch_turn)
        others.append(seconds / steps)
    peak = max(before, matmul_rate(dtype=dtype))
    if not np.isfinite([our_losses, torch_losses]).all():
        raise RuntimeError(f"losses: {our_losses}, in PyTorch {torch_losses}")

    ratios = [other / own for own, other in zip(ours, others, strict=True)]
    own, other = statistics.median(ours), statistics.median(others)
    rate = work() / own
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs"
    return [
        ("step", f"batch {batch}, {dtype}, K = {steps}"),
        ("parameters", counts),
        ("losses of the last turn", _losses(our_losses, torch_losses)),
        ("ours", f"{own:.4g} s a step"),
        ("PyTorch", f"{other:.4g} s a step"),
        ("PyTorch / ours", f"{statistics.median(ratios):.2f} ({spread})"),
        ("to the first step, ours", f"{our_first:.2f} s (K = {steps})"),
        ("to the first step, PyTorch", f"{torch_first:.2f} s"),
        ("rate reached, ours", f"{rate / 1e9:.1f} GFLOP/s"),
        ("matmul rate", f"{peak / 1e9:.1f} GFLOP/s"),
        ("share, ours", f"{rate / peak:.1%}"),
    ]


def _losses(ours: tuple[float, float], others: tuple[float, float]) -> str:
    return (
        f"energy {ours[0]:.4g}, PyTorch {others[0]:.4g}; "
        f"generator {ours[1]:.4g}, PyTorch {others[1]:.4g}"
    )


def _torch_device() -> torch.device:
    """Returns JAX's kind of device for PyTorch, with its settings made alike."""
    if jax.default_backend() == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit(f"JAX runs on {device_name()}, and this PyTorch has no CUDA device")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    jax.config.update("jax_enable_compilation_cache", False)
    torch.manual_seed(0)
    device = _torch_device()
    on_cpu = device.type == "cpu"
    configs = {}
    for name in _RECIPES.value:
        try:
            configs[name] = _config(name, on_cpu)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
    kind = (
        f"CPU, threads: {torch.get_num_threads()}"
        if on_cpu
        else torch.cuda.get_device_name()
    )
    compiled = ", compiled, channels last" if _COMPILE.value else ""
    print_rows(
        [
            ("ours", f"{device_name()}, jax {jax.__version__}"),
            ("PyTorch", f"{kind}, torch {torch.__version__}{compiled}"),
        ]
    )
    for name, config in configs.items():
        print(f"\n{name}")
        print_rows(_rows(config, device))
        sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
