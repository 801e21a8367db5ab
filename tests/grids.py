"""For tests of grids of runs: a record of what was run, and reading result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsegrad_lab.study.grid import Places
from sparsegrad_lab.study.progress import GridProgress
from sparsegrad_lab.study.stored_results import StoredResults


class Lines(GridProgress):
    """What was run."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []
        self.rates: dict[str, float | None] = {}

    def start(self, cell: Any, learning_rate: float | None) -> None:
        self.begun.append(cell.name)
        self.rates[cell.name] = learning_rate


def result_file(places: Places, name: str) -> Path:
    return StoredResults(places.results).path(name)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
