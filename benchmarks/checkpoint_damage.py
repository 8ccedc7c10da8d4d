"""Damages every kind of file of a checkpoint, and counts who notices.

  python benchmarks/checkpoint_damage.py --flips=50

After each damage Orbax describes and restores the checkpoint, knowing the right shapes;
then `Checkpoints.verify` compares it with the checksums. Damage that neither notices is
harmless where the state is still the one saved.
"""

import collections
import contextlib
import datetime
import platform
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from etils import epath

from ddaebm_jax.training import checkpoints as checkpoints_lib

_FLIPS = flags.DEFINE_integer("flips", 50, "Bytes flipped in each file.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the places.")
_STEP = 3
_OUTCOMES = ("by Orbax", "by checksums only", "by none, harmless", "by none, harmful")


@flax.struct.dataclass
class _State:
    step: jax.Array
    arrays: dict[str, jax.Array]


def _state() -> _State:
    """Arrays as training has them: dense ones, zeros, few numbers, several types."""
    rng = np.random.default_rng(0)
    arrays = {
        "dense": rng.normal(size=(256, 64)).astype("f"),
        "zeros": np.zeros((128, 64), "f"),
        "moments": rng.integers(0, 5, (64, 64)).astype("f"),
        "few": rng.normal(size=3).astype("f"),
        "flags": rng.random(40) < 0.5,
        "half": rng.normal(size=(32, 8)).astype(jnp.bfloat16),
    }
    return _State(jnp.int32(_STEP), jax.tree.map(jnp.asarray, arrays))


def _kind(file: Path) -> str:
    """The name of a file, without what is different in every checkpoint."""
    return re.sub(r"/d/[0-9a-f]{32}$", "/d/*", str(file))


def _damages(size: int, flips: int, rng: random.Random) -> Iterator[tuple[str, Any]]:
    yield "deleted", None
    yield "emptied", lambda content: b""
    for length in sorted({rng.randrange(1, max(2, size)) for _ in range(5)}):
        yield "truncated", lambda content, end=length: content[:end]
    for _ in range(flips):
        place, mask = rng.randrange(size), 1 << rng.randrange(8)
        yield (
            "byte flipped",
            lambda content, at=place, bits=mask: (
                content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
            ),
        )


def _restored(path: Path, like: Any) -> Any:
    """Returns what Orbax describes and restores, or None for an error."""
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            handler.metadata(epath.Path(path / "state"))
        with contextlib.closing(ocp.CompositeCheckpointHandler()) as handler:
            found = handler.restore(
                epath.Path(path),
                ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), info=ocp.args.JsonRestore()
                ),
            )
    except Exception:  # A dozen kinds.
        return None
    return found


def _same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def _outcome(workdir: Path, saved: Any) -> str:
    found = _restored(workdir / checkpoints_lib.NEWEST / str(_STEP), saved["state"])
    if found is None:
        return "by Orbax"
    checkpoints = checkpoints_lib.Checkpoints(workdir, read_only=True)
    try:
        checkpoints.verify(_STEP)
    except checkpoints_lib.DamagedCheckpointError:
        return "by checksums only"
    same = _same(found["state"], saved["state"]) and found["info"] == saved["info"]
    return "by none, harmless" if same else "by none, harmful"


def _measure(folder: Path) -> dict[tuple[str, str], collections.Counter]:
    rng = random.Random(_SEED.value)
    good = folder / "good"
    checkpoints = checkpoints_lib.Checkpoints(good)
    checkpoints.save(_state(), {"config": {"seed": 12345}, "fid": 17.25})
    checkpoints.close()
    top = good / checkpoints_lib.NEWEST / str(_STEP)
    saved = _restored(top, _state())
    counts: dict[tuple[str, str], collections.Counter] = {}
    kinds: dict[str, list[Path]] = {}
    for file in sorted(path for path in top.rglob("*") if path.is_file()):
        kinds.setdefault(_kind(file.relative_to(top)), []).append(file)
    for kind, members in kinds.items():
        for file in members:
            content = file.read_bytes()
            for damage, change in _damages(len(content), _FLIPS.value, rng):
                if change is None:
                    file.unlink()
                else:
                    file.write_bytes(change(content))
                found = _outcome(good, saved)
                counts.setdefault((kind, damage), collections.Counter())[found] += 1
                file.write_bytes(content)
    shutil.rmtree(good)
    return counts


def main(argv: list[str]) -> None:
    """Prints the table, in Markdown."""
    del argv
    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory() as folder:
        counts = _measure(Path(folder))
    names = ("orbax-checkpoint", "tensorstore", "jax")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(f"{versions}, Python {platform.python_version()}, {datetime.date.today()}\n")
    print(f"| file | damage | noticed {' | '.join(_OUTCOMES)} |")
    print("| --- | --- |" + " ---: |" * len(_OUTCOMES))
    for (kind, damage), found in counts.items():
        cells = " | ".join(str(found[outcome] or "") for outcome in _OUTCOMES)
        print(f"| `{kind}` | {damage} | {cells} |")


if __name__ == "__main__":
    app.run(main)
