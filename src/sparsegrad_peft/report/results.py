"""Reads the result files of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.metrics import higher_is_better

_NEEDED = ("task", "method", "seed", "metric", "score", "config", "environment")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    path: Path
    "of its result file"
    result: dict[str, Any]

    @property
    def task(self) -> str:
        """Such as "rte"."""
        return str(self.result["task"]).removeprefix("glue/")

    @property
    def method(self) -> str:
        """The method, or what the experiment calls it."""
        return str(self.result.get("variant") or self.result["method"])

    @property
    def metric(self) -> str:
        """The one that the score is of."""
        return str(self.result["metric"])

    @property
    def higher_is_better(self) -> bool:
        """Of the score; not for a loss."""
        return higher_is_better(self.metric)

    @property
    def unit(self) -> str:
        """Scores of one unit can be compared and averaged: points, hundredths of a metric; or a loss as it is."""
        return "points" if self.higher_is_better else self.metric

    @property
    def score(self) -> float:
        """Of the main metric, in its unit."""
        return float(self.result["score"]) * (100 if self.higher_is_better else 1)

    def shown(self, score: float, digits: int = 1, sign: str = "") -> str:
        """A number in this run's unit as words; a loss has two digits more."""
        return f"{score:{sign}.{digits if self.higher_is_better else digits + 2}f}"

    @property
    def seconds(self) -> float:
        """Of training, calibration aside."""
        return float(self.result["training"]["seconds"])

    @property
    def calibration_seconds(self) -> float | None:
        """None for a method without one."""
        calibration = self.result.get("calibration")
        return None if calibration is None else float(calibration["seconds"])

    @property
    def megabytes(self) -> float:
        """The most that training took, in 1e6 bytes."""
        return float(self.result["training"]["peak_memory_bytes"]) / 1e6

    @property
    def entries(self) -> int:
        """Trained entries of the adapter, or of the layers that would have one."""
        return int(self.result["trained_entries"]["adapter"])


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs below some folders: `result.json` of run folders, and result files of an experiment.

    Raises:
        FileNotFoundError: a path is not there, or there is no result below them.
        ValueError: a result.json is broken.
    """
    paths, files = list(paths), []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        files += [path] if path.is_file() else sorted(path.rglob("*.json"))
    runs: list[Run] = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if file.name == "result.json":
                raise ValueError(f"{file}: expected JSON ({error})") from error
            continue
        if isinstance(found, dict) and all(name in found for name in _NEEDED):
            runs.append(Run(file, found))
    if not runs:
        raise FileNotFoundError(
            f"no finished runs below {', '.join(map(str, paths))}: expected result.json files, as sparsegrad train "
            "writes them"
        )
    return runs
