"""Groups runs into what is compared with each other: a section for each experiment and model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run.settings import RunArguments
from .experiment import BASELINE, Experiment
from .experiment_files import SHIPPED, experiment_names, load_experiment
from .labels import label_data, label_runs, replaced_runs
from .results import ResultFiles, read_results
from .runs import About, Failure, Run


@dataclass(frozen=True)
class Section:
    """Runs that are compared with each other: of an experiment, or all those that belong to none."""

    name: str
    "unique in a report; begins the names of its files"
    title: str
    question: str
    methods: dict[str, str]
    "name -> description, in the order of the tables"
    tasks: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    "method -> the seeds that the experiment plans; those of all runs, where the experiment is not known"
    baseline: str
    "method that the others are compared with"
    runs: tuple[Run, ...]
    trials: tuple[Run, ...] = ()
    "runs of the search for the learning rates"
    failures: tuple[Failure, ...] = ()
    paper: dict[str, Any] | None = None
    "published figures: source, columns, and scores or costs by method"
    scored: bool = True
    "False where runs are too short to learn: their scores mean nothing, their times and memory do"
    experiment: str = ""
    "name of the experiment; several models of one experiment get a section each"
    remarks: tuple[str, ...] = ()
    "sentences about learning rates of other searches, runs on other rows or that nobody planned, and shared runs"

    @property
    def attempted(self) -> set[str]:
        """Methods with a finished or a failed run, the search's aside."""
        failed = {failure.method_name for failure in self.failures if not failure.trial}
        return {run.method_name for run in self.runs} | failed

    def runs_of(self, task: str | None = None, method: str | None = None) -> list[Run]:
        """Its runs of a task, of a method, or of both."""
        return [run for run in self.runs if task in (None, run.task_name) and method in (None, run.method_name)]

    def failures_of(self, task: str, method: str) -> list[Failure]:
        """Failed runs of a method on a task, the search's aside."""
        return [
            failure for failure in self.failures
            if (failure.task_name, failure.method_name, failure.trial) == (task, method, False)
        ]  # fmt: skip

    @property
    def setting(self) -> str:
        """Model, rows and steps of the runs, in a sentence; empty without runs."""
        if not self.runs:
            return ""
        models = ", ".join(sorted({run.model for run in self.runs}))
        rows = []
        for task in self.tasks:
            sizes = [run.rows for run in self.runs_of(task)]
            text = sorted(set(map(str, sizes)))
            rows += [f"{task} {' or '.join(text)}"] if text else []
        steps = sorted({run.steps for run in self.runs})
        count = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        return f"Model {models}. Rows: {'; '.join(rows)}. {count} steps a run."


@dataclass(frozen=True, eq=False)
class Report:
    """The results that a report is made of."""

    sections: list[Section]
    unfinished: tuple[Path, ...] = ()
    "run folders without a result"
    rejected: tuple[str, ...] = ()
    "files that were left out, each with the reason"


def read_report(paths: Iterable[str | Path], baseline: str | None = None, folder: Path | None = None) -> Report:
    """Read all results below some paths, see `read_results`, and group them.

    Args:
        paths: run folders, folders that hold some, or result files.
        baseline: method that the others are compared with; default: the experiment's own, or "lora".
        folder: has the experiments of one's own, so that the report can name runs that are missing.

    Raises:
        FileNotFoundError: a path does not exist, or there is no result below any of them.
        ValueError: the baseline has no runs.
    """
    files = read_results(paths)
    sections = _sections(files, baseline, folder)
    # The second part has the names of methods with several settings, such as "lora (rank 4)".
    methods = sorted({run.method_name for run in files.runs} | {name for one in sections for name in one.methods})
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline: expected a method that has runs, one of {', '.join(methods)}; found {baseline!r}")
    replaced = replaced_runs(label_data(tuple(run for run in files.runs if not run.experiment and not run.trial)))
    return Report(_note_shared_runs(sections), files.unfinished, (*files.rejected, *replaced))


