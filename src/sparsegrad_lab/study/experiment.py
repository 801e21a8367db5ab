"""Experiment folders -> runs. Settings come from `default.yaml`, its scale, the experiment and the method, in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(str(files(__package__))) / "experiments"
SEARCH = "search"
"Folder of the search's results within an experiment's."
_NEUTRAL: dict[str, Any] = {
    "order": [], "seeds": [0, 1, 2], "baseline": "lora", "scored": True, "methods": {}, "needs": None, "only_at": None,
    "paper": None, "models": ["minilm"], "tasks": [], "task_settings": {}, "settings": {},
    "search": {"seed": 100, "settings": {}, "task_settings": {}}, "scales": {"cpu": {}, "paper": {}},
}  # fmt: skip
"What an experiment has where neither it nor the `default.yaml` beside it says otherwise."
_SAID = {
    "title", "question", "needs", "only_at", "models", "tasks", "task_settings", "methods", "seeds", "search",
    "settings", "baseline", "scored", "paper",
}  # fmt: skip
_SAID_OF_METHOD = {"words", "settings", "learning_rates", "rates_of"}


@dataclass(frozen=True)
class Method:
    """What is compared: settings of `sparsegrad train` under a name of its own."""

    name: str
    words: str
    "what it is, for a reader of the tables"
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]
    "one trial each on every task; the runs that count take the best"
    rates_of: str | None
    "experiment/method whose search gives the learning rates, in place of an own one"
    searched_rates: tuple[float, ...]
    "the learning rates of that search, or of its own"


@dataclass(frozen=True)
class Experiment:
    """A grid: models x tasks x methods x seeds, after a search of the same size for each method."""

    name: str
    scale: str
    title: str
    question: str
    models: tuple[str, ...]
    tasks: dict[str, dict[str, Any]]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    search_seed: int
    search_settings: dict[str, dict[str, Any]]
    "task -> what a trial has otherwise"
    settings: dict[str, Any]
    needs: str | None
    "what has to be done before"
    baseline: str
    "method that the others are compared with"
    scored: bool
    "whether the scores mean something; else times and memory alone do"
    paper: dict[str, Any] | None
    "what the paper has to say to the question: source, columns, scores of each method"

    def cells(self) -> Iterator[Cell]:
        """All runs: those of the search first, then seed by seed, so that there is a whole table early on."""
        for model in self.models:
            for task in self.tasks:
                for method in self.methods:
                    for rate in method.learning_rates:
                        yield Cell(self, model, task, method, self.search_seed, rate)
        for seed in self.seeds:
            for model in self.models:
                for task in self.tasks:
                    for method in self.methods:
                        yield Cell(self, model, task, method, seed, None)


@dataclass(frozen=True)
class Cell:
    """One run of an experiment."""

    experiment: Experiment
    model: str
    task: str
    method: Method
    seed: int
    trial: float | None
    "the learning rate that a run of the search tries; None for a run whose score counts"

    @property
    def name(self) -> str:
        """Path of its result, without the ending."""
        if self.trial is not None:
            return f"{self._searched(f'{self.experiment.name}/{self.method.name}')}{self.trial:g}"
        return f"{self.experiment.name}/{self._place}/{self.method.name}-{self.seed}"

    @property
    def search(self) -> tuple[str, ...]:
        """Names of the runs that give its learning rate; none for such a run itself, and where there is no search."""
        if self.trial is not None:
            return ()
        whose = self._searched(self.method.rates_of or f"{self.experiment.name}/{self.method.name}")
        return tuple(f"{whose}{rate:g}" for rate in self.method.searched_rates)

    @property
    def _place(self) -> str:
        return f"{self.model.replace('/', '-')}/{self.task.removeprefix('glue/')}"

    def _searched(self, whose: str) -> str:
        experiment, method = whose.split("/")
        return f"{experiment}/{SEARCH}/{self._place}/{method}-lr"

    def settings(self, learning_rate: float | None) -> dict[str, Any]:
        """For `sparsegrad train --config`."""
        found: dict[str, Any] = {}
        for part in (
            self.experiment.settings,
            self.experiment.tasks[self.task],
            self.method.settings,
            {} if self.trial is None else self.experiment.search_settings[self.task],
            {} if learning_rate is None else {"training": {"learning_rate": learning_rate}},
            {"model": self.model, "task": self.task, "seeds": [self.seed]},
        ):
            found = merged(found, part)
        return found


def experiment_names(folder: Path = SHIPPED, scale: str | None = None) -> list[str]:
    """Those in a folder, in the order that its `default.yaml` gives: the ones that others build on first.

    Args:
        folder: with `default.yaml` and the experiments' folders.
        scale: leave out those that are not for it.
    """
    found = {
        path.parent.name
        for path in folder.glob("*/experiment.yaml")
        if scale is None or _read(path).get("only_at") in (None, scale)
    }
    order = [name for name in _default(folder)["order"] if name in found]
    return [*order, *sorted(found - {*order})]


def load_experiment(name: str, scale: str = "cpu", folder: Path = SHIPPED) -> Experiment:
    """An experiment at a scale.

    Args:
        name: its folder's.
        scale: "cpu", or another that `default.yaml` has.
        folder: that holds `default.yaml` and the experiments' folders.

    Raises:
        ValueError: no such experiment or scale; words that mean nothing; methods that do not get the same number of
            trials.
    """
    if name not in experiment_names(folder):
        raise ValueError(f"no experiment {name!r}; there are {', '.join(experiment_names(folder))}")
    said, own = _default(folder), _read(folder / name / "experiment.yaml")
    del said["order"]
    scales = said.pop("scales")
    if scale not in scales:
        raise ValueError(f"no scale {scale!r}; there are {', '.join(scales)}")
    if own.get("only_at") not in (None, scale):
        raise ValueError(f"experiment {name} is for scale {own['only_at']}: its sizes are those of that model")
    own_scales = own.pop("scales", {})
    for part in (scales[scale], own, own_scales.get(scale, {})):
        said = merged(said, part)
    where = f"experiment {name}"
    _check_words(said, _SAID, where)
    methods = tuple(_method(key, value or {}, where, folder / name, scale) for key, value in said["methods"].items())
    trials = {method.name: len(method.learning_rates) for method in methods if method.rates_of is None}
    if len(set(trials.values())) > 1:
        raise ValueError(f"{where}: expected the same number of learning rates to try for each method, found {trials}")
    names = [method.name for method in methods]
    if not said["tasks"] or not names:
        raise ValueError(f"{where}: expected tasks and methods, found {', '.join(said['tasks']) or 'no tasks'} and "
                         f"{', '.join(names) or 'no methods'}")  # fmt: skip
    if said["baseline"] not in names:
        raise ValueError(f"{where}: expected a baseline among {', '.join(names)}; found {said['baseline']!r}")
    return Experiment(
        name=name, scale=scale, title=said["title"], question=said["question"], models=tuple(said["models"]),
        tasks={task: said["task_settings"].get(task, {}) for task in said["tasks"]}, methods=methods,
        seeds=tuple(said["seeds"]), search_seed=said["search"]["seed"],
        search_settings={
            task: merged(said["search"]["settings"], said["search"]["task_settings"].get(task, {}))
            for task in said["tasks"]
        },
        settings=said["settings"], needs=said["needs"], baseline=said["baseline"], scored=said["scored"],
        paper=said["paper"],
    )  # fmt: skip


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the second one's first; a list is taken whole."""
    found = copy.deepcopy(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else copy.deepcopy(value)
    return found


def _method(name: str, said: dict[str, Any], where: str, folder: Path, scale: str) -> Method:
    said = {"words": name, "settings": {}, "learning_rates": [], "rates_of": None, **said}
    _check_words(said, _SAID_OF_METHOD, f"{where}, method {name}")
    settings = dict(said["settings"])
    beside = folder / str(settings.get("method", ""))
    if beside.suffix == ".json":  # a config of PEFT, in the experiment's folder
        settings["method"] = str(beside)
    rates = tuple(float(rate) for rate in said["learning_rates"])  # YAML takes 1e-3 for a word
    searched = rates if said["rates_of"] is None else _rates(said["rates_of"], scale, folder.parent, where)
    return Method(name, said["words"], settings, rates, said["rates_of"], searched)


def _rates(whose: str, scale: str, folder: Path, where: str) -> tuple[float, ...]:
    """Learning rates that another experiment's method tries.

    Raises:
        ValueError: there is no such experiment or method, or it has no search of its own.
    """
    experiment, _, name = whose.partition("/")
    rates = None
    if experiment in experiment_names(folder, scale):
        own = _read(folder / experiment / "experiment.yaml")
        methods = merged(own, own.get("scales", {}).get(scale, {})).get("methods", {})
        rates = (methods.get(name) or {}).get("learning_rates")
    if not rates:
        raise ValueError(
            f"{where}: rates_of: expected EXPERIMENT/METHOD, a method that has learning_rates at scale {scale}; "
            f"found {whose}"
        )
    return tuple(float(rate) for rate in rates)


def _check_words(said: dict[str, Any], expected: set[str], where: str) -> None:
    if unknown := said.keys() - expected:
        raise ValueError(f"{where}: expected {', '.join(sorted(expected))}; found {', '.join(sorted(unknown))}")
    if missing := expected - said.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} is missing")


def _default(folder: Path) -> dict[str, Any]:
    """What the experiments of a folder have in common."""
    file = folder / "default.yaml"
    return merged(_NEUTRAL, _read(file) if file.is_file() else {})


@cache
def _parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = copy.deepcopy(_parsed(path))
    return found
