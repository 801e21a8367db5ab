"""Reads and checks experiments: folders with an `experiment.yaml`.

Settings come from `default.yaml`, its scale, the experiment, its scale and the method; the later one overrides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache, reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..tasks.parse_files import read_yaml
from .experiment import Answers, Experiment, Search, Variant, merged

SHIPPED = Path(str(files(__package__))) / "experiments"


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

    @model_validator(mode="after")
    def _one_source(self) -> _PartOfMethod:
        if self.rates_of and self.learning_rates:
            raise ValueError("learning_rates and rates_of exclude each other; give one")
        return self


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


def _problem(error: Any) -> str:
    """A sentence about one of pydantic's findings."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {error['msg'].removeprefix('Value error, ')}, found {str(error['input'])[:60]!r}"
    models: dict[str, type[BaseModel]] = {"methods": Variant, "search": Search, "answers": Answers}
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
        given = {**given, "learning_rates": ()}  # those that another file gives
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
