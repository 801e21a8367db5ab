"""Experiments: folders with an `experiment.yaml`, which stand for a grid of runs.

Settings come from `default.yaml`, its scale, the experiment, its scale and the method; the later one overrides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..tasks.parse_files import read_yaml
from .runs import FileName

SHIPPED = Path(str(files(__package__))) / "experiments"
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


class _Part(BaseModel):
    """Types of what is read before the settings of all places are put together; `Experiment` checks the rest."""

    model_config = ConfigDict(extra="allow")


class _PartOfSearch(_Part):
    seeds: list[int] = []
    most_rates: int | None = None
    task_settings: dict[str, Any] = {}


class _PartOfMethod(_Part):
    settings: dict[str, Any] = {}
    learning_rates: list[float] = []
    rates_of: str | None = None


class _PartOfScale(_Part):
    tasks: list[str] = []
    task_settings: dict[str, Any] = {}
    methods: dict[str, _PartOfMethod | None] = {}
    search: _PartOfSearch = _PartOfSearch()


class _Content(_PartOfScale):
    """Of `experiment.yaml` or `default.yaml`."""

    order: list[str] = []
    only_at: str | None = None
    scales: dict[str, _PartOfScale | None] = {}


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


_FROM_SEARCH = ("searched_rates", "searched_seeds", "most_rates")
_NOT_SET = {"name", "scale", "own", *_FROM_SEARCH}
"Fields that are no keys of the files."


def experiment_names(folder: Path = SHIPPED, scale: str | None = None) -> list[str]:
    """Names of the experiments in a folder, in the order of its `default.yaml`: experiments that others need first.

    Args:
        folder: holds `default.yaml` and the experiments' folders.
        scale: leave out experiments that do not have this scale.
    """
    default = _read(folder / "default.yaml")
    scales = _scales(default)
    found = {
        path.parent.name
        for path in folder.glob("*/experiment.yaml")
        if scale is None or (scale in scales and _read(path).get("only_at") in (None, scale))
    }
    order = [name for name in default.get("order", []) if name in found]
    return [*order, *sorted(found - {*order})]


def check_scale(scale: str, folder: Path) -> None:
    """Raise `ValueError` if a folder's `default.yaml` does not define a scale."""
    scales = _scales(_read(folder / "default.yaml"))
    if scale not in scales:
        raise ValueError(f"no scale {scale!r}; expected one of {', '.join(scales)}")


def _scales(default: dict[str, Any]) -> dict[str, Any]:
    """Settings of each scale, by name."""
    scales: dict[str, Any] = default.get("scales", {"cpu": {}, "paper": {}})
    return scales


def load_experiment(name: str, scale: str | None = "cpu", folder: Path = SHIPPED) -> Experiment:
    """Load an experiment at a scale.

    Args:
        name: name of its folder.
        scale: "cpu", or another that `default.yaml` defines; None: the only scale that the experiment has, or "cpu".
        folder: holds `default.yaml` and the experiments' folders.

    Raises:
        ValueError: there is no such experiment or scale; a key is unknown, missing or has a wrong value; methods have
            different numbers of trials.
    """
    if name not in experiment_names(folder):
        raise ValueError(f"no experiment {name!r}; expected one of {', '.join(experiment_names(folder))}")
    where, default, own = f"experiment {name}", _read(folder / "default.yaml"), _read(folder / name / "experiment.yaml")
    scale = scale or own.get("only_at") or "cpu"
    check_scale(scale, folder)
    if own.get("only_at") not in (None, scale):
        raise ValueError(f"{where} is for scale {own['only_at']}: its sizes are for that model")
    _check_names(default, own, where)
    settings = _combined(default, own, scale)
    _refuse_not_set(settings, ("name", "scale", "own"), where)
    methods = settings.get("methods", {})
    for key, value in methods.items():
        _refuse_not_set(value or {}, _FROM_SEARCH, where, f"methods.{key}.")
    search = settings.get("search", {})
    settings["methods"] = {
        key: _method(value or {}, key, where, folder / name, scale, search) for key, value in methods.items()
    }
    try:
        experiment = Experiment.model_validate({**settings, "name": name, "scale": scale, "own": folder != SHIPPED})
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from error
    _check(experiment, where)
    return experiment


def _combined(default: dict[str, Any], own: dict[str, Any], scale: str) -> dict[str, Any]:
    """Settings of an experiment at a scale: of `default.yaml`, its scale, the experiment and its scale."""
    default = {key: value for key, value in default.items() if key != "order"}
    parts = [default, _scales(default).get(scale), own, own.get("scales", {}).get(scale)]
    settings = reduce(merged, [part or {} for part in parts])
    settings.pop("scales", None)
    return settings


