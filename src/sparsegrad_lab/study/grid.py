"""Works off experiments: every run is a `sparsegrad train` of its own, every result a file."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..cli.train import as_arguments
from ..run.environment import environment
from ..run.exit_codes import status_of
from ..run.folder import RunFolder, write_whole
from ..run.search import journal
from ..run.settings import METHODS, RunArguments, flat
from ..tasks.pretrained import load_config, model_path
from ..tasks.task import higher_is_better
from .experiment import Cell, Experiment
from .locks import BEAT, Claims

_POLL = 3.0  # seconds between two looks at what others are doing
_READ_BY = {
    "calibration.": ("sparsegrad", "literal"), "adapter.shared": ("sparsegrad", "literal"),
    "adapter.products": ("literal",),
}  # fmt: skip
"Settings, by the beginnings of their names -> the methods that read them, where not all do."
_ATTEMPTS = 2  # a run whose process was killed so often is given up


@dataclass(frozen=True)
class Places:
    """Where a study is kept."""

    results: Path
    "a JSON file for each run"
    runs: Path
    "run folders, without the weights, and what the runs said"
    storage: str | None = None
    "Optuna's, where the claims are: postgresql://...; None: a journal file in `runs`"

    def result(self, name: str) -> Path:
        """File of a run."""
        return self.results / f"{name}.json"


class Reporter:
    """Hears what a study does; this one says nothing."""

    def start(self, cell: Cell, learning_rate: float | None) -> None:
        """A run begins."""

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        """A run is over."""

    def counts(self, finished: int, total: int) -> None:
        """So many of all runs have a result."""

    def waits(self, cells: Sequence[Cell]) -> None:
        """These runs are left, and others are at them."""


def reproduce(
    experiments: Sequence[Experiment],
    places: Places,
    *,
    keep: Callable[[Cell], bool] = lambda cell: True,
    threads: int | None = None,
    retry: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, dict[str, Any]]:
    """Run what has no result yet, and wait for what others run.

    Failed runs have a result too, which says so.

    Args:
        experiments: what to run.
        places: where.
        keep: which of the runs.
        threads: of each run; None: PyTorch's own choice.
        retry: run again what has failed before, and what was run with other settings.
        reporter: hears of it.

    Returns:
        Run's name -> result.

    Raises:
        ValueError: a run takes its learning rate from a search that is not among the runs and has no results, or has
            settings that `sparsegrad train` refuses; before any of them is started. A result that is there was made
            with other settings than its run has now, or with another learning rate than the search gives.
    """
    reporter = reporter or Reporter()
    cells = [cell for experiment in experiments for cell in experiment.cells() if keep(cell)]
    _check(cells, places)
    claims = Claims(places.storage or _journal_in(places.runs))
    for cell in cells if retry else ():
        if places.result(cell.name).is_file() and _read(places.result(cell.name))["status"] != "finished":
            _forget(cell, places, claims)
    _renewed(cells, places, claims, retry)
    _publish(cells, places, claims)
    idle = False
    while True:
        for name, result in claims.results():
            if not places.result(name).is_file():
                _write(places.result(name), result)
        left = [cell for cell in cells if not places.result(cell.name).is_file()]
        reporter.counts(len(cells) - len(left), len(cells))
        if not left:
            if _renewed(cells, places, claims, retry):
                continue
            return {cell.name: _read(places.result(cell.name)) for cell in cells}
        if any(_take(cell, places, claims, threads, reporter) for cell in left):
            idle = False
            continue
        if not idle:
            reporter.waits(left)
        idle = True
        time.sleep(_POLL)


def _publish(cells: list[Cell], places: Places, claims: Claims) -> None:
    """Tell those who do not share a disk of results that lie here: of before, or of a process that was killed between
    its two records of a run.
    """
    there = {name for name, _ in claims.results()}
    for cell in cells:
        if cell.name not in there and places.result(cell.name).is_file() and (attempt := claims.take(cell.name)):
            claims.finish(cell.name, attempt, _read(places.result(cell.name)))


def _renewed(cells: list[Cell], places: Places, claims: Claims, retry: bool) -> bool:
    """Whether results were made with other settings than their runs have now; with `retry` they are removed.

    Raises:
        ValueError: there are some, and they are not to be removed: tables would mix two experiments.
    """
    found = outdated(cells, places)
    if found and not retry:
        raise ValueError(
            f"{len(found)} results were made with other settings than their experiments have now: "
            f"{', '.join(words for _, words in found[:4])}{', ...' if len(found) > 4 else ''}. --retry runs them "
            "again; or keep them, with the experiments that they are of, in a folder of their own"
        )
    for cell, _ in found:
        _forget(cell, places, claims)
        shutil.rmtree(places.runs / cell.name, ignore_errors=True)  # `sparsegrad train` would take it for another's
    return bool(found)


def outdated(cells: Iterable[Cell], places: Places) -> list[tuple[Cell, str]]:
    """Results that were made with other settings than their runs have now, or with another learning rate than the
    search gives: the run, and what differs. A setting that an earlier version did not have counts as the same.
    """
    found = []
    for cell in cells:
        rate = cell.trial if cell.trial is not None else best_rate(cell, places.results)
        if places.result(cell.name).is_file() and (rate is not None or not cell.search):
            there, arguments = _read(places.result(cell.name)), as_arguments(cell.settings(rate))
            was = _settings(there["config"], there.get("adapter_config"))
            now = _settings(arguments.as_dict(), _adapter_config(arguments.method))
            differ = [f"{key} {was[key]}, now {now[key]}" for key in was.keys() & now.keys() if was[key] != now[key]]
            if differ:
                found.append((cell, f"{places.result(cell.name)} ({'; '.join(sorted(differ))})"))
    return found


def _forget(cell: Cell, places: Places, claims: Claims) -> None:
    claims.forget(cell.name)
    places.result(cell.name).unlink(missing_ok=True)  # another process may have done it


def _take(cell: Cell, places: Places, claims: Claims, threads: int | None, reporter: Reporter) -> bool:
    """Run a cell, if it is nobody's and its learning rate is known; whether it was run."""
    rate = cell.trial if cell.trial is not None else best_rate(cell, places.results)
    if rate is None and cell.search:
        return False
    attempt = claims.take(cell.name)
    if not attempt or places.result(cell.name).is_file():
        return False
    reporter.start(cell, rate)
    arguments = as_arguments(cell.settings(rate))
    result = _same(arguments, places.results)
    try:
        if result is None:
            arguments.output = str(places.runs / cell.name)
            result = _run(
                arguments, threads, partial(claims.add_process, cell.name, attempt),
                partial(claims.beat, cell.name, attempt),
            )  # fmt: skip
            if result["status"] == "killed" and attempt < _ATTEMPTS:
                claims.release(cell.name, attempt)
                return True
    except BaseException:
        claims.release(cell.name, attempt)
        raise
    result = {
        **result,
        "experiment": cell.experiment.name,
        "scale": cell.experiment.scale,
        "variant": cell.variant.name,
        "trial": cell.trial is not None,
        "attempts": attempt,
        "about": {  # for a report where the experiment's file is not at hand
            "title": cell.experiment.title,
            "question": cell.experiment.question,
            "baseline": cell.experiment.baseline,
            "words": cell.variant.words,
        },
    }
    if (adapter_config := _adapter_config(arguments.method)) is not None:
        result["adapter_config"] = adapter_config
    _write(places.result(cell.name), result)
    claims.finish(cell.name, attempt, result)
    reporter.end(cell, result)
    return True


