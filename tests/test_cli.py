"""The command line from end to end, on the plane and on a table, and its errors."""

import importlib
import os
import re
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from cli import (
    MODES,
    ROOT,
    assert_error,
    call,
    environment,
    files,
    main,
    report,
    run,
    succeed,
    tiny,
)
from PIL import Image
from processes import free_port
from runs import lines

from ddaebm_jax import config as config_lib
from ddaebm_jax.commands import common, sample, score
from ddaebm_jax.errors import InputError
from ddaebm_jax.evaluation import particles
from ddaebm_jax.training import loop, trained_run

PLANE, TABLE = "configs/released_gaussians25.py", "configs/table.py"


@pytest.fixture(scope="module")
def plane_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the plane, trained in two commands, the first without a --workdir."""
    folder = tmp_path_factory.mktemp("plane")
    flags = tiny(str(ROOT / PLANE), train__num_steps=20)
    made = succeed(*flags, cwd=folder).out.splitlines()[0]
    assert Path(made).parts[:2] == ("runs", "released_gaussians25")
    flags = tiny(PLANE, train__picture_every=30)
    succeed(*flags, f"--workdir={folder / made}")
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
    fields = {"data__path": table, "data__label_column": "odd", "data__whiten": True}
    return tiny(TABLE, **fields, train__num_steps=20)


@pytest.fixture(scope="module")
def table_run(table: Path) -> Path:
    workdir = table.parent / "run"
    succeed(*_flags_of(table), f"--workdir={workdir}")
    return workdir


def _is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return min(image.size) > 100 and np.asarray(image.convert("L")).std() > 5


# --- Outputs of the modes ----------------------------------------------------------


def test_a_run_directory_holds_metrics_pictures_and_figures(plane_run: Path):
    trained = [line["step"] for line in lines(plane_run) if "energy/loss" in line]
    assert trained == [10, 20, 30, 40]
    assert (plane_run / "checkpoints" / "40").is_dir()
    pictures = sorted(path.name for path in (plane_run / "samples").iterdir())
    assert pictures == [
        f"{name}_{step:08d}.png" for name in ("plane", "steps") for step in (20, 30, 40)
    ]
    assert all(_is_a_picture(plane_run / "samples" / name) for name in pictures)
    # Drawn once more after the final figures.
    metrics, curves = plane_run / "metrics.jsonl", plane_run / "curves.png"
    assert _is_a_picture(curves)
    assert curves.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    found = report(plane_run)
    assert found["resumed_from_step"] == 20
    assert found["figures"]["modes"] == 25
    assert 0 <= found["figures"]["jensen_shannon"] <= np.log(2)


def test_sample_is_a_function_of_the_seed(plane_run: Path, tmp_path: Path):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        flags = (f"--workdir={plane_run}", f"--output={path}", f"--seed={seed}")
        succeed("--mode=sample", "--num_samples=50", *flags)
        assert _is_a_picture(path.with_suffix(".png"))
        drawn.append(np.load(path)["x"])
    assert drawn[0].shape == (50, 2)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_default_outputs_never_replace_files(plane_run: Path):
    before = files(plane_run)
    flags = ("--mode=sample", "--num_samples=5", f"--workdir={plane_run}")
    made = [Path(succeed(*flags).out.strip()) for _ in range(2)]
    assert [path.name for path in made] == ["samples.npz", "samples-1.npz"]
    assert files(plane_run).items() >= before.items()
    assert len(files(plane_run)) == len(before) + 4


def test_an_existing_output_is_refused(plane_run: Path, tmp_path: Path):
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


def test_evaluate_repeats_the_final_figures(plane_run: Path):
    result = succeed("--mode=evaluate", f"--workdir={plane_run}")
    assert "jensen_shannon" in result.out
    assert "jensen_shannon" in (plane_run / "report-1.txt").read_text()
    repeated = report(plane_run, "report-1.json")
    assert (repeated["step"], repeated["checkpoint"]) == (40, "latest")
    figures, final = repeated["figures"], report(plane_run)["figures"]
    assert {name: figures[name] for name in final} == final
    truth, log_z = figures["log_likelihood_true"], figures["log_z_quadrature"]
    assert abs(truth - 0.64) < 0.05 and abs(figures["log_z"] - log_z) < 3.0
    for name in ("kernel_density", "gaussian_mixture", "bound"):
        assert figures[f"log_likelihood_{name}"] < truth + 0.01
    assert len(figures["effective_share"]) == len(figures["consistency"]) == 4
    # The energy is nearly flat yet: its samples are far from the data, within the box.
    distance = figures["energy_samples_sliced_wasserstein"]
    assert figures["sliced_wasserstein_of_data"] < distance < 4.0
    # 200 particles do not carry a likelihood after 40 steps, and that is said.
    assert "particles count" in figures["log_likelihood_refused"]
    assert "log_likelihood" not in figures


def test_likelihoods_and_samples_of_the_energy(
    table: Path, table_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Refused where too few particles count; in the table's own units."""
    x = np.loadtxt(table, delimiter=",", skiprows=1)[:9, :3]
    np.savez(tmp_path / "rows.npz", x=x)
    inputs = table_run, tmp_path / "rows.npz"
    for use in (
        lambda: score.score(*inputs, normalized=True),
        lambda: sample.sample(table_run, 30, sampler="energy"),
    ):
        with pytest.raises(InputError, match=r"particles count, and 100000 are needed"):
            with monkeypatch.context() as patch:
                patch.setattr(particles, "LEAST_EFFECTIVE", 100_000)
                use()
    monkeypatch.setattr(particles, "LEAST_EFFECTIVE", 0)
    output = tmp_path / "scores.npz"
    score.score(*inputs, output, normalized=True)
    found, loaded = np.load(output), trained_run.load_run(table_run)
    standardizer = loaded.experiment.source.table.standardizer
    log_z = particles.measure(loaded.experiment, loaded.variables).estimate.log_z
    whiten = np.log(np.abs(np.linalg.det(standardizer.whitening)))
    expected = found["energy"] - log_z - np.log(standardizer.std).sum() + whiten
    np.testing.assert_allclose(found["log_density"], expected, rtol=1e-5)
    drawn = np.load(sample.sample(table_run, 30, sampler="energy"))["x"]
    assert drawn.shape == (30, 3) and np.isfinite(drawn).all()


