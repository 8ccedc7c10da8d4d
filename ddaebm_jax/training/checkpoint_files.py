"""What a checkpoint is on disk: its parts, its checksums, and whether it is intact.

A checkpoint holds two items: `state`, the whole TrainState, and `info`, plain JSON
(format version, the config, a table's columns, standardisation and fingerprint).

`info` also holds a checksum of every array of the state, and one of its own. They
become visible together with what they vouch for, by Orbax's one rename.

Checkpoints are taken for what a stranger may have written. Orbax and TensorStore read
JSON, protocol buffers and compressed arrays; neither loads a pickle, and no code of a
checkpoint is run. What it declares is compared with what is wanted before it is read.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddaebm_jax.errors import InputError
from ddaebm_jax.training import checksums

FORMAT_VERSION = 1
# Folders of a run directory: the newest checkpoints, and the one of the lowest FID.
NEWEST, BEST = "checkpoints", "best"
STATE, INFO = "state", "info"
CHECKSUMS, _OWN_CHECKSUM = "checksums", "sha256"
# Orbax's names.
_INFO_FILE, _STEP_FILE = "metadata", "_CHECKPOINT_METADATA"
_TEXTS = (_INFO_FILE, _STEP_FILE, "_METADATA", "_sharding", ".zarray")
UNFINISHED = ocp.utils.TMP_DIR_SUFFIX

_LARGEST_TEXT = 64 * 2**20
# Arrays that declare more bytes than this times their files are not believed; below
# the allowance they are harmless. Zeros, as of a young optimiser, compress well.
_LARGEST_COMPRESSION, _ALLOWANCE = 200, 256 * 2**20
# What says of an error that the content is at fault, and of TensorStore's text that it
# is not.
_DAMAGE_NUMBERS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_PASSING_WORDS = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "ABORTED",
    *(
        os.strerror(number)
        for number in (
            errno.EIO,
            errno.ESTALE,
            errno.EMFILE,
            errno.ENFILE,
            errno.EACCES,
            errno.EPERM,
            errno.ENOSPC,
            errno.ENOMEM,
            errno.ETIMEDOUT,
        )
    ),
)


class CheckpointError(InputError):
    """A checkpoint that is missing or does not fit what is asked of it."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that does not hold what was once saved."""


class CheckpointReadError(CheckpointError):
    """A checkpoint that could not be read for now; nothing is said of what it holds."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written; those before it are intact."""


# What lies on disk.


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints of a directory, ascending.

    Complete means that all parts are there; `verify` tells whether they are intact.
    """
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if is_complete(path)]
    return sorted(int(name) for name in names)


def unfinished_in(directory: Path) -> list[Path]:
    """Returns what a process has left that was killed while it saved.

    Orbax writes into a directory of another name, and renames it at the end.
    """
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if UNFINISHED in path.name)


def incomplete_in(directory: Path) -> list[int]:
    """Returns the steps of folders that lack a part, ascending.

    They were being deleted when a process was killed, or are damaged.
    """
    return sorted(set(folders_in(directory)) - set(steps_in(directory)))


def folders_in(directory: Path) -> list[int]:
    """Returns the steps of all folders with a step's name, ascending."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _is_step(path.name)]
    return sorted(int(path.name) for path in found if path.is_dir())


def _is_step(name: str) -> bool:
    plain = name.isascii() and name.isdigit() and len(name) <= 18
    return plain and str(int(name)) == name


def is_complete(path: Path) -> bool:
    """Whether a folder is a step's, with all its parts."""
    files = (path / INFO / _INFO_FILE, path / _STEP_FILE)
    return (
        _is_step(path.name)
        and (path / STATE).is_dir()
        and all(file.is_file() for file in files)
    )


def size_of(path: Path) -> int:
    """Returns the bytes of all files below a path; links are not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # It may just be deleted.
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turns whatever reading a checkpoint raises into one of two errors.

    Orbax, TensorStore, JSON and the system raise a dozen kinds between them.

    Raises:
      CheckpointReadError: for a fault of the machine, which may pass.
      DamagedCheckpointError: for any other.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if _may_pass(error):
            raise CheckpointReadError(
                f"{path} could not be read ({reason_of(error)}); it is not judged as "
                "damaged: see to the disk, its rights or memory, and try again"
            ) from error
        raise DamagedCheckpointError(f"{path}: {reason_of(error)}") from error


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error tells of the machine rather than of what a file holds."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno not in _DAMAGE_NUMBERS
        if any(word in str(error) for word in _PASSING_WORDS):
            return True
        error = error.__cause__
    return False


def _not_looked_into(error: OSError) -> None:
    """Refuses to go on without a folder; `os.walk` would."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _check_files(path: Path) -> None:
    """Refuses what must not be opened: links out of the directory, pipes, devices."""
    root = path.parent.resolve()
    for folder, names, files in os.walk(path, onerror=_not_looked_into):
        for one in (Path(folder), *(Path(folder) / name for name in (*names, *files))):
            if one.is_symlink() and not one.resolve().is_relative_to(root):
                raise DamagedCheckpointError(
                    f"{one} is a link out of {root}, which is not followed"
                )
            if not (one.is_file() or one.is_dir()):
                raise DamagedCheckpointError(f"{one} is neither a file nor a folder")
            if one.name in _TEXTS and one.stat().st_size > _LARGEST_TEXT:
                raise DamagedCheckpointError(
                    f"{one} has {one.stat().st_size} bytes; at most {_LARGEST_TEXT} "
                    "are read"
                )


