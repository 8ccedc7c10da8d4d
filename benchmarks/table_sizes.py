"""Seconds from start to report of the table recipe, by the size of the table.

  python benchmarks/table_sizes.py
  python benchmarks/table_sizes.py --sizes=5x3,500000x10

Each table, rows x columns, is five Gaussian factors and noise. It is trained on as a
user would, in a process of its own, without a compilation cache.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_SIZES = flags.DEFINE_list(
    "sizes", ["5x3", "1000x20", "2000x1000", "500000x10"], "Rows x columns."
)
_ROOT = Path(__file__).resolve().parent.parent
_FACTORS = 5


def main(argv: list[str]) -> None:
    """Prints a line for each size as it is measured."""
    del argv
    print("| table | seconds | of these compiling the step | device |")
    print("| --- | --- | --- | --- |")
    for size in _SIZES.value:
        rows, columns = map(int, size.split("x"))
        seconds, report = _trained(rows, columns)
        compiling = report["compile_seconds"]
        figures = f"{seconds:.0f} | {compiling:.0f} | {report['device']}"
        print(f"| {rows} x {columns} | {figures} |", flush=True)


def _trained(rows: int, columns: int) -> tuple[float, dict]:
    """Returns how long a run takes, and its report."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((rows, _FACTORS), np.float32)
    x = factors @ rng.standard_normal((_FACTORS, columns), np.float32)
    x += rng.standard_normal(x.shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.npz"
        np.savez(path, X=x)
        command = [sys.executable, "launch/main.py", "--config=configs/table.py"]
        command += [f"--config.data.path={path}", f"--workdir={folder}/run"]
        command += ["--config.compilation_cache.enabled=False"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"error: {rows} x {columns}: {done.stderr[-2_000:]}")
        report = json.loads((Path(folder) / "run" / "report.json").read_text())
    return seconds, report


if __name__ == "__main__":
    app.run(main)
