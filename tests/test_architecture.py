"""The shape of the code: layers without circles, limits of size, a short step path."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from cli import ROOT, python

# From the bottom up. A module may import only from layers below its own and, where
# that makes no circle, from its own.
LAYERS = (
    ("errors", "paths", "files", "progress"),
    ("config",),
    ("levels", "diffusion", "models"),
    (
        *(
            "colour",
            "objective",
            "reference",
            "proposal",
            "game",
            "diagnostics",
            "losses",
            "step",
        ),
        *("sampling", "density", "restoration"),
    ),
    ("sharding",),
    ("weights", "torch_layout"),
    ("data",),
    ("experiment",),
    ("evaluation",),
    ("training",),
    ("commands", "interop"),
    ("api", "custom_loop"),
)
MATHEMATICS = (*LAYERS[2], *LAYERS[3])
# What the mathematics needs no part of, though it lies below.
NO_MATHEMATICS = ("config", "paths", "files", "progress")

STEP_PATH = (
    "launch/main.py",
    "ddaebm_jax/commands/cli.py",
    "ddaebm_jax/commands/train.py",
    "ddaebm_jax/training/loop.py",
    "ddaebm_jax/training/dispatch.py",
    "ddaebm_jax/experiment.py",
    "ddaebm_jax/sharding.py",
    "ddaebm_jax/step.py",
    "ddaebm_jax/game.py",
    "ddaebm_jax/losses.py",
    "ddaebm_jax/objective.py",
    "ddaebm_jax/diffusion.py",
)

PACKAGE = ROOT / "ddaebm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    """Return a module's name, as `ddaebm_jax.models.mlp`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}


def _imports(path: Path) -> set[str]:
    """Return the modules of this package that a file imports anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            # `from package import name`: a module, or something in one.
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    # The bare package holds the version only.
    return found - {"ddaebm_jax"}


def _graph() -> dict[str, set[str]]:
    return {name: _imports(path) for name, path in MODULES.items()}


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, if there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _layer(name: str) -> int:
    room = name.split(".")[1]
    found = [i for i, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{name} has no place in the layers"
    return found[0]


def test_no_module_and_no_room_imports_itself_through_others():
    """`evaluation` must not need `training`, and so on."""
    graph = _graph()
    assert _circle(graph) == []
    rooms: dict[str, set[str]] = {}
    for name in graph.keys() - {"ddaebm_jax"}:
        room = name.split(".")[1]
        others = {other.split(".")[1] for other in graph[name]}
        rooms[room] = rooms.get(room, set()) | others - {room}
    assert _circle(rooms) == []


def test_imports_point_down():
    upward = [
        f"{name} → {other}"
        for name, imports in _graph().items()
        for other in sorted(imports)
        if name != "ddaebm_jax" and _layer(other) > _layer(name)
    ]
    assert upward == []


def test_the_mathematics_imports_no_config_and_no_files():
    found = [
        f"{name} → {other}"
        for name, imports in _graph().items()
        for other in sorted(imports)
        if name != "ddaebm_jax"
        and name.split(".")[1] in MATHEMATICS
        and other.split(".")[1] in NO_MATHEMATICS
        # Names and numbers that networks share with the config's checks.
        and not (name.split(".")[1] == "models" and other.endswith("config.choices"))
    ]
    assert found == []


def test_files_and_functions_are_short():
    long = []
    for path in FILES:
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > 450:
            long.append(f"{_name(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            if lines > 80 and (_name(path), node.name) != (
                "ddaebm_jax.config.base",
                "base",
            ):
                long.append(f"{_name(path)}.{node.name}: {lines} lines")
    assert long == []


@pytest.mark.parametrize(
    ("folder", "most"), [("ddaebm_jax", 19_800), ("tests", 15_750)]
)
def test_the_whole_is_small(folder: str, most: int):
    files = (ROOT / folder).rglob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= most


@pytest.mark.parametrize("folder", ["ddaebm_jax", "launch", "tests", "benchmarks"])
def test_only_public_interfaces_are_used(folder: str):
    private = re.compile("_[s]rc|async_[s]ave|set_value_[s]tart")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert found == []


def test_the_step_path_is_short():
    """What a reader opens between the command and the gradient penalty.

    Each file is imported by an earlier one, so that the path is one of the code.
    """
    paths = [ROOT / name for name in STEP_PATH]
    assert [str(path) for path in paths if not path.is_file()] == []
    reached: set[str] = set()
    for path in paths:
        assert path == paths[0] or _name(path) in reached, path
        reached |= _imports(path)
    assert "def gradient_penalty(" in (PACKAGE / "objective.py").read_text()
    assert len(paths) <= 12
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 2_800


def test_the_step_reads_from_top_to_bottom():
    found = {
        node.name: node
        for node in ast.walk(ast.parse((PACKAGE / "step.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    step = found["step"]
    assert [argument.arg for argument in step.args.args] == ["state", "x0", "noise"]
    assert step.end_lineno - step.lineno + 1 <= 70


def test_the_launcher_is_flags_and_one_call():
    for name, most in (("launch/main.py", 15), ("ddaebm_jax/commands/cli.py", 80)):
        assert len((ROOT / name).read_text().splitlines()) <= most


# What mathematics, networks and features need: jax, flax, optax, jaxtyping, numpy.
_CORE_ROOMS = (*MATHEMATICS, "sharding", "weights", "errors", "paths", "files")
_CORE = [
    name
    for name in MODULES
    if name == "ddaebm_jax"
    or name.split(".")[1] in _CORE_ROOMS
    or name in ("ddaebm_jax.evaluation.fid", "ddaebm_jax.evaluation.inception")
]
_CHECK = f"""
import importlib, sys
others = "PIL absl clu etils filelock grain lmdb matplotlib ml_collections orbax pandas"
others += " safetensors sklearn tensorboard tensorboardX tensorflow torch"
others += " tensorflow_datasets"
needed = set(sys.modules)
import flax.linen, jax, jaxtyping, numpy, optax
needed = set(sys.modules) - needed
for name in others.split():
    if name not in needed:  # What those five bring is there anyway.
        sys.modules[name] = None
for name in {_CORE!r}:
    importlib.import_module(name)
"""


def test_the_core_imports_without_the_rest():
    assert len(_CORE) > 20
    result = python("-c", _CHECK)
    assert result.code == 0, result.err
