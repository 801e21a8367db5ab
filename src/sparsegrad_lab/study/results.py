"""Finds and reads the result files of runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.task import higher_is_better
from .record import RejectedFileError, check_result, read_json

STUDY_MARKS = (".study", "claims.journal")
"A folder that holds one of these files holds the run folders of a study; the second name is an earlier version's."
SEARCH_MARKS = ("search.json", "trials.journal")


@dataclass(frozen=True)
class ResultFile:
    """What the files of finished and of failed runs have in common."""

    path: Path
    result: dict[str, Any]
    "content of the file, which follows the schema in `record.py`"

    @property
    def experiment(self) -> str:
        """Name of the experiment; empty for a run of its own."""
        return str(self.result.get("experiment") or "")

    @property
    def scale(self) -> str:
        """Scale of the experiment."""
        return str(self.result.get("scale"))

    @property
    def trial(self) -> bool:
        """Whether it belongs to the search for a learning rate."""
        return bool(self.result.get("trial"))

    @property
    def model(self) -> str:
        """Hub name or folder of the pretrained model."""
        return str(self.result.get("model") or "")

    @property
    def task(self) -> str:
        """Short name of the task, such as "rte"."""
        return str(self.result["task"]).removeprefix("glue/")

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.result["seed"])

    @property
    def learning_rate(self) -> float:
        """Learning rate of the adapter; nan if the file has none."""
        rate = self.result.get("learning_rate")
        return math.nan if rate is None else float(rate)


@dataclass(frozen=True)
class Run(ResultFile):
    """A finished run."""

    label: str | None = None
    "name in place of the method's, where several runs have the same method, task and seed"
    data_label: str = ""
    "added to the task's name, where tasks of one name have different rows"

    @property
    def task(self) -> str:
        """Short name of the task, such as "rte", and its data label."""
        return super().task + self.data_label

    @property
    def method(self) -> str:
        """Name in the tables: the label, the experiment's name for it, or the method."""
        return self.label or str(self.result.get("variant") or self.result["method"])

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two result files of the same run, as when two experiments share it."""
        result = self.result
        time, seconds = result["environment"]["time"], result["training"]["seconds"]
        return time, result["task"], result["seed"], result["score"], seconds

    @property
    def metric(self) -> str:
        """Name of the metric that `score` is of."""
        return str(self.result["metric"])

    @property
    def higher_is_better(self) -> bool:
        """False for a loss."""
        return higher_is_better(self.metric)

    @property
    def unit(self) -> str:
        """Scores of one unit can be averaged: "points" (100 x metric), or the name of a loss."""
        return "points" if self.higher_is_better else self.metric

    @property
    def score(self) -> float:
        """Score of the main metric, in `unit`."""
        return float(self.result["score"]) * (100 if self.higher_is_better else 1)

    def format(self, score: float, digits: int = 1, sign: str = "") -> str:
        """A score in this run's unit as text. A loss gets two more digits."""
        return f"{score:{sign}.{digits if self.higher_is_better else digits + 2}f}"

    @property
    def timed(self) -> bool:
        """Whether `seconds` covers all steps. A resumed run only has the time since it was resumed."""
        return not self.result.get("resumed")

    @property
    def seconds(self) -> float:
        """Training time in seconds, without calibration."""
        return float(self.result["training"]["seconds"])

    @property
    def calibration_seconds(self) -> float | None:
        """Calibration time in seconds; None for a method without calibration."""
        calibration = self.result.get("calibration")
        return None if calibration is None else float(calibration["seconds"])

    @property
    def megabytes(self) -> float:
        """Peak memory of training, in 1e6 bytes."""
        return float(self.result["training"]["peak_memory_bytes"]) / 1e6

    @property
    def trained_entries(self) -> int:
        """Trained entries of the adapter, or of the layers that an adapter would change."""
        return int(self.result["trained_entries"]["adapter"])


@dataclass(frozen=True)
class Failure(ResultFile):
    """A run of a study that ended without a score."""

    @property
    def method(self) -> str:
        """The experiment's name for the method."""
        return str(self.result["variant"])

    @property
    def status(self) -> str:
        """How it ended, such as "diverged"."""
        return str(self.result["status"])

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, seed {self.seed}: {self.status} ({self.result['error']})"


@dataclass(frozen=True)
class ResultFiles:
    """What there is below some paths."""

    runs: tuple[Run, ...]
    failures: tuple[Failure, ...]
    unfinished: tuple[Path, ...]
    "run folders without a result: interrupted, or still running"
    rejected: tuple[str, ...]
    "files that were left out, each with the reason"


def read_results(paths: Iterable[str | Path]) -> ResultFiles:
    """Read all results below some paths.

    The run folders of a study and the trials of a search are left out, unless the path is that study or search itself.
    A file that does not follow the schema is left out and named in `rejected`.

    Args:
        paths: run folders, folders that hold some, or result files.

    Raises:
        FileNotFoundError: a path does not exist, or there is no result below any of them.
    """
    roots = [Path(path) for path in paths]
    runs: list[Run] = []
    failures: list[Failure] = []
    unfinished: list[Path] = []
    rejected: list[str] = []
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"there is no {root}; expected a run folder, or a folder with result files")
        for file in [root] if root.is_file() else sorted(_result_files(root)):
            if not file.is_file():  # a run folder's, or removed since it was listed
                unfinished += [file.parent] if (file.parent / "config.yaml").is_file() else []
                continue
            try:
                record = _read_record(file, expected=file == root or file.name == "result.json")
            except (RejectedFileError, OSError) as error:
                rejected.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
                continue
            if isinstance(record, Run):
                runs.append(record)
            elif isinstance(record, Failure):
                failures.append(record)
    if not runs and not failures:
        notes = [*(f"  not finished: {folder}" for folder in unfinished), *(f"  left out: {why}" for why in rejected)]
        message = (
            f"no finished runs below {', '.join(map(str, roots))}; expected result.json files, as sparsegrad train "
            "writes them"
        )
        raise FileNotFoundError("\n".join([message, *notes]))
    return ResultFiles(tuple(runs), tuple(failures), tuple(unfinished), tuple(rejected))


def _read_record(file: Path, expected: bool) -> Run | Failure | None:
    """A result file's run or failure; None for JSON of another kind, unless a result is expected."""
    result = check_result(read_json(file))
    if result is None:
        if expected:
            raise RejectedFileError("expected the result of a run, as sparsegrad train writes it")
        return None
    return Run(file, result) if "score" in result else Failure(file, result)


def _result_files(root: Path) -> Iterator[Path]:
    """JSON files below a folder that may be results. Of a run folder that is `result.json` alone, also if it does not
    exist: its other files are not results, and they come and go while the run is going on.
    """
    for name, folders, files in os.walk(root):
        folder = Path(name)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        if "config.yaml" in files:
            folders.clear()
            yield folder / "result.json"
            continue
        if folder != root and any(mark in files for mark in STUDY_MARKS):
            folders.clear()
            continue
        if folder != root and any(mark in files for mark in SEARCH_MARKS):
            folders[:] = [inner for inner in folders if not inner.startswith("trial-")]
        yield from (folder / file for file in files if file.endswith(".json") and not file.startswith("."))
