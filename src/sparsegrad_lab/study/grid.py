"""Works off the runs of experiments: each is a `sparsegrad train` of its own, each result a file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run.folder import RunFolder
from ..run.parsing import arguments_from
from ..tasks.model_folder import model_path
from ..tasks.pretrained import load_config
from .answers import AnswerFiles
from .cell_run import describe, run_in_process
from .experiment import Cell, Experiment
from .locks import Locks, SharedRuns
from .progress import GridProgress
from .results import STUDY_MARKS
from .runs import RejectedFileError, parse_result
from .stored_results import StoredResults

_POLL = 3.0
"Seconds between two looks at the runs of other processes."
_ATTEMPTS = 2
"A run whose process was killed so often is given up."


@dataclass(frozen=True)
class Places:
    """Where a study is kept."""

    results: Path
    "result files"
    runs: Path
    "run folders, without the weights, and logs"
    storage: str | None = None
    "URL of a database that several machines share; None: one machine"


def reproduce(
    experiments: Sequence[Experiment],
    places: Places,
    *,
    keep: Callable[[Cell], bool] = lambda cell: True,
    threads: int | None = None,
    retry: bool = False,
    answers: AnswerFiles | None = None,
    progress: GridProgress | None = None,
) -> dict[str, dict[str, Any]]:
    """Do all runs that have no result yet, and wait for those that other processes do.

    Args:
        experiments: what to run.
        places: where.
        keep: chooses runs.
        threads: of each run; None: PyTorch's own choice.
        retry: do runs again that failed, that had other settings, or whose models have not answered all questions.
        answers: questions for experiments whose models answer some; None: no answers.
        progress: is told of it.

    Returns:
        Name -> result, of failed runs too.

    Raises:
        ValueError: before any run starts: settings are not valid; a run needs a learning rate from a search that has no
            results and is not among the runs; a result has other settings than its run has now, or another learning
            rate than its search found.
    """
    grid = Grid([cell for experiment in experiments for cell in experiment.cells() if keep(cell)], places, answers)
    grid.check()
    grid.open()
    try:
        return grid.work_off(threads, retry, progress or GridProgress())
    finally:
        grid.close()


class Grid:
    """The runs of one call of `reproduce`."""

    def __init__(self, cells: list[Cell], places: Places, answers: AnswerFiles | None = None) -> None:
        self.cells = cells
        self.places = places
        self.answers = answers
        self.results = StoredResults(places.results)

    def check(self) -> None:
        """Check that every run can start: its model, its learning rate and its settings."""
        for experiment in {cell.experiment.name: cell.experiment for cell in self.cells}.values():
            for model in experiment.models:
                _check_model(experiment, model)
        names = {cell.name for cell in self.cells}
        checked: set[str] = set()
        for cell in self.cells:
            own_search = names.issuperset(cell.trials(cell.variant.searched_rates))  # it ends before the run starts
            missing = [] if own_search else [name for name in self.results.search(cell) if name not in self.results]
            if cell.trial is None and missing:
                raise ValueError(
                    f"{cell.name} takes its learning rate from a search that has no result for {', '.join(missing)} in "
                    f"{self.results.folder}; run it first: sparsegrad reproduce {missing[0].split('/')[0]}"
                )
            settings = cell.settings(cell.trial or 1e-3)
            training = {**settings.get("training", {}), "learning_rate": None}
            key = json.dumps({**settings, "seeds": None, "training": training}, sort_keys=True)
            if key not in checked:
                checked.add(key)
                try:
                    arguments_from(settings).check()
                except ValueError as error:
                    raise ValueError(f"experiment {cell.experiment.name}, method {cell.method}: {error}") from error

    def open(self) -> None:
        """Create the runs folder and connect to the database."""
        self.places.runs.mkdir(parents=True, exist_ok=True)
        (self.places.runs / STUDY_MARKS[0]).touch()
        self.shared = SharedRuns(self.places.storage) if self.places.storage else None
        self.locks = Locks(self.places.runs, self.shared)

    def close(self) -> None:
        """Close the connection to the database."""
        if self.shared is not None:
            self.shared.close()

    def work_off(self, threads: int | None, retry: bool, progress: GridProgress) -> dict[str, dict[str, Any]]:
        """Do the runs and wait for those of others, see `reproduce`."""
        if retry:
            self.forget_failures()
        self.forget_outdated(retry)
        self.share_results()
        waiting = False
        while True:
            self.fetch_results()
            self.add_trials()
            left = [cell for cell in self.cells if cell.name not in self.results]
            progress.advance(len(self.cells) - len(left), len(self.cells))
            if not left:
                if self.forget_outdated(retry):  # the search found another learning rate
                    continue
                return {cell.name: self.results.read(cell.name) for cell in self.cells}
            if any(self.run(cell, threads, progress) for cell in left):
                waiting = False
                continue
            if not waiting:
                progress.waiting(left)
            waiting = True
            time.sleep(_POLL)

    def add_trials(self) -> None:
        """Add the trials that the results of a search ask for."""
        names, cells = {cell.name for cell in self.cells}, []
        for cell in self.cells:
            cells.append(cell)
            for rate in self.results.search(cell).values() if cell.trial is not None else ():
                trial = replace(cell, trial=rate)
                if trial.name not in names:
                    names.add(trial.name)
                    cells.append(trial)
        self.cells = cells

    def forget_failures(self) -> None:
        """Remove results of failed runs, and of those that lack answers.

        A run that did not diverge keeps its folder, and goes on from its last checkpoint: it may have failed for want
        of memory or disk. So does one whose answers failed.
        """
        for cell in self.cells:
            with self.locks.held(cell.name) as held:
                if not held or cell.name not in self.results:
                    continue
                status, run = self.results.read(cell.name)["status"], RunFolder(self.places.runs / cell.name)
                if status != "finished" or (self.answers is not None and self.answers.lacks(cell)):
                    self._forget(cell, keep_folder=status != "diverged" or run.finished)

    def forget_outdated(self, retry: bool) -> bool:
        """Remove results that had other settings; True if there were some.

        Raises:
            ValueError: there are some, and `retry` is False. Tables would mix two experiments.
        """
        found = self.results.outdated(self.cells)
        if found and not retry:
            raise ValueError(
                f"{len(found)} results have other settings than their experiments have now: "
                f"{', '.join(words for _, words in found[:4])}{', ...' if len(found) > 4 else ''}. --retry runs them "
                "again; to keep them, use another folder for --results"
            )
        for cell, _ in found:
            with self.locks.held(cell.name) as held:
                if held and self.results.outdated([cell]):  # another process may have run it again by now
                    self._forget(cell, keep_folder=False)
        return bool(found)

    def _forget(self, cell: Cell, keep_folder: bool) -> None:
        """Remove a result, so that the run is done again. Its lock is held."""
        self.locks.forget(cell.name)
        self.results.remove(cell.name)
        if not keep_folder:
            if self.answers is not None:
                self.answers.remove(cell)
            shutil.rmtree(self.places.runs / cell.name, ignore_errors=True)

    def share_results(self) -> None:
        """Give the database the results that it lacks: of an earlier call, or of a process that was killed."""
        if self.shared is None:
            return
        there = self.shared.results()
        for cell in self.cells:
            if cell.name not in there and cell.name in self.results:
                with self.shared.attempt(cell.name) as trial:
                    if trial is not None:
                        self.shared.finish(trial, self.results.read(cell.name))

    def fetch_results(self) -> None:
        """Write the database's results of these runs and of their searches. What else is in it is not written."""
        if self.shared is None:
            return
        wanted = {name for cell in self.cells for name in (cell.name, *self.results.search(cell))}
        for name, result in self.shared.results().items():
            if name in wanted and name not in self.results:
                try:
                    if parse_result(result, self.results.path(name)) is None:
                        raise RejectedFileError("expected the result of a run")
                except RejectedFileError as error:
                    raise ValueError(f"{self.places.storage}, result of {name}: {error}") from error
                self.results.write(name, result)

    def run(self, cell: Cell, threads: int | None, progress: GridProgress) -> bool:
        """Do a run if its learning rate is known and no other process does it; True if it was done."""
        if not self.results.search_finished(cell):
            return False
        with self.locks.attempt(cell.name) as attempt:
            if attempt is None or cell.name in self.results:
                return False
            rate = self.results.learning_rate(cell)
            progress.start(cell, rate)
            arguments = arguments_from(cell.settings(rate))
            asked = self.answers if self.answers is not None and self.answers.lacks(cell) else None
            result = None if asked else self.results.equal_run(arguments)  # the equal run's weights are gone
            if result is None:
                arguments.output = str(self.places.runs / cell.name)
                folder = RunFolder(arguments.output)
                without_weights = folder.finished and not folder.weights.is_dir()
                # Interrupted before its settings changed; or its model cannot answer any more.
                if folder.holds_another_run(arguments) or (asked and without_weights):
                    shutil.rmtree(arguments.output)
                    if asked is not None:
                        asked.remove(cell)
                then = None if asked is None else asked.command(cell, Path(arguments.output))
                result = run_in_process(arguments, threads, attempt, then)
                if result["status"] == "killed" and attempt.number < _ATTEMPTS:
                    return True
            result |= describe(cell, arguments, attempt.number)
            self.results.write(cell.name, result)
            attempt.finish(result)
        progress.end(cell, result)
        return True


def _check_model(experiment: Experiment, model: str) -> None:
    """Check that the model exists. Of a model on the hub, this downloads the config."""
    try:
        load_config(model_path(model))
    except (FileNotFoundError, ValueError) as error:
        before = f"; before experiment {experiment.name}: {experiment.needs}" if experiment.needs else ""
        raise ValueError(f"{error}{before}") from error
