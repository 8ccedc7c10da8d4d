"""The command line from end to end, and what it says of bad input."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli import MAIN, ROOT, CommandLine, Result, environment, tiny
from PIL import Image
from processes import Started, free_port

from ddaebm_jax import config as config_lib

PLANE, TABLE = "configs/released_gaussians25.py", "configs/breast_cancer.py"


@pytest.fixture(scope="module")
def run() -> Iterator[CommandLine]:
    commands = CommandLine()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def plane_run(run: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the plane, trained in two goes, with TensorBoard files."""
    workdir = tmp_path_factory.mktemp("plane") / "run"
    flags = tiny(PLANE, train__picture_every=20, train__tensorboard=True)
    first = run(*flags, f"--workdir={workdir}", "--config.train.num_steps=20")
    assert first.code == 0, first.err
    second = run(*flags, f"--workdir={workdir}")
    assert second.code == 0, second.err
    assert "from step 20 to 40" in second.err
    return workdir


@pytest.fixture(scope="module")
def table_run(run: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("table") / "run"
    result = run(*tiny(TABLE), f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir


def _looks_like_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100 and np.asarray(image.convert("L")).std() > 5


def test_a_run_directory_holds_what_is_promised(plane_run: Path):
    lines = (plane_run / "metrics.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert [r["step"] for r in reports if "energy/loss" in r] == [10, 20, 30, 40]
    assert (plane_run / "checkpoints" / "40").is_dir()
    assert list(plane_run.glob("events.out.tfevents.*"))
    pictures = sorted(path.name for path in (plane_run / "samples").iterdir())
    assert pictures == [
        f"{name}_{step:08d}.png" for name in ("plane", "steps") for step in (20, 40)
    ]
    for name in pictures:
        assert _looks_like_a_picture(plane_run / "samples" / name)
    report = json.loads((plane_run / "report.json").read_text())
    assert report["resumed_from_step"] == 20
    assert report["figures"]["modes"] == 25
    assert 0 <= report["figures"]["jensen_shannon"] <= np.log(2)


def test_training_a_finished_run_again_changes_no_weights(
    run: CommandLine, plane_run: Path
):
    before = json.loads((plane_run / "report.json").read_text())["figures"]
    flags = tiny(PLANE, train__picture_every=20, train__tensorboard=True)
    result = run(*flags, f"--workdir={plane_run}")
    assert result.code == 0, result.err
    assert json.loads((plane_run / "report.json").read_text())["figures"] == before


def test_sample_is_a_function_of_the_seed(
    run: CommandLine, plane_run: Path, tmp_path: Path
):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        flags = (f"--workdir={plane_run}", f"--output={path}", f"--seed={seed}")
        result = run("--mode=sample", "--num_samples=50", *flags)
        assert result.code == 0, result.err
        assert _looks_like_a_picture(path.with_suffix(".png"))
        drawn.append(np.load(path)["x"])
    assert drawn[0].shape == (50, 2)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_a_file_without_a_name_given_never_replaces_another(
    run: CommandLine, plane_run: Path
):
    names = []
    for _ in range(2):
        result = run("--mode=sample", "--num_samples=5", f"--workdir={plane_run}")
        assert result.code == 0, result.err
        names.append(result.out.strip())
    assert len(set(names)) == 2
    assert all(Path(name).exists() for name in names)


def test_evaluate_repeats_the_final_figures(run: CommandLine, plane_run: Path):
    result = run("--mode=evaluate", f"--workdir={plane_run}")
    assert result.code == 0, result.err
    figures = json.loads((plane_run / "report-1.json").read_text())["figures"]
    assert figures["modes"] == 25
    assert figures == json.loads((plane_run / "report.json").read_text())["figures"]
    assert "jensen_shannon" in result.out


def test_a_table_is_scored_in_its_own_units(
    run: CommandLine, table_run: Path, tmp_path: Path
):
    """The run's own standardisation applies: typical rows get typical energies."""
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data[:20]
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    np.savez(tmp_path / "rows.npz", x=rows)
    scores = []
    for source, output in (("rows.csv", "a.csv"), ("rows.npz", "b.npz")):
        result = run(
            "--mode=score",
            f"--workdir={table_run}",
            f"--input={tmp_path / source}",
            f"--output={tmp_path / output}",
        )
        assert result.code == 0, result.err
    scores = np.loadtxt(tmp_path / "a.csv", skiprows=1)
    np.testing.assert_allclose(scores, np.load(tmp_path / "b.npz")["energy"], rtol=1e-5)
    assert scores.shape == (20,)
    # Raw columns reach 4,000; unstandardised they would give far larger energies.
    assert np.abs(scores).max() < 100


def test_a_table_is_sampled_in_its_own_units(
    run: CommandLine, table_run: Path, tmp_path: Path
):
    path = tmp_path / "s.npz"
    flags = (f"--workdir={table_run}", f"--output={path}")
    result = run("--mode=sample", "--num_samples=30", *flags)
    assert result.code == 0, result.err
    samples = np.load(path)["x"]
    assert samples.shape == (30, 30)
    assert samples.mean(axis=0).max() > 100  # `worst area` is about 560 when benign


def test_a_run_needs_its_directory_alone_and_notices_changed_data(
    run: CommandLine, tmp_path: Path
):
    """The CSV is gone: modes work. It comes back changed: training refuses."""
    source, workdir = tmp_path / "rows.csv", tmp_path / "run"
    rows = np.random.default_rng(0).normal(size=(60, 3))
    np.savetxt(source, rows, delimiter=",")
    flags = tiny(
        "configs/table.py", data__path=source, model__nz=2, train__num_steps=20
    )
    assert run(*flags, f"--workdir={workdir}").code == 0
    source.rename(tmp_path / "elsewhere.csv")
    for flags_of_mode in (("--mode=sample", "--num_samples=5"), ("--mode=evaluate",)):
        result = run(*flags_of_mode, f"--workdir={workdir}")
        assert result.code == 0, result.err
    result = run(
        "--mode=score", f"--workdir={workdir}", f"--input={tmp_path / 'elsewhere.csv'}"
    )
    assert result.code == 0, result.err
    assert len(Path(result.out.strip()).read_text().splitlines()) == 61
    np.savetxt(source, rows + 1, delimiter=",")
    _is_one_line_error(run(*flags, f"--workdir={workdir}"), "not those that")


def test_a_table_is_evaluated_beside_the_baselines(table_run: Path):
    figures = json.loads((table_run / "report.json").read_text())["figures"]
    aurocs = {name: v for name, v in figures.items() if name.startswith("auroc")}
    assert len(aurocs) == 5
    assert all(0 <= value <= 1 for value in aurocs.values())


def test_the_default_workdir_is_named_after_the_recipe(tmp_path: Path):
    commands = CommandLine(cwd=tmp_path)
    result = commands(*tiny(str(ROOT / PLANE), train__num_steps=10))
    commands.close()
    assert result.code == 0, result.err
    made = Path(result.out.splitlines()[0])
    assert made.parts[:2] == ("runs", "released_gaussians25")
    assert (tmp_path / made / "report.json").exists()


BAD_INPUT = {
    "no config": (["--mode=train"], "--config"),
    "unknown field": ([f"--config={PLANE}", "--config.optimzer.lr=1"], "optimizer"),
    "unknown flag": ([f"--config={PLANE}", "--wrkdir=x"], "wrkdir"),
    "stray word": ([f"--config={PLANE}", "train"], "'train'"),
    "no such recipe": (["--config=configs/nope.py"], "configs/nope.py"),
    "no steps": ([f"--config={PLANE}", "--config.diffusion.num_steps=0"], "at least 1"),
    "not a number": ([f"--config={PLANE}", "--config.diffusion.num_steps=x"], "'x'"),
    "beta out of order": (
        [
            f"--config={PLANE}",
            "--config.diffusion.variance=vp",
            "--config.diffusion.beta_min=3.0",
            "--config.diffusion.beta_max=2.0",
        ],
        "diffusion.beta_min is 3.0 and diffusion.beta_max is 2.0",
    ),
    "too many devices": (
        [f"--config={PLANE}", "--config.parallel.num_devices=64"],
        "parallel.num_devices is 64",
    ),
    "flag of another mode": ([f"--config={PLANE}", "--seed=3"], "--seed is for"),
    "ignored field": (
        [f"--config={PLANE}", "--config.data.image_size=64"],
        "data.image_size is 64 and data.name is 'gaussians25'; nothing would read",
    ),
    "number beyond a device's": (
        [f"--config={PLANE}", "--config.data.batch_size=1000000000000"],
        "data.batch_size is 1000000000000; it must be at least 1 and at most",
    ),
    "seed too large": (["--mode=sample", "--seed=99999999999999999999"], "seed"),
    "workdir below a file": (
        ["--mode=sample", "--workdir=README.md/run"],
        "README.md/run",
    ),
    "no workdir": (["--mode=sample"], "--workdir"),
    "workdir not there": (["--mode=evaluate", "--workdir=/nowhere/run"], "/nowhere"),
    "table without a path": (
        [f"--config={TABLE}", "--config.data.name=table"],
        "data.path is '' and data.name is 'table'; a path is needed",
    ),
    "table not there": (
        [
            f"--config={TABLE}",
            "--config.data.name=table",
            "--config.data.path=/nowhere.csv",
        ],
        "/nowhere.csv",
    ),
}


# Bodies of get_config(), and what is said of them.
BAD_RECIPES = {
    "k.train.num_steps = 'ten'": ("TypeError", "num_steps", "int"),
    "k.game.gamma = 'x'": ("TypeError", "gamma", "float"),
    "k.data.batch_size = 0.5": ("TypeError", "batch_size", "int"),
    "k.gaem.gamma = 1.0": ("AttributeError: 'gaem' Did you mean \"game\"",),
    "raise ValueError('my value')": ("ValueError: my value",),
    "raise KeyError('my key')": ("KeyError: my key",),
    "assert k.seed == 1": ("AssertionError",),
    "k.seed = seed": ("NameError: name 'seed' is not defined",),
    "k.seed = = 1": ("SyntaxError: invalid syntax",),
    "import nosuch": ("No module named 'nosuch'",),
}


@pytest.mark.parametrize("body", BAD_RECIPES)
def test_an_error_in_a_recipe_names_file_line_and_reason(
    run: CommandLine, tmp_path: Path, body: str
):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from ddaebm_jax import config\n\n\ndef get_config():\n"
        f"    k = config.base()\n    {body}\n    return k\n"
    )
    result = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    _is_one_line_error(result, f"--config={path}, line 6 (`{body}`): ")
    for words in BAD_RECIPES[body]:
        assert words in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "get_config = 3\n", "def get_config(): pass\n"])