def _digest(info: dict[str, Any]) -> str:
    """Returns the SHA-256 of JSON values, however they were laid out."""
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(info: dict[str, Any]) -> dict[str, Any]:
    """Returns JSON values with their own checksum, as `read_info` verifies it."""
    plain = json.loads(json.dumps(info))  # as it will be read
    return {**plain, _OWN_CHECKSUM: _digest(plain)}


def read_info(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's JSON values, and verifies them.

    Args:
      path: of the checkpoint, `<workdir>/<folder>/<step>`.

    Raises:
      DamagedCheckpointError: if they are not what was saved.
      CheckpointError: if they are of another format.
    """
    with damage(path):
        _check_files(path)
        file = path / INFO / _INFO_FILE
        if not is_complete(path):
            raise DamagedCheckpointError(f"{path} lacks a part: it was never finished")
        info = json.loads(file.read_text())
        if not isinstance(info, dict):
            raise DamagedCheckpointError(f"{file} holds no JSON object")
        if CHECKSUMS in info or _OWN_CHECKSUM in info:
            rest = {name: v for name, v in info.items() if name != _OWN_CHECKSUM}
            if info.get(_OWN_CHECKSUM) != _digest(rest):
                raise DamagedCheckpointError(f"{file} does not match its checksum")
            sums = info.get(CHECKSUMS)
            if not isinstance(sums, dict) or not all(
                isinstance(one, str) for one in sums.values()
            ):
                raise DamagedCheckpointError(f"{file} lacks the state's checksums")
    if info.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {info.get('format')!r}; this version reads "
            f"{FORMAT_VERSION}: use the version that wrote it"
        )
    return info


def declared(path: Path) -> Any:
    """Returns the tree of a checkpoint's arrays as their files describe them.

    Raises:
      DamagedCheckpointError: if their sizes cannot be true.
    """
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(path / STATE)).tree
    declared = 0
    for keys, leaf in jax.tree.leaves_with_path(tree):
        chunk = leaf.storage.chunk_shape if leaf.storage else leaf.shape
        if any(
            part > max(size, 1) for part, size in zip(chunk, leaf.shape, strict=True)
        ):
            raise DamagedCheckpointError(
                f"{path / STATE}: {checksums.name_of(keys)} has parts of {chunk}, "
                f"larger than the whole, {leaf.shape}"
            )
        declared += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    on_disk = size_of(path / STATE)
    if declared > _ALLOWANCE + _LARGEST_COMPRESSION * on_disk:
        raise DamagedCheckpointError(
            f"{path / STATE} declares {declared} bytes of arrays in files of "
            f"{on_disk}; that much does not fit into them"
        )
    return tree


def verify(workdir: str | Path, folder: str, step: int) -> CheckpointError | None:
    """Verifies a checkpoint; no device computes, and no config is needed.

    The arrays are read into host memory. One that was saved by a version that made no
    checksums is only read.

    Args:
      workdir: the run directory.
      folder: NEWEST or BEST.
      step: of the checkpoint.

    Returns:
      What is wrong with it, None: nothing. A DamagedCheckpointError: it is not what
      was saved; a CheckpointReadError: it could not be read for now; another
      CheckpointError: it is of another format.
    """
    path = Path(workdir).resolve() / folder / str(step)
    try:
        with damage(path):
            info = read_info(path)
            tree = declared(path)
            expected = info.get(CHECKSUMS)
            if expected is not None:
                check_described(path, expected, tree)
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
            )
            with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                state = handler.restore(
                    epath.Path(path / STATE),
                    args=ocp.args.PyTreeRestore(restore_args=as_numpy),
                )
            if expected is not None:
                check_sums(path, expected, state)
    except CheckpointError as error:
        return error
    return None


def check_described(path: Path, expected: dict[str, str], tree: Any) -> None:
    """Compares what the checksums are of with the arrays that the files declare."""
    kinds = {name: one.partition(" ")[0] for name, one in expected.items()}
    found = checksums.difference(kinds, checksums.described(tree))
    if found is not None:
        raise DamagedCheckpointError(f"{path / STATE}: {found}")


def check_sums(path: Path, expected: dict[str, str], state: Any) -> None:
    """Compares a state with its checksums.

    Raises:
      DamagedCheckpointError: if they differ.
    """
    found = checksums.of_tree(state)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    if wrong or found.keys() != expected.keys():
        named = f" ({wrong[0]} first)" if wrong else ""
        raise DamagedCheckpointError(
            f"{path / STATE}: {len(wrong)} of {len(expected)} arrays do not match "
            f"their checksums{named}"
        )


def reason_of(error: Exception) -> str:
    """Returns an error's first line; of TensorStore's long chains, the end."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0].partition(" [tensorstore_spec")[0].partition(" [os_error")[0]
    return line if len(line) <= 200 else ": ".join(line.split(": ")[-2:])[-200:]


def no_checkpoint(workdir: str | Path) -> str:
    """Returns the message for a run directory without a checkpoint."""
    return (
        f"{workdir} holds no checkpoint; train first, with "
        f"--mode=train --workdir={workdir}"
    )


def no_best_checkpoint(workdir: str | Path) -> str:
    """Returns the message for a run directory that keeps no best checkpoint."""
    return (
        f"{workdir} keeps no best checkpoint; training keeps one by FID where the "
        "config has evaluation.inception=True and a train.evaluate_every; use "
        "--checkpoint=latest"
    )
