"""The command line from end to end, on the plane and on a table, and its errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli import MAIN, ROOT, CommandLine, Result, assert_error, environment, tiny
from PIL import Image
from processes import Started, free_port

from ddaebm_jax import config as config_lib

PLANE, TABLE = "configs/released_gaussians25.py", "configs/table.py"


@pytest.fixture(scope="module")
def run() -> Iterator[CommandLine]:
    with CommandLine() as commands:
        yield commands


@pytest.fixture(scope="module")
def plane_run(run: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the plane, trained in two commands, the first without a --workdir."""
    folder = tmp_path_factory.mktemp("plane")
    with CommandLine(cwd=folder) as commands:
        flags = tiny(str(ROOT / PLANE), train__num_steps=20)
        made = commands.succeed(*flags).out.splitlines()[0]
    assert Path(made).parts[:2] == ("runs", "released_gaussians25")
    flags = tiny(PLANE, train__picture_every=30)
    run.succeed(*flags, f"--workdir={folder / made}")
    return folder / made


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled table whose columns have means of 100 to 300; a third are outliers."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3 == 0
    rows = rng.normal((100, 200, 300), 10, (90, 3)) + 40 * labels[:, None]
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    np.savetxt(
        path, np.c_[rows, labels], delimiter=",", header="a,b,c,odd", comments=""
    )
    return path


def _flags_of(table: Path) -> list[str]:
    return tiny(TABLE, data__path=table, data__label_column="odd", train__num_steps=20)


@pytest.fixture(scope="module")
def table_run(run: CommandLine, table: Path) -> Path:
    workdir = table.parent / "run"
    run.succeed(*_flags_of(table), f"--workdir={workdir}")
    return workdir


def _report(workdir: Path, name: str = "report.json") -> dict:
    return json.loads((workdir / name).read_text())


