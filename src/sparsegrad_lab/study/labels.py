"""Tells run folders apart that have the same method and task, by the settings in which they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from ..run.settings import WITHOUT_EFFECT, flat
from .runs import Run

_OWN_TASKS = ("files", "text", "images")
_DATA_SETTINGS = ("train_file", "validation_file", "folder", "text", "label", "labels", "regression")
"Settings that decide which rows a task of one's own has."
_SCORED_BY = ("metrics", "validation_rows", "val_size", "development_share")
"Settings that decide how any task is scored, and on which rows."
_TOKENS = ("language", "max_length", "template", "packing")
"Settings that decide which tokens a loss is of."


def label_data(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Add the settings that differ to the names of tasks with the same name that cannot be compared.

    A setting that the result of an earlier version lacks counts as equal.
    A task of one's own is named after its file, and many files are called "train".
    """

    def settings(run: Run) -> dict[str, Any]:
        names = (*_DATA_SETTINGS, *_SCORED_BY) if run.config.task in _OWN_TASKS else _SCORED_BY
        if not run.higher_is_better:
            names = (*names, *_TOKENS)
        return {"metric": run.metric, **{name: run.config.data[name] for name in names if name in run.config.data}}

    data = {run.path: settings(run) for run in runs}
    labelled, labels = [], _Labels()
    for run in runs:
        others = [data[other.path] for other in runs if other.task_name == run.task_name]
        differ = [
            name for name, value in data[run.path].items()
            if any(other.get(name, value) != value for other in others)
        ]  # fmt: skip
        given = [(name, str(data[run.path][name])) for name in differ]
        label = labels.of(run.task_name, given)
        labelled.append(run.model_copy(update={"data_label": f" ({label})"}) if differ else run)
    return tuple(labelled)


def replaced_runs(runs: tuple[Run, ...]) -> list[str]:
    """A sentence for each run that `label_runs` leaves out, since a later one has the same settings."""
    kept: dict[Hashable, Run] = {}
    sentences = []
    for run in sorted(runs, key=lambda run: run.environment.time):
        key = _key(run)
        if key in kept:
            sentences.append(f"{kept[key].path}: {run.path} has the same settings and seed, and is later")
        kept[key] = run
    return sentences


def label_runs(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Add the settings that differ to the names of methods. Of runs with equal settings, only the latest is kept."""
    kept = {_key(run): run for run in sorted(runs, key=lambda run: run.environment.time)}
    differ: dict[str, set[str]] = defaultdict(set)
    of_task: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in kept.values():
        of_task[run.method_name, run.task_name].append(_settings(run))
    for (method, _), settings in of_task.items():
        for name in {name for one in settings for name in one}:
            given = [one[name] for one in settings if name in one]  # results of earlier versions lack some
            if any(value != given[0] for value in given):
                differ[method].add(name)
    labelled, labels = {}, _Labels()
    for run in kept.values():
        method = run.method_name
        given = [(name.rpartition(".")[2], str(_settings(run).get(name))) for name in sorted(differ[method])]
        label = f"{method} ({labels.of(method, given)})"
        labelled[run.path] = run.model_copy(update={"label": label}) if given else run
    return tuple(labelled[run.path] for run in runs if run.path in labelled)


def _key(run: Run) -> Hashable:
    """Equal for runs that differ in nothing but their time and their folder."""
    return run.method_name, run.task_name, run.seed, str(sorted(_settings(run).items()))


def _settings(run: Run) -> dict[str, Any]:
    """Settings by dotted name, without seed and folder, and with the learning rate that the run had."""
    other = (*WITHOUT_EFFECT, "seeds")
    settings = {name: value for name, value in flat(run.config.model_dump()).items() if name not in other}
    return {**settings, "training.learning_rate": run.learning_rate}


class _Labels:
    """Settings as short lines. Those that are equal only since they are cut are numbered."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], list[list[tuple[str, str]]]] = defaultdict(list)

    def of(self, name: str, settings: list[tuple[str, str]]) -> str:
        """A line for the settings of a method or a task of this name."""
        line = ", ".join(f"{key} {_one_line(value)}" for key, value in settings)
        alike = self.known[name, line]
        if settings not in alike:
            alike.append(settings)
        number = alike.index(settings) + 1
        return line if number == 1 else f"{line}, number {number}"


def _one_line(value: str) -> str:
    return "".join(character if character.isprintable() else " " for character in value)[:100]