def test_a_table_is_scored_and_sampled_in_its_own_units(
    table: Path, table_run: Path, tmp_path: Path
):
    rows = np.loadtxt(table, delimiter=",", skiprows=1)[:20, :3]
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    np.savez(tmp_path / "rows.npz", x=rows)
    for source, output in (("rows.csv", "a.csv"), ("rows.npz", "b.npz")):
        files = (f"--input={tmp_path / source}", f"--output={tmp_path / output}")
        succeed("--mode=score", f"--workdir={table_run}", *files)
    header, *lines = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "row,energy,rank,p_value,columns"
    lines = [line.split(",")[:4] for line in lines]
    places, scores, ranks, p_values = np.array(lines, float).T
    assert list(places) == list(range(20))
    assert {round(p * 19, 6) for p in p_values} <= {*range(1, 20)}  # 18 held out.
    assert list(np.argsort(scores)) == list(np.argsort(ranks)) and min(ranks) == 1
    arrays = np.load(tmp_path / "b.npz")
    np.testing.assert_allclose(scores, arrays["energy"], rtol=1e-5)
    np.testing.assert_array_equal(ranks, arrays["rank"])

    # The file that trained, in another order, with ids.
    lines = [line.split(",")[::-1] for line in table.read_text().splitlines()[:21]]
    text = "\n".join(",".join([f"n{i}", *line]) for i, line in enumerate(lines))
    (tmp_path / "own.csv").write_text(text + "\n")
    files = (
        f"--input={tmp_path / 'own.csv'}",
        f"--output={tmp_path / 'own_scores.csv'}",
    )
    result = succeed("--mode=score", f"--workdir={table_run}", *files, "--id_column=n0")
    assert "own.csv: columns left out: 'n0', 'odd'" in result.err
    _, *lines = (tmp_path / "own_scores.csv").read_text().splitlines()
    assert lines[0].startswith("0,n1,") and len(lines) == 20
    found = np.array([line.split(",")[2:4] for line in lines], float).T
    np.testing.assert_allclose(found, (scores, ranks), rtol=1e-5)
    assert np.abs(scores).max() < 300  # Unstandardised: squares of columns of 300.

    flags = (f"--workdir={table_run}", f"--output={tmp_path / 's.npz'}")
    succeed("--mode=sample", "--num_samples=30", *flags)
    samples = np.load(tmp_path / "s.npz")["x"]
    np.testing.assert_allclose(samples.mean(axis=0), (100, 200, 300), atol=30)
    assert _is_a_picture(tmp_path / "s.png")


