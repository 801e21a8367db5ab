"""The content of a result file: a finished run, or a failed one.

A file comes from outside, so it is checked against these schemas before anything reads it. Fields that have no name
here are kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..tasks.task import DEVELOPMENT, higher_is_better

LARGEST = 32_000_000
"Most bytes of a result file; a real one has about 10,000."

FileName = Annotated[str, StringConstraints(pattern=r"^[^.\s/\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*$", max_length=200)]
"One part of a path: no separators, and no dot or space at the start."
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=1000)]
"Text without line breaks and control characters."
Number = Annotated[float, Field(allow_inf_nan=False)]
Perplexity = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**18)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Phase(_Record):
    """Time and memory of training or of calibration."""

    seconds: Seconds
    peak_memory_bytes: Count = 0


class TrainedEntries(_Record):
    """Entries of the adapter, or of the layers that an adapter would change."""

    adapter: Count
    touched: Count | None = None
    "entries that any step has changed"


class Rows(_Record):
    """Number of rows of each split."""

    __pydantic_extra__: dict[str, Count]
    train: Count

    @property
    def development(self) -> int:
        """Rows that select the best evaluation and are not scored."""
        return (self.__pydantic_extra__ or {}).get(DEVELOPMENT, 0)

    @property
    def scored(self) -> int:
        """Rows that give the score: of the first evaluation split that does not select."""
        return next((rows for name, rows in (self.__pydantic_extra__ or {}).items() if name != DEVELOPMENT), 0)

    def __str__(self) -> str:
        select = f"{self.development:,} to select, " if self.development else ""
        return f"{self.train:,} to train, {select}{self.scored:,} to score"


class MachineInfo(_Record):
    """Where and with what a run was done."""

    time: Line
    device: Line
    threads: Count
    processes: Count = 1
    python: Line
    packages: dict[str, Line | None]
    commit: Line | None = None
    dirty: bool | None = None
    rows_sha256: dict[str, Line] = {}
    "of each split"


class TrainingSettings(_Record):
    """Part of `RunArguments.training`."""

    batch_size: Count
    gradient_accumulation: Count = 1
    epochs: Number


class Settings(_Record):
    """Part of `RunArguments`."""

    task: Line | None = None
    data: dict[str, Any]
    training: TrainingSettings


class About(_Record):
    """What a report says about an experiment, where the experiment's own file is not at hand."""

    title: str = ""
    question: str = ""
    baseline: str = ""
    words: str = ""
    "description of the method"
    scored: bool = True
    own: bool = False
    "whether the experiment is not one of those that ship with the package"


