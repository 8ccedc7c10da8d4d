"""Paths that users give, the cache directory, and names that processes claim."""

import os
from concurrent import futures
from pathlib import Path

import jax
import pytest
from absl import flags
from cli import BAD_CHARACTERS
from runs import small

from ddaebm_jax import commands, paths
from ddaebm_jax import config as config_lib
from ddaebm_jax.commands import (
    ablate,
    common,
    evaluate,
    export,
    inspect,
    ood,
    sample,
    score,
    train,
)
from ddaebm_jax.config import choices, fields
from ddaebm_jax.config import flags as config_flags
from ddaebm_jax.errors import InputError
from ddaebm_jax.training import dispatch

HOME = Path.home()
MODES = (ablate, evaluate, export, inspect, ood, sample, score, train)
# Flags and fields that are texts, but of no path; --in and --out may be of either.
WORDS = {"checkpoint", "coordinator", "config", "in", "out", "preprocessing"}
WORDS |= {"id_column", "reference", "data.label_column", "data.tfds", "data.split"}
WORDS |= {"data.test_split", "score", "seeds"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/a b", HOME / "a b"),
        ("~root/a", Path(os.path.expanduser("~root"), "a")),
        ("./~/a", Path.cwd() / "~/a"),
        ("a~/~", Path("a~/~")),
        ("a/b:/c", Path("a/b:/c")),
        *((name, Path(name)) for name in BAD_CHARACTERS),
    ],
    ids=ascii,
)
def test_a_path_is_what_it_names_and_stays_so(text: str, path: Path):
    assert paths.user_path(text) == path
    assert paths.user_path(paths.user_path(text)) == path


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gs://b/a", "gcsfuse"),
        ("file:///a", "is a URL"),
        ("~nobody-of-this-name/a", "./~nobody-of-this-name/a"),
        ("a\0b", "paths hold no null byte"),
    ],
)
def test_what_is_no_path_is_refused(text: str, part: str):
    with pytest.raises(InputError, match=part) as error:
        paths.user_path(text, "--x")
    assert "--x" in str(error.value)


def _path_flags() -> list[tuple[str, flags.FlagValues]]:
    """Return all flags that are texts and no words, with those beside them."""
    found = []
    for command in MODES:
        values = flags.FlagValues()
        command.define_flags(values)
        found += [
            (name, values)
            for name in values
            if values[name].flag_type() in ("string", "comma separated list of strings")
            and name not in WORDS
        ]
    return found


def test_every_flag_of_a_path_expands_and_refuses():
    found = _path_flags()
    assert {"workdir", "input", "output", "init_from", "data_path"} < dict(found).keys()
    for name, values in found:
        values[name].parse("~/a")
        assert values[name].value == str(HOME / "a"), name
        with pytest.raises(flags.IllegalFlagValueError, match="gcsfuse"):
            values[name].parse("gs://b/a")


def test_every_field_of_a_path_is_kept_absolute():
    texts = {f for f, value in fields.leaves(config_lib.base()) if value == ""}
    texts -= choices.ALLOWED.keys() | WORDS
    assert texts == {*fields.PATHS}
    given = dict.fromkeys(texts, "~/a") | {"data.path": "a/b"}
    config = small(**{field.replace(".", "__"): one for field, one in given.items()})
    found = dict(fields.leaves(config_lib.with_absolute_paths(config)))
    assert {found[field] for field in texts} == {str(HOME / "a"), f"{Path.cwd()}/a/b"}
    assert config.data.path == "a/b"
    cache = "gs://bucket/cache"  # Which JAX can use.
    config = small(compilation_cache__directory=cache)
    found = config_lib.with_absolute_paths(config)
    assert found.compilation_cache.directory == cache
    with pytest.raises(InputError, match=r"data\.path=s3://b/a is a URL"):
        config_lib.with_absolute_paths(small(data__path="s3://b/a"))


def test_no_other_code_makes_paths_of_texts():
    folder = Path(commands.__file__).parents[1]
    found = [
        f"{file.name}: {line.strip()}"
        for file in folder.rglob("*.py")
        for line in file.read_text().splitlines()
        if file.name != "paths.py" and "expanduser" in line
    ]
    assert found == []


# Caches.


def test_without_a_cache_directory_a_command_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    paths._temporary_cache.cache_clear()
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    first = paths.cache_directory("compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", _no_home)
    assert paths.cache_directory("reference").parent == first.parent
    assert len(caplog.messages) == 1 and "XDG_CACHE_HOME" in caplog.text
    assert os.access(first, os.W_OK) and os.environ["MPLCONFIGDIR"] == str(first.parent)
    paths._temporary_cache.cache_clear()
    assert not first.exists()


def _no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_place_for_programs_none_is_kept(caplog: pytest.LogCaptureFixture):
    enabled = jax.config.jax_enable_compilation_cache
    try:
        cache = small(compilation_cache__directory="/proc/none").compilation_cache
        dispatch.use_compilation_cache(cache)
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert len(caplog.messages) == 1 and "/proc/none cannot be written" in caplog.text


# Names.


@pytest.mark.parametrize("folder", [True, False])
def test_what_claims_at_once_gets_names_of_its_own(tmp_path: Path, folder: bool):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a-2.txt").touch()
    with futures.ThreadPoolExecutor(8) as pool:
        name = tmp_path / "new/a.npz"
        calls = [
            pool.submit(common.claimed, name, ".txt", folder=folder) for _ in range(8)
        ]
        found = {call.result() for call in calls}
    numbers = ["", *(f"-{n}" for n in (1, 3, 4, 5, 6, 7, 8))]
    assert found == {tmp_path / f"new/a{number}.npz" for number in numbers}
    assert all(path.is_dir() == folder for path in found)


def test_runs_of_the_same_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda _: "now")
    monkeypatch.setattr(config_flags, "recipe_name", lambda: "recipe")
    with train._workdir(None) as first, train._workdir(None) as second:
        assert [first.name, second.name] == ["now", "now-1"]
        (second / "config.json").touch()
    assert not first.exists() and second.exists()


def test_a_recipe_may_lie_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config_flags._recipe_found("--config=~/a.py:b:~/c")
    assert found == f"--config={tmp_path}/a.py:b:~/c"
    assert config_flags._recipe_found("--config=a.py:~") == "--config=a.py:~"