def _run(
    arguments: RunArguments, threads: int | None, started: Callable[[int], None], beat: Callable[[], None]
) -> dict[str, Any]:
    """In a process of its own: its memory is its own, and what kills it does not kill the study."""
    output = Path(arguments.output)
    config, log = output.with_name(f"{output.name}.yaml"), output.with_name(f"{output.name}.log")
    write_whole(config, yaml.safe_dump(arguments.as_dict(), sort_keys=False))
    variables = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    command = ["sparsegrad", "train", "--config", str(config)]
    with log.open("w", encoding="utf-8") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "sparsegrad_lab.cli.main", *command[1:]], stdout=said, stderr=said, env=variables
        )
        try:
            started(child.pid)
            while True:
                try:
                    status = child.wait(timeout=BEAT)
                    break
                except subprocess.TimeoutExpired:
                    beat()
        except BaseException:  # it is interrupted as well, and its folder has its checkpoints
            child.terminate()
            child.wait()
            raise
    folder = RunFolder(output)
    if status == 0:
        result = folder.read_result()
        for weights in ("adapter", "model", "tokenizer", "processor"):
            shutil.rmtree(output / weights, ignore_errors=True)  # a study is for the numbers
        return {**result, "status": "finished", "command": " ".join(command)}
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    error = words[-1] if words else f"exit status {status}"
    return {
        "status": status_of(status), "error": error, "task": arguments.task, "method": arguments.method,
        "model": arguments.model, "seed": arguments.seeds[0], "learning_rate": arguments.learning_rate,
        "config": arguments.as_dict(), "environment": {**environment(), "seed": arguments.seeds[0]},
        "command": " ".join(command),
    }  # fmt: skip


