"""The progress bar of all commands. It loads neither PyTorch nor transformers."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def make_progress_bar(console: Console, *, disable: bool = False) -> Progress:
    """A progress bar with the columns that all commands use: description, bar, count, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
