"""Experiments: grids of models, tasks, methods and seeds. `experiment_files.py` reads them from files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .runs import FileName

SEARCH = "search"
"Folder within an experiment's results for the search for learning rates."
BASELINE = "lora"
"Method that the others are compared with, where nothing else is set."

_Values = TypeVar("_Values", bound=tuple[Any, ...])


def _distinct(values: _Values) -> _Values:
    if len(set(values)) < len(values):
        raise ValueError("expected each of them once")
    return values


_Names = Annotated[tuple[str, ...], AfterValidator(_distinct)]
_Models = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
_Seeds = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_distinct)]
_Rates = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], AfterValidator(_distinct)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Variant(_Spec):
    """A method of an experiment: settings of `sparsegrad train` under a name."""

    words: str = ""
    "description for the readers of the tables"
    settings: dict[str, Any] = {}
    learning_rates: _Rates = ()
    "a trial for each on every task; the runs use the best"
    seeds: _Seeds | None = None
    "seeds of its own; None: the experiment's"
    rates_of: str | None = None
    "EXPERIMENT/METHOD whose search gives the learning rate, in place of a search of its own"
    searched_rates: tuple[float, ...] = ()
    "learning rates with which that search, or its own, starts; not to be set"
    searched_seeds: tuple[int, ...] = ()
    "`Search.seeds` of that search, or of its own; not to be set"
    most_rates: int | None = None
    "`Search.most_rates` likewise; not to be set"


class Search(_Spec):
    """What is different for the runs that try learning rates."""

    seeds: _Seeds = (100,)
    "a trial for each learning rate and seed; the best mean over seeds wins"
    most_rates: int | None = None
    """while the best learning rate is the lowest or the highest of those tried, try the next one, up to this number;
    None: only those that are given"""
    settings: dict[str, Any] = {}
    task_settings: dict[str, dict[str, Any]] = {}


class Answers(_Spec):
    """Which models answer the questions of `sparsegrad reproduce --questions`, and how."""

    seed: int = 0
    "the models of the runs with this seed"
    max_new_tokens: int = 512
    batch_size: int = 8
    "questions that are answered at the same time"


class Experiment(_Spec):
    """A grid of models x tasks x methods x seeds, after a search for the learning rate of each method.

    The fields are the keys of `experiment.yaml`; see docs/study.md.
    """

    name: FileName
    scale: str
    title: str
    question: str
    needs: str | None = None
    "command to run before"
    only_at: str | None = None
    "the only scale that the experiment has"
    models: _Models = ("minilm",)
    tasks: _Names = ()
    task_settings: dict[str, dict[str, Any]] = {}
    methods: dict[FileName, Variant] = {}
    seeds: _Seeds = (0, 1, 2)
    search: Search = Search()
    settings: dict[str, Any] = {}
    baseline: str = BASELINE
    scored: bool = True
    "False where runs are too short to learn: their scores mean nothing"
    answers: Answers | None = None
    "for language models: answers to questions; None: no answers"
    paper: dict[str, Any] | None = None
    "published figures: source, columns, scores or costs by method"
    own: bool = False
    "False for the experiments that ship with the package; not to be set"

    @property
    def seeds_by_method(self) -> dict[str, tuple[int, ...]]:
        """The seeds of each method: its own, or the experiment's."""
        return {method: variant.seeds or self.seeds for method, variant in self.methods.items()}

    def cells(self) -> Iterator[Cell]:
        """All runs: the search first, then seed by seed, so that complete tables exist early."""
        for model in self.models:
            for task in self.tasks:
                for method, variant in self.methods.items():
                    for rate, seed in product(variant.learning_rates, self.search.seeds):
                        yield Cell(self, model, task, method, seed, rate)
        own = self.seeds_by_method
        for seed in sorted(set().union(*own.values())):
            for model in self.models:
                for task in self.tasks:
                    for method in self.methods:
                        if seed in own[method]:
                            yield Cell(self, model, task, method, seed, None)


@dataclass(frozen=True)
class Cell:
    """One run of an experiment."""

    experiment: Experiment
    model: str
    task: str
    method: str
    seed: int
    trial: float | None
    "learning rate that a run of the search tries; None for a run whose score counts"

    @property
    def variant(self) -> Variant:
        """Settings of its method."""
        return self.experiment.methods[self.method]

    @property
    def name(self) -> str:
        """Path of its result file below the results folder, without the suffix."""
        if self.trial is not None:
            return self._trial(f"{self.experiment.name}/{self.method}", self.trial, self.seed)
        return f"{self.experiment.name}/{self.model_and_task}/{self.method}-{self.seed}"

    def trials(self, rates: Iterable[float]) -> dict[str, float]:
        """Name -> learning rate of runs of its search."""
        source = self.variant.rates_of or f"{self.experiment.name}/{self.method}"
        seeds = self.variant.searched_seeds
        return {self._trial(source, rate, seed): rate for rate, seed in product(rates, seeds)}

    @property
    def answers(self) -> bool:
        """True if its model is to answer the experiment's questions."""
        wanted = self.experiment.answers
        return wanted is not None and self.trial is None and self.seed == wanted.seed

    @property
    def model_and_task(self) -> str:
        """Path of its model and task below the experiment's folder."""
        return f"{self.model.replace('/', '-')}/{self.task.removeprefix('glue/')}"

    def _trial(self, experiment_and_method: str, rate: float, seed: int) -> str:
        """Name of a trial. The first seed of a search is not in it."""
        experiment, method = experiment_and_method.split("/")
        suffix = "" if seed == self.variant.searched_seeds[0] else f"-{seed}"
        return f"{experiment}/{SEARCH}/{self.model_and_task}/{method}-lr{rate:g}{suffix}"

    def settings(self, learning_rate: float | None) -> dict[str, Any]:
        """Settings of the run, as `sparsegrad train --config` reads them."""
        experiment, search = self.experiment, self.experiment.search
        parts = [experiment.settings, experiment.task_settings.get(self.task, {}), self.variant.settings]
        if self.trial is not None:
            parts += [search.settings, search.task_settings.get(self.task, {})]
        if learning_rate is not None:
            parts.append({"training": {"learning_rate": learning_rate}})
        return reduce(merged, [*parts, {"model": self.model, "task": self.task, "seeds": [self.seed]}], {})


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, where the second override the first. A list is replaced as a whole."""
    result = copy.deepcopy(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else copy.deepcopy(value)
    return result
