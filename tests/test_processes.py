"""Two real processes train as one does; one that fails ends both, and the run resumes.

Each test starts the command line twice, as on two machines.
"""

import signal
from pathlib import Path

import pytest
from cli import assert_error, report, tiny
from processes import ended, results_of, started
from runs import assert_same_run, final_state, newest_step, steps, train

from ddaebm_jax.errors import InputError
from ddaebm_jax.training import processes, run_directory

GAUSSIANS = "configs/gaussians25.py"
# Nothing decays there, so that a run's length may change.
RELEASED = "configs/released_gaussians25.py"
RUN = {
    "train__num_steps": 6,
    "train__steps_per_dispatch": 1,
    "train__report_every": 2,
    "train__checkpoint_every": 2,
    "evaluation__num_samples": 16,
}


def test_two_processes_do_what_one_does(tmp_path: Path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    results = results_of([*tiny(GAUSSIANS, **RUN), f"--workdir={together}"], [], [])
    for code, _, err in results:
        assert code == 0, err
    first, second = (out for _, out, _ in results)
    assert str(together) in first and "modes_found" in first
    assert str(together) not in second  # One process reports.
    found = report(together)
    assert found["processes"] == 2 and found["device"] == "4 × cpu"
    assert steps(together) == [2, 4, 6, 6]
    assert sorted(path.name for path in (together / "samples").iterdir()) == [
        "plane_00000006.png",
        "steps_00000006.png",
    ]

    config = run_directory.read_config(together)
    config.parallel.num_devices = 4
    train(config, alone)
    assert_same_run(final_state(together), final_state(alone))


def test_a_process_that_is_killed_ends_the_other_and_the_run_resumes(tmp_path: Path):
    flags = [
        *tiny(RELEASED, **{**RUN, "train__num_steps": 10_000}),
        f"--workdir={tmp_path / 'run'}",
    ]
    with started([*flags, "--heartbeat_timeout=10"], [], []) as both:
        for process in both:
            process.until(lambda: newest_step(tmp_path / "run") >= 4)
        both[1].send_signal(signal.SIGKILL)
        other, _ = ended(both)
    assert other.code != 0
    # JAX's own error where it notices first, ours where a computation does.
    noticed = ("another task died", "error: the other processes cannot be reached")
    assert any(words in other.err for words in noticed), other.err

    newest = newest_step(tmp_path / "run")
    shorter = [flag for flag in flags if "num_steps" not in flag]
    shorter.append(f"--config.train.num_steps={newest + 2}")
    for code, _, err in results_of(shorter, [], []):
        assert code == 0, err
    assert int(final_state(tmp_path / "run").step) == newest + 2
    assert report(tmp_path / "run")["resumed_from_step"] == newest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all(tmp_path: Path, number: signal.Signals):
    """After one dispatch, which is saved; JAX chooses a step within it."""
    fields = {
        **RUN,
        "train__num_steps": 100_000,
        "train__checkpoint_every": 100_000,
        "train__steps_per_dispatch": 4,
        "train__report_every": 6,
    }
    flags = [*tiny(RELEASED, **fields), f"--workdir={tmp_path / 'run'}"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(flags, [], []) as both:
        for process in both:
            process.until(lambda: metrics.exists() and metrics.read_text() != "")
        both[1].send_signal(number)
        results = ended(both)
    codes = [code for code, _, _ in results]
    assert codes == ([0, 0] if number == signal.SIGTERM else [0, 130]), results
    step = int(final_state(tmp_path / "run").step)
    assert 0 < step < 100_000
    assert all(f"after step {step} of 100000" in err for _, _, err in results)


def test_processes_with_different_configs_are_refused(tmp_path: Path):
    flags = [*tiny(GAUSSIANS, **RUN), f"--workdir={tmp_path / 'run'}"]
    results = results_of(flags, [], ["--config.game.gamma=0.5"], devices=1)
    for result in results:
        assert_error(result, "game.gamma (", "0.5 in process 1")
    assert not (tmp_path / "run").exists()


def test_addresses_of_processes_must_be_complete():
    for addresses in (("host:1", None, 0), ("", 2, None), ("", 2, 0)):
        with pytest.raises(InputError, match="belong together"):
            processes.join(processes.Processes(*addresses))
    with pytest.raises(InputError, match="process_id is 2 of --num_processes=2"):
        processes.join(processes.Processes("localhost:1", 2, 2))
