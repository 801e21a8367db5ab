"""Experiments: folders with an `experiment.yaml`, which stand for a grid of runs.

Settings come from `default.yaml`, its scale, the experiment, its scale and the method; the later one overrides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .record import FileName

SHIPPED = Path(str(files(__package__))) / "experiments"
SEARCH = "search"
"Folder within an experiment's results for the search for learning rates."
BASELINE = "lora"
"Method that the others are compared with, where nothing else is set."


@dataclass(frozen=True)
class Variant:
    """A method of an experiment: settings of `sparsegrad train` under a name."""

    name: str
    words: str
    "description for the readers of the tables"
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]
    "a trial for each on every task; the runs use the best"
    rates_of: str | None
    "EXPERIMENT/METHOD whose search gives the learning rates, in place of a search of its own"
    searched_rates: tuple[float, ...]
    "learning rates of that search, or of its own"


@dataclass(frozen=True)
class Experiment:
    """A grid of models x tasks x variants x seeds, after a search of the same size for each variant."""

    name: str
    scale: str
    title: str
    question: str
    models: tuple[str, ...]
    tasks: dict[str, dict[str, Any]]
    "task -> its settings"
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    search_seed: int
    search_settings: dict[str, dict[str, Any]]
    "task -> settings of the search's runs that differ"
    settings: dict[str, Any]
    needs: str | None
    "command to run before"
    baseline: str
    scored: bool
    "False where runs are too short to learn: their scores mean nothing"
    paper: dict[str, Any] | None
    "published figures: source, columns, scores or costs by variant"

    def cells(self) -> Iterator[Cell]:
        """All runs: the search first, then seed by seed, so that complete tables exist early."""
        for model in self.models:
            for task in self.tasks:
                for variant in self.variants:
                    for rate in variant.learning_rates:
                        yield Cell(self, model, task, variant, self.search_seed, rate)
        for seed in self.seeds:
            for model in self.models:
                for task in self.tasks:
                    for variant in self.variants:
                        yield Cell(self, model, task, variant, seed, None)


@dataclass(frozen=True)
class Cell:
    """One run of an experiment."""

    experiment: Experiment
    model: str
    task: str
    variant: Variant
    seed: int
    trial: float | None
    "learning rate that a run of the search tries; None for a run whose score counts"

    @property
    def name(self) -> str:
        """Path of its result file below the results folder, without the suffix."""
        if self.trial is not None:
            return f"{self._search_of(f'{self.experiment.name}/{self.variant.name}')}{self.trial:g}"
        return f"{self.experiment.name}/{self._model_and_task}/{self.variant.name}-{self.seed}"

    @property
    def search(self) -> dict[str, float]:
        """Name -> learning rate of the runs that decide its learning rate. Empty for those runs themselves."""
        if self.trial is not None:
            return {}
        search = self._search_of(self.variant.rates_of or f"{self.experiment.name}/{self.variant.name}")
        return {f"{search}{rate:g}": rate for rate in self.variant.searched_rates}

    @property
    def _model_and_task(self) -> str:
        return f"{self.model.replace('/', '-')}/{self.task.removeprefix('glue/')}"

    def _search_of(self, experiment_and_variant: str) -> str:
        experiment, variant = experiment_and_variant.split("/")
        return f"{experiment}/{SEARCH}/{self._model_and_task}/{variant}-lr"

    def settings(self, learning_rate: float | None) -> dict[str, Any]:
        """Settings of the run, as `sparsegrad train --config` reads them."""
        settings: dict[str, Any] = {}
        for part in (
            self.experiment.settings,
            self.experiment.tasks[self.task],
            self.variant.settings,
            {} if self.trial is None else self.experiment.search_settings[self.task],
            {} if learning_rate is None else {"training": {"learning_rate": learning_rate}},
            {"model": self.model, "task": self.task, "seeds": [self.seed]},
        ):
            settings = merged(settings, part)
        return settings


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _SearchSpec(_Spec):
    seed: int = 100
    settings: dict[str, Any] = {}
    task_settings: dict[str, dict[str, Any]] = {}


class _VariantSpec(_Spec):
    words: str = ""
    settings: dict[str, Any] = {}
    learning_rates: tuple[float, ...] = ()
    rates_of: str | None = None


class _ExperimentSpec(_Spec):
    """Keys of `experiment.yaml` and `default.yaml`, without `order` and `scales`; see docs/study.md."""

    title: str
    question: str
    needs: str | None = None
    only_at: str | None = None
    models: tuple[str, ...] = ("minilm",)
    tasks: tuple[str, ...] = ()
    task_settings: dict[str, dict[str, Any]] = {}
    methods: dict[FileName, _VariantSpec | None] = {}
    seeds: tuple[int, ...] = (0, 1, 2)
    search: _SearchSpec = _SearchSpec()
    settings: dict[str, Any] = {}
    baseline: str = BASELINE
    scored: bool = True
    paper: dict[str, Any] | None = None


def experiment_names(folder: Path = SHIPPED, scale: str | None = None) -> list[str]:
    """Names of the experiments in a folder, in the order of its `default.yaml`: experiments that others need first.

    Args:
        folder: holds `default.yaml` and the experiments' folders.
        scale: leave out experiments that do not have this scale.
    """
    default = _read(folder / "default.yaml")
    scales = default.get("scales", {"cpu": {}, "paper": {}})
    found = {
        path.parent.name
        for path in folder.glob("*/experiment.yaml")
        if scale is None or (scale in scales and _read(path).get("only_at") in (None, scale))
    }
    order = [name for name in default.get("order", []) if name in found]
    return [*order, *sorted(found - {*order})]


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
    default.pop("order", None)
    scales = default.pop("scales", {"cpu": {}, "paper": {}})
    scale = scale or own.get("only_at") or "cpu"
    if scale not in scales:
        raise ValueError(f"no scale {scale!r}; expected one of {', '.join(scales)}")
    if own.get("only_at") not in (None, scale):
        raise ValueError(f"{where} is for scale {own['only_at']}: its sizes are for that model")
    own_scales = own.pop("scales", {})
    for part in (scales[scale], own, own_scales.get(scale, {})):
        default = merged(default, part or {})
    try:
        spec = _ExperimentSpec.model_validate(default)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from error
    variants = tuple(
        _variant(key, value or _VariantSpec(), where, folder / name, scale) for key, value in spec.methods.items()
    )
    _check(spec, variants, where)
    return Experiment(
        name=name, scale=scale, title=spec.title, question=spec.question, models=spec.models,
        tasks={task: spec.task_settings.get(task, {}) for task in spec.tasks}, variants=variants, seeds=spec.seeds,
        search_seed=spec.search.seed,
        search_settings={
            task: merged(spec.search.settings, spec.search.task_settings.get(task, {})) for task in spec.tasks
        },
        settings=spec.settings, needs=spec.needs, baseline=spec.baseline, scored=spec.scored, paper=spec.paper,
    )  # fmt: skip


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
        return f"{'.'.join(place)}: {error['msg']}, found {str(error['input'])[:60]!r}"
    specs: dict[str, type[_Spec]] = {"methods": _VariantSpec, "search": _SearchSpec}
    spec = specs.get(place[0], _ExperimentSpec) if len(place) > 1 else _ExperimentSpec
    return f"unknown key {'.'.join(place)}; expected one of {', '.join(spec.model_fields)}"


def _check(spec: _ExperimentSpec, variants: tuple[Variant, ...], where: str) -> None:
    names = [variant.name for variant in variants]
    if not spec.tasks or not names:
        raise ValueError(f"{where}: expected tasks and methods, found {', '.join(spec.tasks) or 'no tasks'} and "
                         f"{', '.join(names) or 'no methods'}")  # fmt: skip
    trials = {variant.name: len(variant.learning_rates) for variant in variants if variant.rates_of is None}
    if len(set(trials.values())) > 1:
        raise ValueError(f"{where}: expected the same number of learning rates to try for each method, found {trials}")
    if spec.baseline not in names:
        raise ValueError(f"{where}: expected a baseline among {', '.join(names)}; found {spec.baseline!r}")
    for model in spec.models:
        if model.strip("/").rpartition("/")[2] in ("", ".", "..") or "\\" in model:
            raise ValueError(f"{where}: expected models with a name, found {model!r}; name the model's own folder")


def _variant(name: str, spec: _VariantSpec, where: str, folder: Path, scale: str) -> Variant:
    settings = dict(spec.settings)
    config = folder / str(settings.get("method", ""))
    if config.suffix == ".json":  # a PEFT config in the experiment's folder
        settings["method"] = str(config)
    rates = spec.learning_rates
    searched = rates if spec.rates_of is None else _rates_of(spec.rates_of, scale, folder.parent, where)
    return Variant(name, spec.words or name, settings, rates, spec.rates_of, searched)


def _rates_of(source: str, scale: str, folder: Path, where: str) -> tuple[float, ...]:
    """Learning rates that a method of another experiment tries.

    Raises:
        ValueError: there is no such experiment or method, or it has no search of its own.
    """
    experiment, _, name = source.partition("/")
    rates = None
    if experiment in experiment_names(folder, scale):
        own = _read(folder / experiment / "experiment.yaml")
        methods = merged(own, own.get("scales", {}).get(scale, {})).get("methods", {})
        rates = (methods.get(name) or {}).get("learning_rates")
    if not rates:
        raise ValueError(
            f"{where}: rates_of: expected EXPERIMENT/METHOD, a method that has learning_rates at scale {scale}; "
            f"found {source}"
        )
    return tuple(float(rate) for rate in rates)


@cache  # a study reads each file hundreds of times
def _parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _read(path: Path) -> dict[str, Any]:
    """Content of a YAML file; empty if it does not exist."""
    content: dict[str, Any] = copy.deepcopy(_parsed(path)) if path.is_file() else {}
    return content or {}