def test_a_run_needs_its_directory_alone_and_notices_changed_data(
    table: Path, table_run: Path, tmp_path: Path
):
    """The CSV is gone: modes work. It comes back changed: training refuses."""
    figures = report(table_run)["figures"]
    aurocs = [value for name, value in figures.items() if name.startswith("auroc")]
    assert len(aurocs) == 9  # Of five scores, and the baselines'.
    assert figures["num_test_inliers"] > 0 < figures["num_test_outliers"]
    assert all(0 <= value <= 1 for value in aurocs)
    text = table.read_text()
    table.unlink()
    try:
        result = succeed("--mode=evaluate", f"--workdir={table_run}")
        repeated = report(table_run, "report-1.json")["figures"]
        assert {name: repeated[name] for name in figures} == figures
        assert "auroc" in result.out
        table.write_text(text.replace("e+02,", "e+01,"))
        result = run(*_flags_of(table), f"--workdir={table_run}")
        assert_error(result, "not those that")
    finally:
        table.write_text(text)


def test_bad_rows_are_named_and_no_scores_are_written(table_run: Path, tmp_path: Path):
    np.savetxt(tmp_path / "nan.csv", [[1, np.nan, 2]], delimiter=",")
    np.savetxt(tmp_path / "narrow.csv", np.ones((3, 2)), delimiter=",")
    output = tmp_path / "scores.csv"
    flags = (f"--workdir={table_run}", f"--output={output}")
    for name in ("nan.csv", "narrow.csv", "missing.csv"):
        result = run("--mode=score", *flags, f"--input={tmp_path / name}")
        assert_error(result, name)
        assert not output.exists()


