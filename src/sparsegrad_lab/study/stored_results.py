"""The results folder of a study: which runs it has, what they are of, and which learning rate a search found."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

from ..methods.registry import METHODS
from ..methods.settings import resolved
from ..run.parsing import arguments_from
from ..run.settings import WITHOUT_EFFECT, RunArguments, flat
from ..run.whole_files import write_whole
from ..tasks import parse_files
from ..tasks.task import higher_is_better
from .experiment import Cell
from .runs import RejectedFileError, read_json


class StoredResults:
    """A folder with a JSON file for each run.

    Args:
        folder: of the files; a run's name is its path below it, without the suffix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """File of a run."""
        return self.folder / f"{name}.json"

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """Result of a run.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            result = read_json(self.path(name))
            if not isinstance(result, dict) or "status" not in result:
                raise RejectedFileError("expected a result with a status")
        except RejectedFileError as error:
            raise self._damaged(name, error) from error
        return result

    def _damaged(self, name: str, why: object) -> ValueError:
        return ValueError(
            f"{self.path(name)}: {why}; remove it, and reproduce writes it again, from the run's folder if it is "
            "there, or else by another run"
        )

    def write(self, name: str, result: dict[str, Any]) -> None:
        """Store the result of a run."""
        write_whole(self.path(name), json.dumps(result, indent=1) + "\n")

    def remove(self, name: str) -> None:
        """Remove the result of a run. Another process may have done it already."""
        self.path(name).unlink(missing_ok=True)

    def learning_rate(self, cell: Cell) -> float | None:
        """Learning rate of a run: the one that it tries, or the best of its search.

        None if the run has no search, or the search is not finished, see `search_finished`.
        """
        if cell.trial is not None or not cell.variant.searched_rates or not self.search_finished(cell):
            return cell.trial
        return self._best(self.search(cell))

    def search(self, cell: Cell) -> dict[str, float]:
        """Name -> learning rate of the trials in the search of a run, or of a trial.

        These are the given learning rates, and those that the results ask for: while the best one is the lowest or the
        highest, the next one in the same ratio, up to `Search.most_rates`.
        """
        rates = sorted(cell.variant.searched_rates)
        while 1 < len(rates) < (cell.variant.most_rates or 0) and self._all_there(cell.trials(rates)):
            best = self._best(cell.trials(rates))
            if best == rates[0]:
                rates.insert(0, _next(rates[1], rates[0]))
            elif best == rates[-1]:
                rates.append(_next(rates[-2], rates[-1]))
            else:
                break
        return cell.trials(rates)

    def _best(self, trials: dict[str, float]) -> float:
        """The learning rate with the best score on the rows that select, on average over the search's seeds.

        Of equal scores, as where nothing was learnt, the lowest training loss wins. A rate with a failed trial, or a
        score that is not finite, loses.
        If all trials failed, the lowest rate wins.
        """
        found: dict[float, list[tuple[float, float]]] = {}
        for name, rate in trials.items():
            trial = self.read(name)
            score, loss = trial.get("selection_score", trial.get("score")), trial.get("training_loss_last_sixth")
            if trial["status"] != "finished" or not _is_finite(score):
                found.setdefault(rate, []).append((-math.inf, -math.inf))
                continue
            if not isinstance(trial.get("metric"), str):
                raise self._damaged(name, "expected a finished result with its metric")
            better = score if higher_is_better(trial["metric"]) else -score
            lower_loss = -loss if _is_finite(loss) else -math.inf
            found.setdefault(rate, []).append((better, lower_loss))
        quality = {rate: tuple(map(fmean, zip(*seeds, strict=True))) for rate, seeds in found.items()}
        return max(sorted(quality), key=quality.__getitem__)

    def search_finished(self, cell: Cell) -> bool:
        """Whether all runs of its search have results; True without a search, and for a trial."""
        return cell.trial is not None or self._all_there(self.search(cell))

    def _all_there(self, names: Iterable[str]) -> bool:
        return all(name in self for name in names)

    def outdated(self, cells: Iterable[Cell]) -> list[tuple[Cell, str]]:
        """Results with other settings than their runs have now, or another learning rate than their search found.

        Returns:
            The runs, each with a description of what differs. A setting that an older result lacks counts as equal.
        """
        found = []
        for cell in cells:
            if cell.name not in self or not self.search_finished(cell):
                continue
            result = self.read(cell.name)
            arguments = _arguments(cell, self.learning_rate(cell))
            before = _decisive_settings(result.get("config"), result.get("adapter_config"))
            now = decisive_settings(arguments)
            differ = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
            if differ:
                words = "; ".join(f"{name} {before[name]}, now {now[name]}" for name in differ)
                found.append((cell, f"{self.path(cell.name)} ({words})"))
        return found

    def equal_run(self, arguments: RunArguments) -> dict[str, Any] | None:
        """Result of a finished run with the same settings, such as another experiment's; it says so in "same_as"."""
        wanted = _given(decisive_settings(arguments))
        for path in sorted(self.folder.rglob("*.json")):
            try:
                result = read_json(path)
            except (RejectedFileError, FileNotFoundError):
                continue
            if not isinstance(result, dict) or result.get("status") != "finished":
                continue
            if wanted == _given(_decisive_settings(result.get("config"), result.get("adapter_config"))):
                return {**result, "same_as": path.relative_to(self.folder).as_posix()}
        return None


def _arguments(cell: Cell, rate: float | None) -> RunArguments:
    """The settings of a cell's run. Cells that differ in seed and rate share the parsing, which takes longest."""
    settings = cell.settings(None if rate is None else 1.0)
    arguments = copy.deepcopy(_parsed(json.dumps({**settings, "seeds": [0]}, sort_keys=True)))
    arguments.seeds = [cell.seed]
    if rate is not None:
        arguments.training.learning_rate = rate
    return arguments


@cache
def _parsed(settings: str) -> RunArguments:
    return arguments_from(json.loads(settings))


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _next(before: float, last: float) -> float:
    """The next learning rate after two, in the same ratio, with two digits."""
    return float(f"{last * last / before:.2g}")


def adapter_config(method: str) -> dict[str, Any] | None:
    """Content of a PEFT config; None for a method by name."""
    if not method.endswith(".json"):
        return None
    content: dict[str, Any] = parse_files.read_json(Path(method))
    return content


def decisive_settings(arguments: RunArguments) -> dict[str, Any]:
    """Settings by dotted name that decide the result of a run: without its folder and what its method does not read."""
    return _decisive_settings(arguments.as_dict(), adapter_config(arguments.method))


def _decisive_settings(config: Any, peft_config: Any) -> dict[str, Any]:
    """The same of a result file, which may hold anything."""
    config = config if isinstance(config, dict) else {}
    with suppress(TypeError, KeyError):  # settings that do not exist stay as they are, and differ from any run's
        config = resolved(config)
    settings = {name: value for name, value in flat(config).items() if name not in WITHOUT_EFFECT}
    if peft_config is not None:  # the content of the file decides, not its path
        return {**settings, "method": peft_config}
    method = METHODS.get(str(settings.get("method")))
    if method is None:
        return settings
    unused = method.without_effect(settings)
    return {name: value for name, value in settings.items() if name not in unused and not method.ignores(name)}


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are neither null nor false: an older version may not have had the others."""
    return {name: value for name, value in settings.items() if value is not None and value is not False}
