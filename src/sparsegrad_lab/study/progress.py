"""What a study shows while it runs: a line for each run, a bar for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..run.console import make_progress_bar
from .experiment import Cell
from .grid import Reporter


class GridProgress(Reporter):
    """For a terminal; elsewhere, such as in a log, the lines alone."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = make_progress_bar(console, disable=not console.is_terminal)
        self.task = self.bar.add_task("waiting", total=None)
        self.begun = 0.0

    def __enter__(self) -> GridProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, cell: Cell, learning_rate: float | None) -> None:
        """Name it beside the bar."""
        self.begun = time.monotonic()
        rate = "" if learning_rate is None else f", learning rate {learning_rate:g}"
        self.bar.update(self.task, description=f"{cell.name}{rate}")

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        """Its line."""
        took = time.monotonic() - self.begun
        if result["status"] != "finished":
            words = f"{result['status']}: {result['error']}"
        elif "same_as" in result:
            words = f"{result['metric'].replace('_', ' ')} {result['score']:.4f}, as {result['same_as']}"
        else:
            words = f"{result['metric'].replace('_', ' ')} {result['score']:.4f}, {took:.0f} s"
        self.bar.console.print(f"{cell.name}: {words}", markup=False)
        self.bar.update(self.task, description="waiting")

    def waiting(self, cells: Sequence[Cell]) -> None:
        """Once, for what may take long."""
        first = f"{cells[0].name}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}"
        self.bar.console.print(
            f"waiting for others to finish {first}; one that has been silent for ten minutes is taken over",
            markup=False,
        )

    def progress(self, finished: int, total: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=finished, total=total)
