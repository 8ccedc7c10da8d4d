"""Paths that users give, and the user's cache directory."""

import functools
import logging
import os
import tempfile
from pathlib import Path

from ddaebm_jax.errors import InputError, one_line


def user_path(text: str | os.PathLike, name: str = "") -> Path:
    """Returns the path that a user gives, as a flag, a config's field or an argument.

    A leading `~` or `~user` is that home directory; `./~` is a plain name. What is
    returned may be passed again. `name`, of the flag or field, is for messages.

    Raises InputError for URLs, an unknown home, or a null character.
    """
    text = os.fspath(text)
    told = f"{name}={text}" if name else text
    if "\0" in text:
        raise InputError(f"{name or 'a path'} is {text!r}; paths hold no null byte")
    if "://" in text:
        raise InputError(
            f"{told} is a URL; a path is needed: mount the bucket, for example with "
            "gcsfuse or s3fs, and give its folder there, or download the file"
        )
    path = Path(text)
    if not text.startswith("~"):
        return path.absolute() if str(path).startswith("~") else path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{told}: the home directory {path.parts[0]} is not known; write the path "
            f"in full, or ./{text} for a file of that name"
        ) from error


def cache_directory(name: str) -> Path:
    """Returns this project's folder of that name in the user's cache directory.

    Where that can be neither found nor made, it is one that ends with the process.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(home).expanduser() / "ddaebm_jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError) as error:  # Without a home it is a RuntimeError.
        if not _temporary_cache.cache_info().currsize:
            logging.getLogger(__name__).warning(
                "there is no cache directory (%s), so compiled programs are not kept; "
                "XDG_CACHE_HOME can name one",
                one_line(error),
            )
        folder = Path(_temporary_cache().name) / name
        folder.mkdir(exist_ok=True)
        return folder


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    """Returns a folder that is removed when the process ends; matplotlib's, too."""
    folder = tempfile.TemporaryDirectory(prefix="ddaebm_jax-")
    os.environ.setdefault("MPLCONFIGDIR", folder.name)
    return folder