def _files(workdir: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def _is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100 and np.asarray(image.convert("L")).std() > 5


# --- What the modes make ----------------------------------------------------------


def test_a_run_directory_holds_what_is_promised(plane_run: Path):
    lines = (plane_run / "metrics.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert [r["step"] for r in reports if "energy/loss" in r] == [10, 20, 30, 40]
    assert (plane_run / "checkpoints" / "40").is_dir()
    pictures = sorted(path.name for path in (plane_run / "samples").iterdir())
    assert pictures == [
        f"{name}_{step:08d}.png" for name in ("plane", "steps") for step in (20, 30, 40)
    ]
    assert all(_is_a_picture(plane_run / "samples" / name) for name in pictures)
    report = _report(plane_run)
    assert report["resumed_from_step"] == 20
    assert report["figures"]["modes"] == 25
    assert 0 <= report["figures"]["jensen_shannon"] <= np.log(2)


def test_sample_is_a_function_of_the_seed(
    run: CommandLine, plane_run: Path, tmp_path: Path
):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        flags = (f"--workdir={plane_run}", f"--output={path}", f"--seed={seed}")
        run.succeed("--mode=sample", "--num_samples=50", *flags)
        assert _is_a_picture(path.with_suffix(".png"))
        drawn.append(np.load(path)["x"])
    assert drawn[0].shape == (50, 2)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_default_outputs_never_replace_files(run: CommandLine, plane_run: Path):
    before = _files(plane_run)
    flags = ("--mode=sample", "--num_samples=5", f"--workdir={plane_run}")
    made = [Path(run.succeed(*flags).out.strip()) for _ in range(2)]
    assert [path.name for path in made] == ["samples.npz", "samples-1.npz"]
    assert _files(plane_run).items() >= before.items()
    assert len(_files(plane_run)) == len(before) + 4


def test_an_existing_output_is_refused(
    run: CommandLine, plane_run: Path, tmp_path: Path
):
    path = tmp_path / "mine.npz"
    path.write_text("mine")
    for output, problem in (
        (path, "exists already"),
        (path.with_suffix(".csv"), "ends in '.csv'; allowed: .npz"),
        (tmp_path / "no" / "a.npz", "no is not a directory"),
    ):
        result = run("--mode=sample", f"--workdir={plane_run}", f"--output={output}")
        assert_error(result, problem)
    assert path.read_text() == "mine"


def test_evaluate_repeats_the_final_figures(run: CommandLine, plane_run: Path):
    result = run.succeed("--mode=evaluate", f"--workdir={plane_run}")
    assert "jensen_shannon" in result.out
    assert "jensen_shannon" in (plane_run / "report-1.txt").read_text()
    repeated = _report(plane_run, "report-1.json")
    assert (repeated["step"], repeated["checkpoint"]) == (40, "latest")
    assert repeated["figures"] == _report(plane_run)["figures"]


def test_a_table_is_scored_and_sampled_in_its_own_units(
    run: CommandLine, table: Path, table_run: Path, tmp_path: Path
):
    rows = np.loadtxt(table, delimiter=",", skiprows=1)[:20, :3]
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    np.savez(tmp_path / "rows.npz", x=rows)
    for source, output in (("rows.csv", "a.csv"), ("rows.npz", "b.npz")):
        files = (f"--input={tmp_path / source}", f"--output={tmp_path / output}")
        run.succeed("--mode=score", f"--workdir={table_run}", *files)
    header, *lines = (tmp_path / "a.csv").read_text().splitlines()
    scores = np.array(lines, float)
    assert header == "energy" and scores.shape == (20,)
    np.testing.assert_allclose(scores, np.load(tmp_path / "b.npz")["energy"], rtol=1e-5)
    assert np.abs(scores).max() < 30  # Unstandardised, columns would reach 300.

    flags = (f"--workdir={table_run}", f"--output={tmp_path / 's.npz'}")
    run.succeed("--mode=sample", "--num_samples=30", *flags)
    samples = np.load(tmp_path / "s.npz")["x"]
    np.testing.assert_allclose(samples.mean(axis=0), (100, 200, 300), atol=30)
    assert _is_a_picture(tmp_path / "s.png")


def test_a_table_is_evaluated_beside_the_baselines(table_run: Path):
    figures = _report(table_run)["figures"]
    aurocs = [value for name, value in figures.items() if name.startswith("auroc")]
    assert len(aurocs) == 5
    assert all(0 <= value <= 1 for value in aurocs)


def test_a_run_needs_its_directory_alone_and_notices_changed_data(
    run: CommandLine, table: Path, table_run: Path, tmp_path: Path
):
    """The CSV is gone: modes work. It comes back changed: training refuses."""
    text = table.read_text()
    table.unlink()
    try:
        result = run.succeed("--mode=evaluate", f"--workdir={table_run}")
        figures = _report(table_run)["figures"]
        assert _report(table_run, "report-1.json")["figures"] == figures
        assert "auroc" in result.out
        table.write_text(text.replace("e+02,", "e+01,"))
        result = run(*_flags_of(table), f"--workdir={table_run}")
        assert_error(result, "not those that")
    finally:
        table.write_text(text)


def test_bad_rows_are_named_and_no_scores_are_written(
    run: CommandLine, table_run: Path, tmp_path: Path
):
    np.savetxt(tmp_path / "nan.csv", [[1, np.nan, 2]], delimiter=",")
    np.savetxt(tmp_path / "narrow.csv", np.ones((3, 2)), delimiter=",")
    output = tmp_path / "scores.csv"
    flags = (f"--workdir={table_run}", f"--output={output}")
    for name in ("nan.csv", "narrow.csv", "missing.csv"):
        result = run("--mode=score", *flags, f"--input={tmp_path / name}")
        assert_error(result, name)
        assert not output.exists()


def test_compiled_programs_are_kept_in_the_users_cache(plane_run: Path, tmp_path: Path):
    """By default; a second start compiles nothing anew."""
    env = environment() | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del env["JAX_COMPILATION_CACHE_DIR"]
    kept = []
    with CommandLine(env=env) as commands:
        for name in ("a.npz", "b.npz"):
            flags = ("--num_samples=5", f"--output={tmp_path / name}")
            commands.succeed("--mode=sample", f"--workdir={plane_run}", *flags)
            kept.append(sorted(tmp_path.glob("cache/ddaebm_jax/compiled/*-cache")))
    assert len(kept[0]) > 1 and kept[1] == kept[0]


# --- Errors -----------------------------------------------------------------------

BAD_COMMANDS = {
    "no config": (["--mode=train"], "--config"),
    "unknown mode": (["--mode=trian"], "train|sample|score"),
    "unknown field": ([f"--config={PLANE}", "--config.optimzer.lr=1"], "optimizer"),
    "unknown flag": ([f"--config={PLANE}", "--wrkdir=x"], "Did you mean: workdir"),
    "flag of other modes": (
        [f"--config={PLANE}", "--seed=3"],
        "--seed is for --mode=sample or --mode=ood, not for --mode=train",
    ),
    "config of another mode": (
        ["--mode=sample", f"--config={PLANE}"],
        "--config is for --mode=train, not for --mode=sample",
    ),
    "stray word": ([f"--config={PLANE}", "train"], "'train'"),
    "no such recipe": (["--config=configs/nope.py"], "configs/nope.py"),
    "change without a recipe": (["--config.game.gamma=1"], "--config.game.gamma"),
    "not a number": ([f"--config={PLANE}", "--config.diffusion.num_steps=x"], "'x'"),
    "too many devices": (
        [f"--config={PLANE}", "--config.parallel.num_devices=64"],
        "parallel.num_devices is 64",
    ),
    "seed too large": (["--mode=sample", "--seed=99999999999999999999"], "seed"),
    "too few samples": (["--mode=sample", "--num_samples=0"], "num_samples"),
    "no workdir": (["--mode=sample"], "--workdir"),
    "no input": (["--mode=score", "--workdir=x"], "--input"),
    "workdir below a file": (
        ["--mode=sample", "--workdir=README.md/run"],
        "README.md/run",
    ),
    "workdir not there": (["--mode=evaluate", "--workdir=/nowhere/run"], "/nowhere"),
    "table without a path": ([f"--config={TABLE}"], "data.path is ''"),
    "table not there": (
        [f"--config={TABLE}", "--config.data.path=/nowhere.csv"],
        "/nowhere.csv",
    ),
    "alone with a coordinator": (
        [f"--config={PLANE}", "--coordinator=localhost:1"],
        "--coordinator is for --distributed",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_makes_nothing(
    run: CommandLine, tmp_path: Path, case: str
):
    argv, expected = BAD_COMMANDS[case]
    workdir = tmp_path / "run"
    if not any(flag.startswith(("--mode=s", "--mode=e")) for flag in argv):
        argv = [*argv, f"--workdir={workdir}"]
    assert_error(run(*argv), expected)
    assert not workdir.exists()


def test_every_problem_of_a_config_is_told_at_once(run: CommandLine, tmp_path: Path):
    """Fields that there are not, values of another type, and what else is wrong."""
    fields = {
        "game.gama": "1",
        "train.num_steps": "ten",
        "optimizer.beta1": "5",
        "optimizer.accumulate": "3",
    }
    changes = [f"--config.{field}={value}" for field, value in fields.items()]
    result = run(f"--config={PLANE}", *changes, f"--workdir={tmp_path / 'run'}")
    assert_error(
        result,
        "--config.game.gama is not a field of the config; did you mean game.gamma?",
        "train.num_steps is 'ten'; a whole number is needed",
        "optimizer.beta1 is 5.0; it must be at least 0 and at most",
        "optimizer.accumulate is 3",
    )


def test_flags_may_come_from_a_file(run: CommandLine, tmp_path: Path):
    (tmp_path / "flags").write_text("--mode=score\n--workdir=/nowhere\n--input=x\n")
    assert_error(run(f"--flagfile={tmp_path / 'flags'}"), "/nowhere/config.json")


@pytest.mark.parametrize(
    ("flags", "listed", "others"),
    [
        ([], "config mode workdir distributed", "seed output"),
        (["--mode=sample"], "mode workdir seed output checkpoint", "config out"),
        (["--mode=inspect"], "mode workdir", "checkpoint seed"),
    ],
)
def test_help_lists_the_flags_of_a_mode(
    run: CommandLine, flags: list[str], listed: str, others: str
):
    text = run(*flags, "--help").out
    assert "--mode=sample --help" in text
    for name in listed.split():
        assert f"--{name}:" in text or f"--[no]{name}:" in text
    for name in others.split():
        assert f"--{name}:" not in text


def test_a_directory_of_something_else_is_left_alone(run: CommandLine, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert_error(run(*tiny(PLANE), f"--workdir={tmp_path}"), "not a run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_config_is_left_alone(run: CommandLine, plane_run: Path):
    before = _files(plane_run)
    result = run(*tiny(PLANE, game__gamma=0.5), f"--workdir={plane_run}")
    assert_error(result, "game.gamma")
    assert _files(plane_run) == before


def test_a_run_without_a_checkpoint_says_so(run: CommandLine, tmp_path: Path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config_lib.base()))
    for mode in ("sample", "evaluate"):
        result = run(f"--mode={mode}", f"--workdir={tmp_path}")
        assert_error(result, "no checkpoint")


_OUT_OF_MEMORY = """
import runpy, sys
from jax.errors import JaxRuntimeError
from ddaebm_jax.commands import sample
from ddaebm_jax.training import loop
def fail(*given):
    raise {error}
loop.train = sample.sample = fail
sys.argv = [{main!r}, *{argv!r}]
runpy.run_path({main!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("flag", "error", "advice"),
    [
        (
            f"--config={PLANE}",
            "MemoryError('Unable to allocate 7.28 TiB')",
            ("data.batch_size (200)", "optimizer.accumulate", "model.remat"),
        ),
        (
            "--mode=sample",
            "JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')",
            ("larger device", "evaluation.batch_size"),
        ),
        (f"--config={PLANE}", "JaxRuntimeError('INTERNAL: a bug')", ()),
    ],
)
def test_out_of_memory_names_what_helps(
    tmp_path: Path, flag: str, error: str, advice: tuple[str, ...]
):
    argv = [flag, f"--workdir={tmp_path / 'run'}"]
    program = _OUT_OF_MEMORY.format(error=error, main=str(MAIN), argv=argv)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    if advice:
        assert_error(result, *advice)
    else:
        assert result.code == 1 and "INTERNAL: a bug" in result.err


# --- Several processes ------------------------------------------------------------


def _one_of_two(number: int, *flags: str) -> Started:
    """Start one of two processes."""
    together = ["--distributed", "--num_processes=2", f"--process_id={number}"]
    return Started(*tiny(PLANE), *together, *flags)


def test_a_bad_config_is_told_before_other_processes_are_awaited(tmp_path: Path):
    """There is no coordinator, and so nothing to join."""
    flags = (f"--coordinator=localhost:{free_port()}", f"--workdir={tmp_path / 'run'}")
    with _one_of_two(1, *flags, "--config.game.gamma=-1") as process:
        result = process.ended()
    assert_error(result, "game.gamma is -1.0")
    assert "Connecting" not in result.err


def test_processes_wait_for_others_for_a_while_only(tmp_path: Path):
    together = (f"--workdir={tmp_path / 'run'}", "--join_timeout=3")
    with (
        _one_of_two(0, *together, f"--coordinator=localhost:{free_port()}") as first,
        _one_of_two(1, *together, f"--coordinator=localhost:{free_port()}") as second,
    ):
        for process in (first, second):
            assert_error(process.ended(), "not all processes have come within 3 s")
    assert not (tmp_path / "run").exists()


def test_one_process_that_fails_ends_and_the_other_follows(tmp_path: Path):
    """Not after the minutes for which JAX waits at a program's end."""
    (tmp_path / "file").touch()
    shared = (f"--coordinator=localhost:{free_port()}", "--heartbeat_timeout=20")
    with (
        _one_of_two(0, *shared, f"--workdir={tmp_path / 'file'}") as failing,
        _one_of_two(1, *shared, f"--workdir={tmp_path / 'run'}") as other,
    ):
        assert_error(failing.ended(120), str(tmp_path / "file"))
        assert other.ended(120).code != 0