def _sections(files: ResultFiles, baseline: str | None, folder: Path | None) -> list[Section]:
    """Runs without an experiment first, then the shipped experiments in their order, then others."""
    shipped = {name: number for number, name in enumerate(experiment_names())}

    def kind_of(found: Run | Failure) -> tuple[str, str, bool]:
        """Experiment and scale, and whether it is one's own with the name of a shipped one. Other runs are alike."""
        if not found.experiment:
            return "", "", False
        return found.experiment, found.scale, found.about.own and found.experiment in shipped

    everything: list[Run | Failure] = [*files.runs, *files.failures]
    kinds = set(map(kind_of, everything))
    sections = []
    for kind in sorted(kinds, key=lambda kind: (kind[0] != "", shipped.get(kind[0], -1), *kind)):
        name, scale, own = kind
        runs = [run for run in files.runs if kind_of(run) == kind]
        failures = [failure for failure in files.failures if kind_of(failure) == kind]
        experiment = _experiment(name, scale, runs, failures, folder)
        found = _sections_by_model(name, experiment, runs, failures, baseline)
        if sum(other[0] == name for other in kinds) > 1:
            ending = f"scale {scale}{', your own' if own else ''}"
            found = [
                replace(one, name=safe_name(f"{one.name}-{ending}"), title=f"{one.title}, {ending}") for one in found
            ]
        sections += found
    return sections


def _experiment(
    name: str, scale: str, runs: list[Run], failures: list[Failure], folder: Path | None
) -> Experiment | None:
    """The experiment of some results, shipped or in one's own folder; None if it is not there."""
    own = name not in experiment_names() or any(found.about.own for found in (*runs, *failures))
    where = folder if own else SHIPPED
    if where is None or name not in experiment_names(where, scale):
        return None
    return load_experiment(name, scale, where)


def _sections_by_model(
    name: str, experiment: Experiment | None, runs: list[Run], failures: list[Failure], baseline: str | None
) -> list[Section]:
    """One section, or one for each model, whose short name is added to name and title."""
    found = [one.model for one in (*runs, *failures) if one.model]
    models = list(dict.fromkeys([*(experiment.models if experiment else ()), *found]))
    if len(models) < 2:
        return [_section(name, experiment, runs, failures, baseline)]
    ends = [model.rstrip("/").rpartition("/")[2] for model in models]
    sections = []
    for model, end in zip(models, ends, strict=True):
        short = model.strip("/") if ends.count(end) > 1 else end
        section = _section(
            name, experiment, [run for run in runs if run.model == model],
            [failure for failure in failures if failure.model == model], baseline,
        )  # fmt: skip
        file_name = f"{name}-{short}".lstrip("-")
        sections.append(replace(section, name=safe_name(file_name), title=f"{section.title}, {short}"))
    return sections


def safe_name(name: str) -> str:
    """A name as a part of file names and of links: letters, digits, `_`, `-` and inner dots."""
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".-")


def _section(
    name: str, experiment: Experiment | None, found: list[Run], failures: list[Failure], baseline: str | None
) -> Section:
    extra: tuple[str, ...] = ()
    if experiment is not None:
        planned = [task.removeprefix("glue/") for task in experiment.tasks]
        extra = _not_planned(experiment, planned, [*found, *failures])
        found = [run for run in found if run.task_name in planned]
        failures = [failure for failure in failures if failure.task_name in planned]
    runs = tuple(run for run in found if not run.trial)
    trials = tuple(run for run in found if run.trial)
    if not name:
        runs = label_runs(label_data(runs))
    methods = _in_order(runs)
    if experiment is None:
        scored: list[Run | Failure] = [*(failure for failure in failures if not failure.trial), *runs]
        about = {one.method_name: one.about for one in scored}
        methods += [method for method in about if method not in methods]
        first = next(iter(about.values()), About())
        return Section(
            name, _line(first.title) or name or "All runs", _line(first.question),
            {method: _line(about[method].words) for method in methods},
            tuple(dict.fromkeys(run.task_name for run in runs)),
            dict.fromkeys(methods, tuple(sorted({run.seed for run in runs}))),
            baseline or _line(first.baseline) or BASELINE, runs, trials, tuple(failures), scored=first.scored,
            experiment=name, remarks=_other_rows(runs),
        )  # fmt: skip
    remarks = (*_borrowed_rates(experiment, methods), *_other_rows(runs), *extra)
    words = {name: method.words for name, method in experiment.methods.items()}
    return Section(
        name, experiment.title, experiment.question, {**words, **{m: words.get(m, "") for m in methods}},
        tuple(planned), experiment.seeds_by_method,
        baseline or experiment.baseline, runs, trials, tuple(failures), experiment.paper, experiment.scored, name,
        remarks,
    )  # fmt: skip


