"""The schema of a result file. A file comes from outside, so it is checked before anything else reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

FILE_NAME = r"^[^.\s/\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*$"
"One part of a path: no separators, and no dot or space at the start."
LARGEST = 32_000_000
"Bytes of a result file at most; a real one has about 10,000."

FileName = Annotated[str, StringConstraints(pattern=FILE_NAME, max_length=200)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=1000)]
"One line."
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**18)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Phase(_Record):
    seconds: Seconds
    peak_memory_bytes: Count


class _Timing(_Record):
    seconds: Seconds


class _Entries(_Record):
    adapter: Count
    touched: Count = 0


class _Environment(_Record):
    time: Text
    device: Text
    threads: Count
    python: Text
    packages: dict[str, Text | None]
    commit: Text | None = None
    dirty: bool | None = None


class _TrainingSettings(_Record):
    batch_size: Count
    epochs: Number


class _Config(_Record):
    task: Text | None = None
    data: dict[str, Any]
    training: _TrainingSettings


class _About(_Record):
    title: str | None = None
    question: str | None = None
    baseline: str | None = None
    words: str | None = None


class _Ending(_Record):
    """What a finished run and a failed one have in common."""

    task: Text
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    experiment: FileName | None = None
    scale: FileName = "cpu"
    trial: bool = False
    about: _About = _About()


class FinishedRecord(_Ending):
    """The file of a run with a score. Fields that are not named here are kept."""

    method: Text
    model: Text
    metric: Text
    score: Number
    learning_rate: Number
    steps: Annotated[int, Field(gt=0)]
    rows: dict[str, Count]
    weights_bytes: Count
    trained_entries: _Entries
    training: _Phase
    calibration: _Timing | None = None
    evaluations: list[dict[str, Number | None]] = []
    config: _Config
    environment: _Environment
    variant: FileName | None = None
    resumed: bool = False


class FailedRecord(_Ending):
    """The file of a run of a study without a score."""

    status: Text
    error: str
    config: dict[str, Any]
    variant: FileName
    model: Text | None = None
    learning_rate: Number | None = None


class RejectedFileError(ValueError):
    """A file that cannot be used as a result. The message says why, without the file's name."""


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: the file is not there, or is not there any more.
        RejectedFileError: it is no JSON, or larger or nested deeper than any result.
    """
    if path.stat().st_size > LARGEST:
        raise RejectedFileError(f"expected at most {LARGEST:,} bytes, found {path.stat().st_size:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RejectedFileError(f"expected JSON ({error})") from error


def check_result(content: Any) -> dict[str, Any] | None:
    """A result that follows the schema; None for JSON that is no result of a run.

    Raises:
        RejectedFileError: it is meant as a result, and a field is missing or has a wrong value.
    """
    if not isinstance(content, dict):
        return None
    if {"task", "method", "seed", "score"} <= content.keys():
        schema: TypeAdapter[Any] = TypeAdapter(FinishedRecord)
    elif {"status", "error", "variant", "config"} <= content.keys():
        schema = TypeAdapter(FailedRecord)
    else:
        return None
    try:
        schema.validate_python(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
            + ("" if found["type"] == "missing" else f", found {str(found['input'])[:60]!r}")
            for found in error.errors()
        ]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RejectedFileError("; ".join(problems[:3]) + more) from error
    return content