def _check_names(default: dict[str, Any], own: dict[str, Any], where: str) -> None:
    """Raise `ValueError` if an experiment has settings for a scale or a task that do not exist."""
    scales, own_scales = _scales(default), own.get("scales", {})
    if unknown := own_scales.keys() - scales:
        raise ValueError(f"{where}: scales: expected some of {', '.join(scales)}; found {', '.join(sorted(unknown))}")
    parts = [own, *(part or {} for part in own_scales.values())]
    others = [] if "tasks" in own else [default, *(part or {} for part in scales.values())]
    tasks = list(dict.fromkeys(task for part in (*parts, *others) for task in part.get("tasks", ())))
    for part in parts:
        search = part.get("search", {})
        for prefix, settings in (("", part.get("task_settings", {})), ("search.", search.get("task_settings", {}))):
            if unknown := settings.keys() - tasks:
                raise ValueError(
                    f"{where}: {prefix}task_settings: expected tasks of the experiment, some of {', '.join(tasks)}; "
                    f"found {', '.join(sorted(unknown))}"
                )


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, where the second override the first. A list is replaced as a whole."""
    result = copy.deepcopy(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else copy.deepcopy(value)
    return result


def _problem(error: Any) -> str:
    """A sentence about one of pydantic's findings."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {error['msg'].removeprefix('Value error, ')}, found {str(error['input'])[:60]!r}"
    models: dict[str, type[_Spec]] = {"methods": Variant, "search": Search, "answers": Answers}
    keys = (models.get(place[0], Experiment) if len(place) > 1 else Experiment).model_fields.keys() - _NOT_SET
    return f"unknown key {'.'.join(place)}; expected one of {', '.join(sorted(keys))}"


def _refuse_not_set(settings: dict[str, Any], names: Iterable[str], where: str, prefix: str = "") -> None:
    """Raise `ValueError` if a file sets a field that the library fills in."""
    if found := [name for name in names if name in settings]:
        raise ValueError(f"{where}: {prefix}{found[0]} is set by the library; remove it from the file")


def _check(experiment: Experiment, where: str) -> None:
    tasks, methods = ", ".join(experiment.tasks), ", ".join(experiment.methods)
    if not tasks or not methods:
        raise ValueError(f"{where}: expected tasks and methods, found {tasks or 'no tasks'} and "
                         f"{methods or 'no methods'}")  # fmt: skip
    trials = {name: len(method.learning_rates) for name, method in experiment.methods.items() if not method.rates_of}
    if len(set(trials.values())) > 1:
        raise ValueError(f"{where}: expected the same number of learning rates to try for each method, found {trials}")
    if experiment.baseline not in experiment.methods:
        raise ValueError(f"{where}: expected a baseline among {methods}; found {experiment.baseline!r}")
    for name, method in experiment.methods.items():
        searched = set(method.searched_seeds) if method.searched_rates else set()
        if both := searched & set(experiment.seeds_by_method[name]):
            raise ValueError(
                f"{where}: expected other seeds for the search than for the runs that are scored, found "
                f"{', '.join(map(str, sorted(both)))} in both for {name}"
            )
    for model in experiment.models:
        if model.strip("/").rpartition("/")[2] in ("", ".", "..") or "\\" in model:
            raise ValueError(f"{where}: expected models with a name, found {model!r}; name the model's own folder")


def _method(
    given: dict[str, Any], name: str, where: str, folder: Path, scale: str, search: dict[str, Any]
) -> dict[str, Any]:
    """A method's keys, with the path of its PEFT config and the rates of its search."""
    config = folder / str(given.get("settings", {}).get("method", ""))
    if config.suffix == ".json":
        given = merged(given, {"settings": {"method": str(config)}})
    source = given.get("rates_of")
    rates = given.get("learning_rates", ())
    if source:
        rates, search = _rates_of(source, scale, folder.parent, where)
    seeds = search.get("seeds", Search().seeds)
    return {"words": name, **given, "searched_rates": rates, "searched_seeds": seeds,
            "most_rates": search.get("most_rates")}  # fmt: skip


def _rates_of(source: str, scale: str, folder: Path, where: str) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Learning rates that a method of another experiment tries first, and that experiment's `search`.

    Raises:
        ValueError: there is no such experiment or method, or it has no search of its own.
    """
    experiment, _, name = source.partition("/")
    rates: Any = None
    search: dict[str, Any] = {}
    if experiment in experiment_names(folder, scale):
        own, default = _read(folder / experiment / "experiment.yaml"), _read(folder / "default.yaml")
        other = _combined(default, own, scale)
        rates = (other.get("methods", {}).get(name) or {}).get("learning_rates")
        search = other.get("search", {})
    if not rates:
        raise ValueError(
            f"{where}: rates_of: expected EXPERIMENT/METHOD, a method that has learning_rates at scale {scale}; "
            f"found {source}"
        )
    return tuple(float(rate) for rate in rates), search  # YAML reads 1e-3 as a string


@cache  # a study reads each file hundreds of times
def _parsed(path: Path, modified_ns: int) -> dict[str, Any]:
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys with values, as in `title: ...`; found {type(content).__name__}")
    search = content.get("search")
    if isinstance(search, dict) and "seed" in search:  # of earlier versions
        search["seeds"] = [search.pop("seed")]
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(map(_problem, error.errors()))}") from error
    return content


def _read(path: Path) -> dict[str, Any]:
    """Content of a YAML file; empty if it does not exist."""
    if not path.is_file():
        return {}
    # By its absolute path: the same relative one is another file after a change of the working directory.
    return copy.deepcopy(_parsed(path.absolute(), path.stat().st_mtime_ns))