def test_a_file_that_makes_no_config_is_no_recipe(
    run: CommandLine, tmp_path: Path, text: str
):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    result = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    _is_one_line_error(result, f"--config={path}")
    assert not (tmp_path / "run").exists()


def test_every_problem_of_a_command_is_told_at_once(run: CommandLine, tmp_path: Path):
    """Fields that there are not, values of another type, and what else is wrong."""
    result = run(
        f"--config={PLANE}",
        "--config.game.gama=1",
        "--config.gaem.lambda_z=1",
        "--config.recovery=3",
        "--config.train.num_steps=ten",
        "--config.data.flip=maybe",
        "--config.model.mlp.hidden=(8,x)",
        "--config.optimizer.beta1=5",
        "--config.optimizer.accumulate=3",
        f"--workdir={tmp_path / 'run'}",
    )
    for problem in (
        "--config.game.gama is not a field of the config; did you mean game.gamma?",
        "--config.gaem.lambda_z is not a field of the config; did you mean "
        "game.lambda_z?",
        "--config.recovery is a section of the config; set its fields",
        "train.num_steps is 'ten'; a whole number is needed",
        "data.flip is 'maybe'; True or False is needed",
        "model.mlp.hidden is ('(8,x)',); a tuple of one or more whole numbers",
        "optimizer.beta1 is 5.0; it must be at least 0 and at most",
        "optimizer.accumulate is 3 and data.batch_size is 200; the first must divide",
    ):
        _is_one_line_error(result, problem)


