"""Prints what a study does: a line for each run, and on a terminal a bar over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..run.progress_bar import make_progress_bar
from .experiment import Cell


class GridProgress:
    """Is told what `reproduce` does.

    Args:
        console: where to print; default: nowhere.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(quiet=True)
        self.bar = make_progress_bar(console, disable=not console.is_terminal)
        self.task = self.bar.add_task("waiting", total=None)
        self.started = 0.0

    def __enter__(self) -> GridProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, cell: Cell, learning_rate: float | None) -> None:
        """A run starts."""
        self.started = time.monotonic()
        rate = "" if learning_rate is None else f", learning rate {learning_rate:g}"
        self.bar.update(self.task, description=f"{cell.name}{rate}")

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        """A run has ended."""
        seconds = time.monotonic() - self.started
        if result["status"] != "finished":
            outcome = f"{result['status']}: {result['error']}"
        else:
            how = f"as {result['same_as']}" if "same_as" in result else f"{seconds:.0f} s"
            outcome = f"{result['metric'].replace('_', ' ')} {result['score']:.4f}, {how}"
        self.say(f"{cell.name}: {outcome}")
        self.bar.update(self.task, description="waiting")

    def waiting(self, cells: Sequence[Cell]) -> None:
        """Other processes do all the runs that are left."""
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        self.say(f"waiting for other processes to finish {cells[0].name}{more}; a run is continued here if its process "
                 "ends, or if its machine is silent for ten minutes")  # fmt: skip

    def advance(self, finished: int, total: int) -> None:
        """So many runs have a result."""
        self.bar.update(self.task, completed=finished, total=total)

    def say(self, line: str) -> None:
        """Print a line."""
        self.bar.console.print(line, markup=False, emoji=False)
