"""A run is given to one process, on one disk and over a database."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsegrad_lab.study.locks import Locks, SharedRuns


def test_a_run_is_given_to_one_process(tmp_path: Path) -> None:
    first, second = Locks(tmp_path), Locks(tmp_path)
    with first.attempt("a/b") as attempt:
        assert attempt is not None
        assert attempt.number == 1
        with second.attempt("a/b") as other:
            assert other is None
        with second.attempt("a/c") as other:
            assert other is not None
    with second.attempt("a/b") as again:
        assert again is not None
        assert again.number == 2
    first.forget("a/b")
    with first.attempt("a/b") as again:
        assert again is not None
        assert again.number == 1


def test_what_a_user_interrupts_is_no_attempt(tmp_path: Path) -> None:
    """After two of them, a run that is killed once would be given up."""

    def interrupted() -> None:
        with Locks(tmp_path).attempt("a") as attempt:
            assert attempt is not None
            assert attempt.number == 1
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted()


def test_an_empty_file_counts_as_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "a.attempt").touch()
    with Locks(tmp_path).attempt("a") as attempt:
        assert attempt is not None
        assert attempt.number == 1


def test_a_training_process_that_outlives_its_study_keeps_the_run(tmp_path: Path) -> None:
    """The lock is free, but a second process would write into the folder of the first."""
    training = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Locks(tmp_path).attempt("a") as attempt:
        assert attempt is not None
        attempt.add_process(training.pid)
    with Locks(tmp_path).attempt("a") as other:
        assert other is None
    training.communicate()
    with Locks(tmp_path).attempt("a") as other:
        assert other is not None
        assert other.number == 2


@pytest.fixture
def shared(empty_database: str) -> Iterator[tuple[SharedRuns, SharedRuns]]:
    """A real server's database, as two machines open it."""
    both = SharedRuns(empty_database), SharedRuns(empty_database)
    yield both
    for machine in both:
        machine.close()


def test_machines_share_runs(shared: tuple[SharedRuns, SharedRuns]) -> None:
    first, second = shared
    with first.attempt("a") as trial:
        assert trial is not None
        with second.attempt("a") as other:
            assert other is None
    with second.attempt("a") as trial:  # the first one has left it without a result
        assert trial is not None
        second.finish(trial, {"score": 1.0})
    with first.attempt("a") as other:
        assert other is None
    assert first.results() == second.results() == {"a": {"score": 1.0}}
    first.forget("a")
    assert second.results() == {}
    with second.attempt("a") as trial:
        assert trial is not None


def test_a_run_of_a_silent_machine_is_done_by_another(shared: tuple[SharedRuns, SharedRuns]) -> None:
    """Its heartbeat is an hour old, by the database's clock; its own result comes too late, and does no harm."""
    import sqlalchemy

    first, second = shared
    with first.attempt("a") as trial:
        assert trial is not None
        with first.storage.engine.begin() as connection:
            past = "UPDATE trial_heartbeats SET heartbeat = heartbeat - INTERVAL '{}'"
            connection.execute(sqlalchemy.text(past.format("9 minutes")))
        with second.attempt("a") as other:
            assert other is None
        first.beat(trial)
        with second.attempt("a") as other:
            assert other is None
        with first.storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text(past.format("11 minutes")))
        with second.attempt("a") as other:
            assert other is not None
            second.finish(other, {"score": 2.0})
        first.finish(trial, {"score": 1.0})
    assert first.results() == {"a": {"score": 2.0}}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Optuna's first tries leave connections
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # threads share the list of filters
def test_many_open_an_empty_database_at_once(empty_database: str) -> None:
    """Optuna creates its tables without asking whether another is about to."""
    with ThreadPoolExecutor(4) as pool:
        machines = list(pool.map(SharedRuns, [empty_database] * 4))
    for machine in machines:
        assert machine.results() == {}
        machine.close()
    gc.collect()  # of what the first tries have left, while the warnings are ignored