def _not_planned(experiment: Experiment, tasks: list[str], found: Iterable[Run | Failure]) -> tuple[str, ...]:
    """Sentences about results on other tasks than the experiment's, which are left out, and with other seeds."""
    left_out: dict[str, set[str]] = {}
    seeds: dict[str, set[int]] = {}
    for one in found:
        if one.task_name not in tasks:
            left_out.setdefault(one.task_name, set()).add(one.method_name)
        elif not one.trial and one.seed not in experiment.seeds_by_method.get(one.method_name, (one.seed,)):
            seeds.setdefault(one.method_name, set()).add(one.seed)
    sentences = [
        f"Left out, since the experiment does not have the task: {', '.join(sorted(methods))} on {task}."
        for task, methods in left_out.items()
    ]
    sentences += [
        f"The experiment does not plan these seeds of {method}, which the tables count too: "
        f"{', '.join(map(str, sorted(own)))}."
        for method, own in seeds.items()
    ]
    return tuple(sentences)


def _borrowed_rates(experiment: Experiment, methods: Iterable[str]) -> tuple[str, ...]:
    """A sentence for each search of another experiment or method that gives learning rates here."""
    of_search: dict[str, list[str]] = {}
    for method in methods:
        variant = experiment.methods.get(method)
        if variant is not None and variant.rates_of is not None:
            of_search.setdefault(variant.rates_of, []).append(method)
    return tuple(
        f"Learning rate of {', '.join(names)}: the one found for {source}, without a search of their own."
        for source, names in of_search.items()
    )


def _other_rows(runs: Iterable[Run]) -> tuple[str, ...]:
    """Sentences for each task whose runs had different rows, by the hashes in the results of those that have some."""
    found: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for split, sha in run.environment.rows_sha256.items():
            found.setdefault(run.task_name, {}).setdefault(split, set()).add(sha)
    sentences = []
    for task, splits in found.items():
        different = [split for split, hashes in splits.items() if len(hashes) > 1]
        if "train" in different:
            sentences.append(f"The runs on {task} did not train on the same rows.")
        if evaluated := [split for split in different if split != "train"]:
            sentences.append(
                f"The runs on {task} were not evaluated on the same rows ({', '.join(evaluated)}): their scores cannot "
                "be compared."
            )
    return tuple(sentences)


def _in_order(runs: Iterable[Run]) -> list[str]:
    """Names of methods: variants of the package's default first, then those of the baseline, then the others."""
    first = (RunArguments().method, BASELINE)
    names = {(*(run.method != method for method in first), run.method_name) for run in runs}
    return list(dict.fromkeys(str(name[-1]) for name in sorted(names)))


def _line(text: str) -> str:
    return " ".join(text.split())


def _note_shared_runs(sections: list[Section]) -> list[Section]:
    """Add sentences about runs that an earlier section has too."""
    first: dict[tuple[Any, ...], tuple[str, str]] = {}
    noted = []
    for section in sections:
        shared: dict[tuple[str, str, str], set[int]] = {}
        for run in section.runs:
            title, method = first.setdefault(run.identity, (section.title, run.method_name))
            if title != section.title:
                shared.setdefault((run.method_name, title, method), set()).add(run.seed)
        sentences = tuple(
            f"The runs of {method} with seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))} are "
            f"those of {other} in {title!r}."
            for (method, title, other), seeds in shared.items()
        )
        noted.append(replace(section, remarks=section.remarks + sentences))
    return noted