def best_rate(cell: Cell, results: Path) -> float | None:
    """The learning rate with the best score in the search; None while a trial is missing, or where there is no search.

    Of several with the same score, as where none has learnt to tell the classes yet, it is the one with the lowest
    training loss; where all trials failed, the lowest that was tried.
    """
    files = [results / f"{name}.json" for name in cell.search]
    if not files or not all(path.is_file() for path in files):
        return None
    found = {}
    for path in files:
        trial = _read(path)
        if trial["status"] != "finished":
            found[_rate(path)] = (-math.inf, 0.0)
            continue
        score = trial["score"] if higher_is_better(trial["metric"]) else -trial["score"]
        found[_rate(path)] = (score, -trial["training_loss_last_sixth"])
    return max(sorted(found), key=found.__getitem__)


def _rate(path: Path) -> float:
    return float(path.stem.rpartition("-lr")[2])


def _same(arguments: RunArguments, results: Path) -> dict[str, Any] | None:
    """A finished run with the very same settings, such as another experiment's: it is not run again."""
    wanted = _given(_settings(arguments.as_dict(), _adapter_config(arguments.method)))
    for path in sorted(results.rglob("*.json")):
        there = _read(path)
        if there.get("status") == "finished" and wanted == _given(
            _settings(there["config"], there.get("adapter_config"))
        ):
            return {**there, "same_as": path.relative_to(results).as_posix()}
    return None


def _settings(config: dict[str, Any], adapter_config: dict[str, Any] | None) -> dict[str, Any]:
    """What decides on a run: without its folder and what its method does not read, a PEFT config by its content."""
    found = {name: value for name, value in flat(config).items() if name != "output"}
    if adapter_config is not None:
        return {**found, "method": adapter_config}
    if found["method"] in METHODS:
        unread = tuple(names for names, methods in _READ_BY.items() if found["method"] not in methods)
        found = {name: value for name, value in found.items() if not name.startswith(unread)}
    return found


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are given; one that is not may be one that an earlier version did not have."""
    return {name: value for name, value in settings.items() if value is not None}


def _adapter_config(method: str) -> dict[str, Any] | None:
    """Content of a PEFT config; None for the methods that have a name."""
    if not method.endswith(".json"):
        return None
    found: dict[str, Any] = json.loads(Path(method).read_text(encoding="utf-8"))
    return found


def _check(cells: list[Cell], places: Places) -> None:
    """Whether all of it can be run, before any of it is."""
    for experiment in {cell.experiment.name: cell.experiment for cell in cells}.values():
        for model in experiment.models:
            _check_model(experiment, model)
    names = {cell.name for cell in cells}
    seen: set[str] = set()
    for cell in cells:
        missing = [name for name in cell.search if name not in names and not places.result(name).is_file()]
        if missing:
            raise ValueError(
                f"{cell.name} takes its learning rate from a search that has no result for {', '.join(missing)} in "
                f"{places.results}; run it first: sparsegrad reproduce {missing[0].split('/')[0]}"
            )
        settings = cell.settings(cell.trial or 1e-3)
        key = json.dumps({**settings, "seeds": None, "training": None}, sort_keys=True)
        if key not in seen:
            seen.add(key)
            try:
                as_arguments(settings).check()
            except ValueError as error:
                raise ValueError(f"experiment {cell.experiment.name}, method {cell.variant.name}: {error}") from error


def _check_model(experiment: Experiment, model: str) -> None:
    """Whether it is there; a hub name is looked up, which fetches its config."""
    try:
        load_config(model_path(model))
    except (FileNotFoundError, ValueError) as error:
        before = f"; before experiment {experiment.name}: {experiment.needs}" if experiment.needs else ""
        raise ValueError(f"{error}{before}") from error


def _journal_in(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return journal(folder / "claims.journal")


def _write(path: Path, result: dict[str, Any]) -> None:
    write_whole(path, json.dumps(result, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
