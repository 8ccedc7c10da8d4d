"""Small files, written so that a crash leaves the old one or the new one."""

import json
import os
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a small file so that a crash leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes JSON; see `write_text_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def cache_directory(name: str) -> Path:
    """Returns this project's folder of that name in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ddaebm_jax" / name
