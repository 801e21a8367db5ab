"""Reads the result files of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run.settings import flat
from ..tasks.metrics import higher_is_better
from .experiment import experiment_names, load_experiment

_NEEDED = ("task", "method", "seed", "metric", "score", "config", "environment")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    "of its result file"
    result: dict[str, Any]
    label: str | None = None
    "what tells it from runs of the same method on the same task and seed"
    rows: str = ""
    "what tells its rows from those of another task of the same name"

    @property
    def task(self) -> str:
        """Such as "rte"."""
        return str(self.result["task"]).removeprefix("glue/") + self.rows

    @property
    def method(self) -> str:
        """The method, or what the experiment calls it."""
        return self.label or str(self.result.get("variant") or self.result["method"])

    @property
    def made(self) -> tuple[Any, ...]:
        """What two records of one run have in common, such as those of two experiments that share it."""
        of = self.result
        return of["environment"]["time"], of["task"], of["seed"], of["score"], of["training"]["seconds"]

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
    def task(self) -> str:
        """Such as "rte"."""
        return str(self.result["task"]).removeprefix("glue/")

    @property
    def words(self) -> str:
        """What was to be run, and what became of it."""
        found = self.result
        return f"{self.task}, {found['variant']}, seed {found['seed']}: {found['status']} ({found['error']})"


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
    experiment: str = ""
    "the experiment's name, which that of a section is as well, unless there is a section for each of several models"
    borrowed: tuple[str, ...] = ()
    "what of it is another experiment's, in words"

    @property
    def tried(self) -> set[str]:
        """Methods of which a run has a score or has failed."""
        failed = {str(one.result["variant"]) for one in self.failures if not one.result.get("trial")}
        return {run.method for run in self.runs} | failed

    @property
    def setting(self) -> str:
        """Model, rows and steps of its runs, in a sentence; empty where there are none."""
        if not self.runs:
            return ""
        models = ", ".join(sorted({str(run.result["model"]) for run in self.runs}))
        rows = [
            f"{task} {', '.join(found)}"
            for task in self.tasks
            if (found := sorted({
                f"{run.result['rows']['train']:,} ({sum(run.result['rows'].values()) - run.result['rows']['train']:,})"
                for run in self.runs if run.task == task
            }))
        ]  # fmt: skip
        steps = sorted({run.result["steps"] for run in self.runs})
        count = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        return f"Model {models}. Rows to train on (and to score on): {'; '.join(rows)}. {count} steps a run."


def read_sections(paths: Iterable[str | Path], baseline: str | None = None) -> list[Section]:
    """All runs below some folders, by experiment, and by model where an experiment has several; those of no experiment
    first.

    The trials of a `sparsegrad search` and the run folders of a study are left out, but for those of a folder that is
    itself among the paths: the one has its own summary, the other its result files.

    Args:
        paths: folders and files.
        baseline: what the others are compared with; None: the experiment's own, or "lora".

    Raises:
        FileNotFoundError: a path is not there, or there is no result below them.
        ValueError: a result.json is broken, or no run is of the baseline.
    """
    found, failures = _read(paths)
    if baseline is not None and all(run.method != baseline for run in found):
        methods = ", ".join(sorted({run.method for run in found}))
        raise ValueError(f"baseline: expected a method that has runs, one of {methods}; found {baseline!r}")
    by: dict[str, tuple[list[Run], list[Failure]]] = {}
    for run in found:
        by.setdefault(run.result.get("experiment", ""), ([], []))[0].append(run)
    for failure in failures:
        by.setdefault(failure.result.get("experiment", ""), ([], []))[1].append(failure)
    order = {name: position for position, name in enumerate(experiment_names())}
    sections: list[Section] = []
    for name in sorted(by, key=lambda name: (order.get(name, -1), name)):
        sections += _sections(name, *by[name], baseline)
    return _with_borrowed(sections)


def _sections(name: str, found: list[Run], failures: list[Failure], baseline: str | None) -> list[Section]:
    """One, or one for each model."""
    shipped = name in experiment_names()
    if shipped:
        models = list(load_experiment(name, _scale(found, failures)).models)
    else:
        results = [one.result for some in (found, failures) for one in some]
        models = list(dict.fromkeys(str(result["model"]) for result in results))
    if len(models) == 1:
        return [_section(name, found, failures, baseline)]
    sections = []
    for model in models:
        own = [run for run in found if run.result["model"] == model]
        failed = [failure for failure in failures if failure.result["model"] == model]
        section = _section(name, own, failed, baseline, _scale(found, failures) if shipped else None)
        ends = [model.rstrip("/").rpartition("/")[2] for model in models]
        short = ends[models.index(model)]
        short = model.strip("/").replace("/", "-") if ends.count(short) > 1 else short
        sections.append(replace(section, name=f"{name}{'-' if name else ''}{short}", title=f"{section.title}, {short}"))
    return sections


def _scale(found: list[Run], failures: list[Failure]) -> str:
    return str((found or failures)[0].result["scale"])


def _section(
    name: str, found: list[Run], failures: list[Failure], baseline: str | None, scale: str | None = None
) -> Section:
    runs = tuple(run for run in found if not run.result.get("trial"))
    trials = tuple(run for run in found if run.result.get("trial"))
    if not name:
        runs = _told_apart(_with_rows(runs))
    met = sorted(
        {run.method for run in runs}, key=lambda m: (not m.startswith("sparsegrad"), not m.startswith("lora"), m)
    )
    if name not in experiment_names():  # run folders, or experiments of one's own
        tasks = tuple(dict.fromkeys(run.task for run in runs))
        seeds = tuple(sorted({run.result["seed"] for run in runs}))
        about: dict[str, dict[str, str]] = {run.method: run.result.get("about", {}) for run in runs}
        first: dict[str, str] = next(iter(about.values()), {})
        return Section(
            name, first.get("title") or name or "All runs", first.get("question", ""),
            {method: about[method].get("words", "") for method in met}, tasks, seeds,
            baseline or first.get("baseline", "lora"), runs, trials, tuple(failures), experiment=name,
        )  # fmt: skip
    experiment = load_experiment(name, scale or _scale(found, failures))
    words = {method.name: method.words for method in experiment.methods}
    return Section(
        name, experiment.title, experiment.question, {**words, **{m: words.get(m, "") for m in met}},
        tuple(task.removeprefix("glue/") for task in experiment.tasks), experiment.seeds,
        baseline or experiment.baseline, runs, trials, tuple(failures), experiment.paper, experiment.scored, name,
    )  # fmt: skip


_DATA = ("train_file", "validation_file", "folder", "text", "label", "labels", "regression")
"Settings that say what the rows of a task of one's own are."


def _with_rows(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Tasks are named by their files: those with one name and different rows get the settings that tell them apart."""
    given = {run.path: {name: run.result["config"]["data"].get(name) for name in _DATA} for run in runs}
    found = []
    for run in runs:
        own = run.result["config"].get("task") in ("files", "text", "images")
        others = [given[other.path] for other in runs if own and other.task == run.task]
        differ = [name for name in _DATA if any(other[name] != given[run.path][name] for other in others)]
        words = ", ".join(f"{name} {given[run.path][name]}" for name in differ)
        found.append(replace(run, rows=f" ({words})") if words else run)
    return tuple(found)