def test_a_change_needs_a_recipe(run: CommandLine, tmp_path: Path):
    result = run("--config.game.gamma=1", f"--workdir={tmp_path / 'run'}")
    _is_one_line_error(result, "--config.game.gamma=1 changes a field of a recipe")


def test_fields_are_changed_by_a_file_of_flags(run: CommandLine, tmp_path: Path):
    (tmp_path / "flags").write_text("--config.seed=-7\n")
    result = run(f"--config={PLANE}", f"--flagfile={tmp_path / 'flags'}")
    _is_one_line_error(result, "seed is -7")


_OUT_OF_MEMORY = """
import runpy, sys
import jax
from ddaebm_jax import modes, train
def fail(*given):
    raise {error}
train.train = modes.sample = fail
sys.argv = [{main!r}, "--workdir={workdir}", "{flag}"]
runpy.run_path({main!r}, run_name="__main__")
"""
_TRAIN = f"--config={ROOT / PLANE}"
_OF_DEVICE = "jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')"


@pytest.mark.parametrize(
    ("flag", "error", "told"),
    [
        (
            _TRAIN,
            "MemoryError('Unable to allocate 7.28 TiB')",
            ("data.batch_size (200)", "optimizer.accumulate", "model.remat"),
        ),
        (_TRAIN, _OF_DEVICE, ("data.batch_size (200)",)),
        ("--mode=sample", _OF_DEVICE, ("larger device", "evaluation.batch_size of /")),
        (_TRAIN, "jax.errors.JaxRuntimeError('INTERNAL: something else')", ()),
    ],
)
def test_want_of_memory_names_what_helps(
    tmp_path: Path, flag: str, error: str, told: tuple[str, ...]
):
    program = _OUT_OF_MEMORY.format(
        error=error, main=str(MAIN), workdir=tmp_path / "run", flag=flag
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("Traceback" in done.stderr) is not bool(told)
    for words in told:
        _is_one_line_error(Result(done.returncode, done.stdout, done.stderr), words)


def _one_of_two(number: int, *flags: str) -> Started:
    """Starts one of two processes."""
    together = ["--distributed", "--num_processes=2", f"--process_id={number}"]
    return Started(*tiny(PLANE), *together, *flags)


def test_a_bad_config_is_told_before_other_processes_are_waited_for(tmp_path: Path):
    """There is no coordinator, and so nothing to join."""
    flags = (f"--coordinator=localhost:{free_port()}", f"--workdir={tmp_path / 'run'}")
    with _one_of_two(1, *flags, "--config.game.gamma=-1") as process:
        result = process.ended()
    _is_one_line_error(result, "game.gamma is -1.0")
    assert "Connecting" not in result.err


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_waits_for_others_for_a_while_only(tmp_path: Path, number: int):
    flags = (f"--coordinator=localhost:{free_port()}", f"--workdir={tmp_path / 'run'}")
    with _one_of_two(number, *flags, "--join_timeout=3") as process:
        result = process.ended()
    _is_one_line_error(result, "not all processes have come within 3 s")
    assert not (tmp_path / "run").exists()


def test_one_process_that_fails_leaves_and_the_other_ends(tmp_path: Path):
    """Not after the minutes for which JAX waits at a program's end."""
    (tmp_path / "file").touch()
    shared = (f"--coordinator=localhost:{free_port()}", "--heartbeat_timeout=20")
    with (
        _one_of_two(0, *shared, f"--workdir={tmp_path / 'run'}") as other,
        _one_of_two(1, *shared, f"--workdir={tmp_path / 'file' / 'run'}") as failing,
    ):
        _is_one_line_error(failing.ended(), "Not a directory")
        assert other.ended().code != 0


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_makes_nothing(
    run: CommandLine, tmp_path: Path, case: str
):
    argv, expected = BAD_INPUT[case]
    workdir = tmp_path / "run"
    if "--mode=sample" not in argv and "--mode=evaluate" not in argv:
        argv = [*argv, f"--workdir={workdir}"]
    _is_one_line_error(run(*argv), expected)
    assert not workdir.exists()


def _is_one_line_error(result, expected: str) -> None:
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    assert expected in errors[0]


def test_bad_rows_are_named_and_no_scores_are_written(
    run: CommandLine, table_run: Path, tmp_path: Path
):
    rows = np.ones((3, 30))
    rows[1, 4] = np.nan
    np.savetxt(tmp_path / "nan.csv", rows, delimiter=",")
    np.savetxt(tmp_path / "narrow.csv", rows[:1, :7], delimiter=",")
    (tmp_path / "words.csv").write_text("1,2\nthree,4\n")
    np.savez(tmp_path / "empty.npz")
    output = tmp_path / "scores.csv"
    for name in ("nan.csv", "narrow.csv", "words.csv", "empty.npz", "missing.csv"):
        result = run(
            "--mode=score",
            f"--workdir={table_run}",
            f"--input={tmp_path / name}",
            f"--output={output}",
        )
        _is_one_line_error(result, name)
        assert not output.exists()


def test_an_existing_output_is_left_alone(
    run: CommandLine, plane_run: Path, tmp_path: Path
):
    path = tmp_path / "mine.npz"
    path.write_text("mine")
    result = run("--mode=sample", f"--workdir={plane_run}", f"--output={path}")
    _is_one_line_error(result, "exists already")
    assert path.read_text() == "mine"


def test_a_directory_of_something_else_is_left_alone(run: CommandLine, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = run(*tiny(PLANE), f"--workdir={tmp_path}")
    _is_one_line_error(result, "not a run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_config_is_left_alone(run: CommandLine, plane_run: Path):
    before = {p: p.stat().st_mtime_ns for p in plane_run.rglob("*") if p.is_file()}
    result = run(*tiny(PLANE, game__gamma=0.5), f"--workdir={plane_run}")
    _is_one_line_error(result, "game.gamma")
    after = {p: p.stat().st_mtime_ns for p in plane_run.rglob("*") if p.is_file()}
    assert after == before


def test_a_run_without_a_checkpoint_says_so(run: CommandLine, tmp_path: Path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config_lib.base()))
    for mode in ("sample", "evaluate"):
        result = run(f"--mode={mode}", f"--workdir={tmp_path}")
        _is_one_line_error(result, "no checkpoint")
    (tmp_path / "checkpoints").mkdir()
    result = run("--mode=sample", f"--workdir={tmp_path}")
    _is_one_line_error(result, "no checkpoint")


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path: Path):
    """By default; a second start compiles nothing anew."""
    env = environment() | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del env["JAX_COMPILATION_CACHE_DIR"]
    command, kept = CommandLine(env=env), []
    for name in ("first", "second"):
        result = command(*tiny(PLANE), f"--workdir={tmp_path / name}")
        assert result.code == 0, result.err
        kept.append(sorted(tmp_path.glob("cache/ddaebm_jax/compiled/*-cache")))
    command.close()
    assert len(kept[0]) > 5 and kept[1] == kept[0]
