"""Reads the result files of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..study.experiment import experiment_names, load_experiment
from ..tasks.metrics import higher_is_better

_NEEDED = ("task", "method", "seed", "metric", "score", "config", "environment")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    "of its result file"
    result: dict[str, Any]

    @property
    def task(self) -> str:
        """Such as "rte"."""
        return str(self.result["task"]).removeprefix("glue/")

    @property
    def method(self) -> str:
        """The method, or what the experiment calls it."""
        return str(self.result.get("variant") or self.result["method"])

    @property
    def metric(self) -> str:
        """The one that the score is of."""
        return str(self.result["metric"])

    @property
    def higher_is_better(self) -> bool:
        """Of the score; not for a loss."""
        return higher_is_better(self.metric)

    @property
    def unit(self) -> str:
        """Scores of one unit can be compared and averaged: points, hundredths of a metric; or a loss as it is."""
        return "points" if self.higher_is_better else self.metric

    @property
    def score(self) -> float:
        """Of the main metric, in its unit."""
        return float(self.result["score"]) * (100 if self.higher_is_better else 1)

    def shown(self, score: float, digits: int = 1, sign: str = "") -> str:
        """A number in this run's unit as words; a loss has two digits more."""
        return f"{score:{sign}.{digits if self.higher_is_better else digits + 2}f}"

    @property
    def timed(self) -> bool:
        """Whether `seconds` are those of all its steps; of a run that was resumed they are those since then."""
        return not self.result.get("resumed")

    @property
    def seconds(self) -> float:
        """Of training, calibration aside."""
        return float(self.result["training"]["seconds"])

    @property
    def calibration_seconds(self) -> float | None:
        """None for a method without one."""
        calibration = self.result.get("calibration")
        return None if calibration is None else float(calibration["seconds"])

    @property
    def megabytes(self) -> float:
        """The most that training took, in 1e6 bytes."""
        return float(self.result["training"]["peak_memory_bytes"]) / 1e6

    @property
    def entries(self) -> int:
        """Trained entries of the adapter, or of the layers that would have one."""
        return int(self.result["trained_entries"]["adapter"])


@dataclass(frozen=True)
class Failure:
    """A run of a study that came to no score."""

    path: Path
    result: dict[str, Any]

    @property
    def words(self) -> str:
        """What was to be run, and what became of it."""
        task = str(self.result["task"]).removeprefix("glue/")
        found = self.result
        return f"{task}, {found['variant']}, seed {found['seed']}: {found['status']} ({found['error']})"


@dataclass(frozen=True)
class Section:
    """What is compared with each other: an experiment of `sparsegrad reproduce`, or all runs that belong to none."""

    name: str
    title: str
    question: str
    methods: dict[str, str]
    "name -> what it is, in the order of the tables"
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    "the method that the others are compared with"
    runs: tuple[Run, ...]
    trials: tuple[Run, ...] = ()
    "runs of the search for the learning rates"
    failures: tuple[Failure, ...] = ()
    paper: dict[str, Any] | None = None
    "the published figures: source, columns, scores of each method"
    scored: bool = True
    "whether the scores mean something; else times and memory alone do"


def read_sections(paths: Iterable[str | Path], baseline: str | None = None) -> list[Section]:
    """All runs below some folders, by experiment; those of no experiment first.

    Args:
        paths: folders and files.
        baseline: what the others are compared with; None: the experiment's own, or "lora".

    Raises:
        FileNotFoundError, ValueError: see `read_runs`.
    """
    found, failures = _read(paths)
    by: dict[str, tuple[list[Run], list[Failure]]] = {}
    for run in found:
        by.setdefault(run.result.get("experiment", ""), ([], []))[0].append(run)
    for failure in failures:
        by.setdefault(failure.result.get("experiment", ""), ([], []))[1].append(failure)
    order = {name: position for position, name in enumerate(experiment_names())}
    return [_section(name, *by[name], baseline) for name in sorted(by, key=lambda name: (order.get(name, -1), name))]


def _section(name: str, found: list[Run], failures: list[Failure], baseline: str | None) -> Section:
    runs = tuple(run for run in found if not run.result.get("trial"))
    trials = tuple(run for run in found if run.result.get("trial"))
    met = sorted(
        {run.method for run in runs}, key=lambda m: (not m.startswith("sparsegrad"), not m.startswith("lora"), m)
    )
    if name not in experiment_names():  # run folders, or experiments of one's own
        tasks = tuple(dict.fromkeys(run.task for run in runs))
        seeds = tuple(sorted({run.result["seed"] for run in runs}))
        return Section(
            name, name or "All runs", "", dict.fromkeys(met, ""), tasks, seeds, baseline or "lora", runs, trials,
            tuple(failures),
        )  # fmt: skip
    scale = found[0].result["scale"] if found else failures[0].result["scale"]
    experiment = load_experiment(name, scale)
    words = {method.name: method.words for method in experiment.methods}
    return Section(
        name, experiment.title, experiment.question, {**words, **{m: words.get(m, "") for m in met}},
        tuple(task.removeprefix("glue/") for task in experiment.tasks), experiment.seeds,
        baseline or experiment.baseline, runs, trials, tuple(failures), experiment.paper, experiment.scored,
    )  # fmt: skip


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs below some folders: `result.json` of run folders, and result files of a study, trials aside.

    Raises:
        FileNotFoundError: a path is not there, or there is no result below them.
        ValueError: a result.json is broken.
    """
    return [run for run in _read(paths)[0] if not run.result.get("trial")]


def _read(paths: Iterable[str | Path]) -> tuple[list[Run], list[Failure]]:
    paths, files = list(paths), []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        files += [path] if path.is_file() else sorted(path.rglob("*.json"))
    runs: list[Run] = []
    failures: list[Failure] = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if file.name == "result.json":
                raise ValueError(f"{file}: expected JSON ({error})") from error
            continue
        if not isinstance(found, dict):
            continue
        if all(name in found for name in _NEEDED):
            runs.append(Run(file, found))
        elif {"status", "error", "variant", "config"} <= found.keys():
            failures.append(Failure(file, found))
    if not runs and not failures:
        raise FileNotFoundError(
            f"no finished runs below {', '.join(map(str, paths))}: expected result.json files, as sparsegrad train "
            "writes them"
        )
    return runs, failures
