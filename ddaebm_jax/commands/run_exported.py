"""Draw samples of an exported model, print their energies: python run.py [model.zip].

Reads the files beside it, or those of a ZIP. model_card.md describes the functions.
"""

import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax import export


def load(folder: Path | zipfile.Path) -> tuple:
    """Return the variables, by name, and the functions sample, energy and predict."""
    raw = (folder / "variables.safetensors").read_bytes()
    start, variables = 8 + int.from_bytes(raw[:8], "little"), {}
    for name, array in json.loads(raw[8:start]).items():
        first, last = array["data_offsets"]
        values = np.frombuffer(raw[start + first : start + last], "<f4")
        variables[name] = values.reshape(array["shape"])
    files = [folder / f"{name}.bin" for name in ("sample", "energy", "predict")]
    calls = [export.deserialize(file.read_bytes()).call for file in files]
    return variables, *map(jax.jit, calls)


if __name__ == "__main__":
    root = zipfile.Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    variables, sample, energy, _ = load(root)
    x = sample(variables, np.uint32(0), np.arange(8, dtype=np.int32))
    for f, point in zip(energy(variables, x), np.asarray(x), strict=True):
        print(f"energy {f:.6g} of", point.ravel()[:8])
