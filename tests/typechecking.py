"""What jaxtyping's import hook applies to the package while it is tested."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_functions(function: Callable, *args: Any, **kwargs: Any) -> Callable:
    """Returns `function` with its annotations checked at each call.

    Constructors are left alone: JAX rebuilds a pytree's dataclass around whatever
    stands for its arrays (shapes, shardings, axes to map, stacks of several).
    """
    if function.__name__ == "__init__":
        return function
    return beartype(function, *args, **kwargs)