def keep_every_program(*argv: str) -> None:
    """Run a command that keeps programs however short their compilation."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main(*argv)


def test_compiled_programs_are_kept_in_the_users_cache(plane_run: Path, tmp_path: Path):
    """By default; a second start compiles nothing anew."""
    env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    del env["JAX_COMPILATION_CACHE_DIR"]
    kept = []
    for name in ("a.npz", "b.npz"):
        argv = ["--mode=sample", f"--workdir={plane_run}", "--num_samples=5"]
        argv.append(f"--output={tmp_path / name}")
        (result,) = call(keep_every_program, argv, env=env)
        assert result.code == 0, result.err
        kept.append(sorted(tmp_path.glob("cache/ddaebm_jax/compiled/*-cache")))
    assert len(kept[0]) > 1 and kept[1] == kept[0]


# --- Errors -----------------------------------------------------------------------

BAD_COMMANDS = {
    "no config": (["--mode=train"], "--config"),
    "unknown mode": (["--mode=trian"], "train|sample|score"),
    "unknown flag": ([f"--config={PLANE}", "--wrkdir=x"], "did you mean --workdir?"),
    "field without its config": (
        [f"--config={PLANE}", "--game.gamma=1"],
        "did you mean --config.game.gamma?",
    ),
    "flag of other modes": (
        [f"--config={PLANE}", "--seed=3"],
        "--seed is for --mode=sample or --mode=restore or --mode=ood, not for",
    ),
    "config of another mode": (
        ["--mode=sample", f"--config={PLANE}"],
        "--config is for --mode=train or --mode=ablate, not for --mode=sample",
    ),
    "several problems": (
        [f"--config={PLANE}", "--config.game.gama=1", "--config.optimizer.beta1=5"],
        "did you mean game.gamma?; optimizer.beta1 is 5.0; it must be at least 0",
    ),
    "stray word": ([f"--config={PLANE}", "train"], "'train'"),
    "change without a recipe": (["--config.game.gamma=1"], "--config.game.gamma"),
    "too many devices": (
        [f"--config={PLANE}", "--config.parallel.num_devices=64"],
        "parallel.num_devices is 64",
    ),
    "seed too large": (["--mode=sample", "--seed=99999999999999999999"], "seed"),
    "too few samples": (["--mode=sample", "--num_samples=0"], "num_samples"),
    "no workdir": (["--mode=sample"], "--workdir"),
    "no input": (["--mode=score", "--workdir=x"], "--input"),
    "unknown score": (
        ["--mode=score", "--workdir=x", "--input=y", "--score=luck"],
        "--score=luck is not a score; allowed: energy, gradient_norm",
    ),
    "false discoveries alone": (
        ["--mode=score", "--workdir=x", "--input=y", "--fdr=1"],
        "--fdr is 1.0; a rate above 0 and below 1",
    ),
    "workdir below a file": (
        ["--mode=sample", "--workdir=README.md/run"],
        "README.md/run",
    ),
    "workdir not there": (["--mode=evaluate", "--workdir=/nowhere/run"], "/nowhere"),
    "workdir in a bucket": (
        ["--mode=evaluate", "--workdir=gs://bucket/run"],
        "gs://bucket/run is a URL",
    ),
    "table in a bucket": (
        [f"--config={TABLE}", "--config.data.path=s3://bucket/t.csv"],
        "data.path=s3://bucket/t.csv is a URL",
    ),
    "table not there": (
        [f"--config={TABLE}", "--config.data.path=/nowhere.csv"],
        "/nowhere.csv",
    ),
    "unknown variation": (
        ["--mode=ablate", f"--config={PLANE}", "--workdir=x", "--vary=colours"],
        "--vary=colours is not known; allowed: paper, schedule, noise",
    ),
    "bad seed": (
        [
            "--mode=ablate",
            f"--config={PLANE}",
            "--workdir=x",
            "--vary=paper",
            "--seeds=a",
        ],
        "--seeds: 'a'; whole numbers",
    ),
    "nothing to vary": (
        ["--mode=ablate", f"--config={PLANE}", "--workdir=x"],
        "--mode=ablate needs --config and --vary",
    ),
    "alone with a coordinator": (
        [f"--config={PLANE}", "--coordinator=localhost:1"],
        "--coordinator is for --distributed",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_makes_nothing(tmp_path: Path, case: str):
    argv, expected = BAD_COMMANDS[case]
    workdir = tmp_path / "run"
    if not any(flag.startswith(("--mode=s", "--mode=e")) for flag in argv):
        argv = [*argv, f"--workdir={workdir}"]
    assert_error(run(*argv), expected)
    assert not workdir.exists()


def test_flags_may_come_from_a_file(tmp_path: Path):
    (tmp_path / "flags").write_text("--mode=score\n--workdir=/nowhere\n--input=x\n")
    assert_error(run(f"--flagfile={tmp_path / 'flags'}"), "/nowhere/config.json")


def test_help_shows_all_modes():
    result = succeed("--help")
    lines, mode, listed = result.out.splitlines(), "", {}
    assert len(lines) <= 82 and max(map(len, lines)) <= 80
    for line in lines:
        if title := re.match("--mode=(\\w+)", line):
            mode = title[1]
        listed.setdefault(mode, set()).update(re.findall("--(\\w+)(?= |$)", line))
    for name in MODES:
        values = absl_flags.FlagValues()
        importlib.import_module(f"ddaebm_jax.commands.{name}").define_flags(values)
        assert set(values) <= listed[name], name


@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
def test_help_of_a_mode_explains_its_flags_in_full(flag: str):
    text = run("--mode=sample", flag).out
    for name in "mode workdir seed output checkpoint".split():
        assert f"--{name}:" in text
    for name in ("config", "out"):
        assert f"--{name}:" not in text


def show(kind: str, text: str) -> None:
    """Print a text where stdout is unusual."""
    if kind == "none":
        sys.stdout = None
    elif kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        sys.stdout = open(1, "w", encoding=kind, closefd=False)
    common.show(text)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("ascii", "1 \\xd7 cpu\n"),
        ("latin-1", "1 \ufffd cpu\n"),
        ("none", ""),
        ("gone", ""),
    ],
)
def test_any_stdout_will_do(kind: str, shown: str):
    (result,) = call(show, [kind, "1 × cpu"])
    assert (result.code, result.out, result.err) == (0, shown, "")


def warn(*_: object) -> None:
    """A command that causes a library's warning."""
    common.run(lambda _: warnings.warn("Duplicate\nvalues", stacklevel=1), ["main"])


