"""Who does which run: processes on one disk use lock files, machines that share a database use Optuna's heartbeat."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..run.process_identity import is_alive, is_on_this_host, process_identity
from ..run.whole_files import write_whole

BEAT = 60
"Seconds between two signs of life of a run in a shared database."
SILENT = 10 * BEAT
"A run without a sign of life for so many seconds may be done by another machine."


@dataclass
class Attempt:
    """The right to do a run, until the `with` block of `Locks.attempt` ends."""

    number: int
    "1 for the first attempt; attempts that ended without a result count"
    _file: Path
    _shared: SharedRuns | None
    _trial: int

    def add_process(self, process: int) -> None:
        """Note the process that does the run, since it may outlive this one."""
        write_whole(self._file, f"{self.number} {process_identity(process)}\n")

    def beat(self) -> None:
        """Show other machines that the run is going on."""
        if self._shared is not None:
            self._shared.beat(self._trial)

    def finish(self, result: dict[str, Any]) -> None:
        """Give the result to other machines."""
        if self._shared is not None:
            self._shared.finish(self._trial, result)


class Locks:
    """Gives each run to one process.

    The operating system frees a lock file when its process ends. A run is then continued, unless the training process
    still runs: its identity is in a file beside the lock.

    Args:
        folder: holds a lock file for each run.
        shared: the runs of several machines.
    """

    def __init__(self, folder: Path, shared: SharedRuns | None = None) -> None:
        self.folder = folder
        self.shared = shared

    @contextmanager
    def attempt(self, name: str) -> Iterator[Attempt | None]:
        """Try to get a run. None if another process or machine does it, or has finished it."""
        file = self.folder / f"{name}.attempt"
        with self.held(name) as held, ExitStack() as stack:
            trial = stack.enter_context(self.shared.attempt(name)) if held and self.shared else 0
            if not held or trial is None:
                yield None
                return
            number, _ = _read_attempt(file)
            attempt = Attempt(number + 1, file, self.shared, trial)
            write_whole(file, f"{attempt.number}\n")
            try:
                yield attempt
            except KeyboardInterrupt:  # the user's, which says nothing about the run
                write_whole(file, f"{number}\n")
                raise

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Hold a run's lock. False if another process of this machine has it, or trains the run."""
        file = self.folder / f"{name}.attempt"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / f"{name}.lock", timeout=0).acquire()
        except Timeout:
            yield False
            return
        with lock:
            _, process = _read_attempt(file)
            yield not (process and is_on_this_host(process) and is_alive(process))

    def forget(self, name: str) -> None:
        """Forget a result and the attempts, so that the run can be done again. The lock is held."""
        (self.folder / f"{name}.attempt").unlink(missing_ok=True)
        if self.shared is not None:
            self.shared.forget(name)


def _read_attempt(file: Path) -> tuple[int, str]:
    """Number of attempts so far, and the training process of the last one, if it got so far.

    An empty file, as a full disk or a crash leaves it, counts as no attempt.
    """
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    number, *process = words or ["0"]
    return int(number), "".join(process)


class SharedRuns:
    """Runs of several machines: each attempt is a trial of one Optuna study in a database.

    A trial that runs holds its run. Optuna fails the trials of machines that have been silent for `SILENT` seconds.

    Args:
        url: of the database, such as postgresql+psycopg://user:password@host/study.
    """

    def __init__(self, url: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = _open_storage(url)
        self.study = optuna.create_study(study_name="sparsegrad runs", storage=self.storage, load_if_exists=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[int | None]:
        """Try to get a run: the number of its trial, or None if another machine does it or has finished it."""
        from optuna.storages import fail_stale_trials
        from optuna.trial import TrialState, create_trial

        with _experimental():
            fail_stale_trials(self.study)
        if any(trial.state in (TrialState.RUNNING, TrialState.COMPLETE) for trial in self._trials(name)):
            yield None
            return
        study = self.storage.get_study_id_from_name(self.study.study_name)
        template = create_trial(state=TrialState.RUNNING, user_attrs={"run": name})
        trial = self.storage.create_new_trial(study, template_trial=template)
        self.beat(trial)
        try:
            # Of machines that come here at once, the one whose trial has the lowest number does the run.
            number = self.storage.get_trial(trial).number
            numbers = [other.number for other in self._trials(name) if other.state == TrialState.RUNNING]
            yield trial if number == min(numbers) else None
        finally:
            if not self.storage.get_trial(trial).state.is_finished():
                self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def beat(self, trial: int) -> None:
        """Show other machines that the run of a trial is going on."""
        self.storage.record_heartbeat(trial)

    def finish(self, trial: int, result: dict[str, Any]) -> None:
        """Store the result of a trial's run."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with suppress(UpdateFinishedTrialError):  # this machine was silent, and another one does the run again
            self.storage.set_trial_user_attr(trial, "result", result)
            self.storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.0])

    def forget(self, name: str) -> None:
        """Forget the results of a run: trials before this one do not count."""
        from optuna.trial import TrialState, create_trial

        self.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"run": name, "forget": True}))

    def close(self) -> None:
        """Close the connections to the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def results(self) -> dict[str, dict[str, Any]]:
        """Name -> result of the finished runs."""
        results: dict[str, dict[str, Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = str(trial.user_attrs.get("run"))
            if trial.user_attrs.get("forget"):
                results.pop(name, None)
            elif "result" in trial.user_attrs:
                results[name] = trial.user_attrs["result"]
        return results

    def _trials(self, name: str) -> list[Any]:
        """Trials of a run since it was last forgotten."""
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get("run") == name]
        forgotten = max((place for place, trial in enumerate(trials) if trial.user_attrs.get("forget")), default=-1)
        return trials[forgotten + 1 :]


@contextmanager
def _experimental() -> Iterator[None]:
    """Optuna calls its heartbeat experimental, in a warning at each use."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _open_storage(url: str, tries: int = 5) -> Any:
    """Optuna's storage. Of several processes that create its tables at once, all but one fail and try again."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DBAPIError

    try:
        with _experimental():
            return RDBStorage(url, heartbeat_interval=BEAT, grace_period=SILENT)
    except DBAPIError:
        if tries == 1:
            raise
    time.sleep(1)
    return _open_storage(url, tries - 1)