class _Ending(_Record):
    """What finished and failed runs have in common."""

    path: Path = Field(exclude=True)
    "the result file; not in it"
    task: Line
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    experiment: FileName | None = None
    scale: FileName = "cpu"
    model: Line = ""
    learning_rate: Number = float("nan")
    "of the adapter"
    trial: bool = False
    "whether it belongs to the search for a learning rate"
    about: About = About()

    def as_json(self) -> str:
        """The content of the file."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=1, ensure_ascii=False)


class Perplexities(_Record):
    """Perplexity of the same texts before and after training."""

    before: Perplexity
    after: Perplexity


class Run(_Ending):
    """A finished run."""

    method: Line
    variant: FileName | None = None
    "the experiment's name for the method and its settings"
    metric: Line
    score: Number
    selection_score: Number | None = None
    "on the rows that choose the learning rate, where others are scored"
    steps: Annotated[int, Field(gt=0)]
    rows: Rows
    weights_bytes: Count
    trained_entries: TrainedEntries
    training: Phase
    calibration: Phase | None = None
    evaluations: list[dict[str, Number | None]] = []
    training_loss_last_sixth: Number | None = None
    "mean over the last sixth of the steps"
    score_before: Number | None = None
    "score of the model before training, of a run that also measures `unrelated_perplexity`"
    unrelated_perplexity: Perplexities | None = None
    "of texts that were not trained on"
    config: Settings
    environment: MachineInfo
    resumed: bool = False
    "a resumed run only has the time since it was resumed"
    label: str | None = Field(None, exclude=True)
    "name of the method in a report where several runs have the same method, task and seed; not in the file"
    data_label: str = Field("", exclude=True)
    "added to the task's name where tasks of one name have different rows; not in the file"

    @model_validator(mode="after")
    def _check_range(self) -> Run:
        """Refuse scores that their metric cannot have."""
        low, high = (-1.0, 1.0) if self.higher_is_better else (0.0, math.inf)
        rounding = 1e-6
        given = {"score": self.score, "selection_score": self.selection_score, "score_before": self.score_before}
        for name, score in given.items():
            if score is not None and not low - rounding <= score <= high + rounding:
                raise ValueError(f"{name}: expected {self.metric} from {low:g} to {high:g}, found {score:g}")
        return self

    @property
    def task_name(self) -> str:
        """Name of the task in the tables, such as "rte"."""
        return self.task.removeprefix("glue/") + self.data_label

    @property
    def method_name(self) -> str:
        """Name of the method in the tables."""
        return self.label or self.variant or self.method

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two files of the same run, as when two experiments share it."""
        return self.environment.time, self.task, self.seed, self.score, self.training.seconds

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for two results of which a table has room for one: of an experiment's run, or of the same run."""
        if self.experiment is None:
            return *self.identity, self.method, self.config.model_dump_json()
        rate = self.learning_rate if self.trial else None
        return self.experiment, self.scale, self.model, self.task, self.method_name, self.seed, self.trial, rate

    @property
    def gain(self) -> float | None:
        """By how much training improved the score, in its unit; None if the score before was not measured."""
        if self.score_before is None:
            return None
        sign = 1 if self.higher_is_better else -1
        return sign * (self.value - self.score_before * (100 if self.higher_is_better else 1))

    @property
    def higher_is_better(self) -> bool:
        """False for a loss."""
        return higher_is_better(self.metric)

    @property
    def unit(self) -> str:
        """Values of one unit can be averaged: "points" (100 x metric), or the name of a loss."""
        return "points" if self.higher_is_better else self.metric

    @property
    def value(self) -> float:
        """The score in its unit."""
        return self.score * (100 if self.higher_is_better else 1)

    @property
    def selection_value(self) -> float:
        """In the unit of `value`, the score on the rows that choose the learning rate."""
        score = self.score if self.selection_score is None else self.selection_score
        return score * (100 if self.higher_is_better else 1)

    def format(self, value: float, digits: int = 1, sign: str = "") -> str:
        """A value of this run's unit as text. A loss gets three more digits."""
        return f"{value:{sign}.{digits if self.higher_is_better else digits + 3}f}"

    @property
    def megabytes(self) -> float:
        """Peak memory of calibration and training, in 1e6 bytes."""
        phases = [self.training] if self.calibration is None else [self.training, self.calibration]
        return max(phase.peak_memory_bytes for phase in phases) / 1e6

    @property
    def rows_per_step(self) -> int:
        """Training rows of a step, over all micro-batches and processes."""
        training = self.config.training
        return training.batch_size * training.gradient_accumulation * self.environment.processes


class Failure(_Ending):
    """A run of a study that ended without a score."""

    status: Line
    "how it ended, such as diverged"
    error: str
    variant: FileName
    config: dict[str, Any]

    @property
    def task_name(self) -> str:
        """Name of the task in the tables, such as "rte"."""
        return self.task.removeprefix("glue/")

    @property
    def method_name(self) -> str:
        """Name of the method in the tables."""
        return self.variant

    def __str__(self) -> str:
        return f"{self.task_name}, {self.method_name}, seed {self.seed}: {self.status} ({self.error})"


class RejectedFileError(ValueError):
    """A file that cannot be used as a result. The message gives the reason, without the file's name."""


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        RejectedFileError: it is no JSON, or larger or nested deeper than any result.
    """
    if path.stat().st_size > LARGEST:
        raise RejectedFileError(f"expected at most {LARGEST:,} bytes, found {path.stat().st_size:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RejectedFileError(f"expected JSON ({error})") from error


def parse_result(content: Any, path: Path) -> Run | Failure | None:
    """The run of a result file's content; None for JSON that is no result of a run.

    Raises:
        RejectedFileError: it is meant as a result, and a field is missing or has a wrong value.
    """
    if not isinstance(content, dict):
        return None
    content = {**content, "path": path}
    try:
        if {"task", "method", "seed", "score"} <= content.keys():
            return Run.model_validate({**content, "label": None, "data_label": ""})
        if {"status", "error", "variant", "config"} <= content.keys():
            return Failure.model_validate(content)
        return None
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, [".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")]))
            for found in error.errors()
        ]
        more = f"; and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        raise RejectedFileError("; ".join(problems[:3]) + more) from error