def test_a_librarys_warning_is_one_line():
    (result,) = call(warn, [])
    assert result.err.count("\n") == 1 and "UserWarning: Duplicate values" in result.err


def on_platform(platform: str, *argv: str) -> None:
    """Run a command with another JAX_PLATFORMS; JAX has read the variable already."""
    jax.config.update("jax_platforms", platform)
    main(*argv)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_here_is_named(plane_run: Path, platform: str):
    train = [*tiny(PLANE), f"--workdir={plane_run.parent / 'new'}"]
    sample = ["--mode=sample", f"--workdir={plane_run}"]
    for result in call(on_platform, [platform, *train], [platform, *sample]):
        assert_error(result, f"JAX_PLATFORMS={platform}", "finds cpu", "jax[cuda12]")
    assert not (plane_run.parent / "new").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert_error(run(*tiny(PLANE), f"--workdir={tmp_path}"), "not a run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(config_lib.to_json(config_lib.base()))
    for mode in ("sample", "evaluate"):
        result = run(f"--mode={mode}", f"--workdir={tmp_path}")
        assert_error(result, "no checkpoint")


def fail(error: str, text: str, *argv: str) -> None:
    """Run a command whose training or sampling raises an error."""

    def failing(*_: object) -> None:
        raise getattr(jax.errors, error, MemoryError)(text)

    loop.train = sample.sample = failing
    main(*argv)


@pytest.mark.parametrize(
    ("flag", "error", "text", "advice"),
    [
        (
            f"--config={PLANE}",
            "MemoryError",
            "Unable to allocate 7.28 TiB",
            ("data.batch_size (200)", "optimizer.accumulate", "model.remat"),
        ),
        (
            "--mode=sample",
            "JaxRuntimeError",
            "RESOURCE_EXHAUSTED: Out of memory",
            ("larger device", "evaluation.batch_size"),
        ),
        (f"--config={PLANE}", "JaxRuntimeError", "INTERNAL: a bug", ()),
    ],
)
def test_out_of_memory_names_what_helps(
    tmp_path: Path, flag: str, error: str, text: str, advice: tuple[str, ...]
):
    argv = [error, text, flag, f"--workdir={tmp_path / 'run'}"]
    (result,) = call(fail, argv)
    if advice:
        assert_error(result, *advice)
    else:
        assert result.code == 1 and "INTERNAL: a bug" in result.err


# --- Several processes ------------------------------------------------------------


def _one_of_two(number: int, *flags: str) -> list[str]:
    together = ["--distributed", "--num_processes=2", f"--process_id={number}"]
    return [*tiny(PLANE), *together, *flags]


def test_a_bad_config_is_reported_before_other_processes_join(tmp_path: Path):
    """There is no coordinator, and so nothing to join."""
    flags = (f"--coordinator=localhost:{free_port()}", f"--workdir={tmp_path / 'run'}")
    result = run(*_one_of_two(1, *flags, "--config.game.gamma=-1"))
    assert_error(result, "game.gamma is -1.0")
    assert "Connecting" not in result.err


def test_processes_wait_for_others_for_a_while_only(tmp_path: Path):
    together = (f"--workdir={tmp_path / 'run'}", "--join_timeout=3")
    commands = [
        _one_of_two(number, *together, f"--coordinator=localhost:{free_port()}")
        for number in range(2)
    ]
    for result in call(main, *commands):
        assert_error(result, "not all processes have come within 3 s")
    assert not (tmp_path / "run").exists()