def _told_apart(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Run folders with one method, task and seed are named by the settings in which they differ; of several with the
    very same settings the last one counts.
    """
    alike: dict[tuple[str, str, int], dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: str(run.result["environment"].get("time"))):
        alike.setdefault((run.method, run.task, run.result["seed"]), {})[str(sorted(_set(run).items()))] = run
    differ: dict[str, set[str]] = {}
    for (method, _, _), some in alike.items():
        settings = [_set(run) for run in some.values()]
        names = {name for one in settings for name in one if any(one[name] != other.get(name) for other in settings)}
        differ.setdefault(method, set()).update(names)
    told = {}
    for (method, _, _), some in alike.items():
        for run in some.values():
            words = [f"{name.rpartition('.')[2]} {_set(run).get(name)}" for name in sorted(differ[method])]
            told[run.path] = replace(run, label=f"{method} ({', '.join(words)})") if words else run
    return tuple(told[run.path] for run in runs if run.path in told)


def _set(run: Run) -> dict[str, Any]:
    """What a run was told, but for seed and folder, by dotted names; the learning rate that it had."""
    found = {name: value for name, value in flat(run.result["config"]).items() if name not in ("output", "seeds")}
    return {**found, "training.learning_rate": run.result.get("learning_rate")}


def _with_borrowed(sections: list[Section]) -> list[Section]:
    """Runs that are another experiment's as well are named as such, in the section that comes later."""
    first: dict[tuple[Any, ...], tuple[str, str]] = {}
    found = []
    for section in sections:
        taken: dict[tuple[str, str, str], set[int]] = {}
        for run in section.runs:
            title, method = first.setdefault(run.made, (section.title, run.method))
            if title != section.title:
                taken.setdefault((run.method, title, method), set()).add(run.result["seed"])
        words = tuple(
            f"In seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}, {method} has the runs of "
            f"{other} in {title!r}."
            for (method, title, other), seeds in taken.items()
        )
        found.append(replace(section, borrowed=words))
    return found


def _read(paths: Iterable[str | Path]) -> tuple[list[Run], list[Failure]]:
    paths, files = list(paths), []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        inner = {mark.parent for mark in path.rglob("claims.journal")} - {path}
        searches = {mark.parent for name in ("search.json", "trials.journal") for mark in path.rglob(name)} - {path}
        inner |= {trial for folder in searches for trial in folder.glob("trial-*")}
        files += (
            [path] if path.is_file() else
            [file for file in sorted(path.rglob("*.json")) if inner.isdisjoint(file.parents)]
        )  # fmt: skip
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
