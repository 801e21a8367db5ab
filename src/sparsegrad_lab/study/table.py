"""A table of a report as text, for Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Run


class Linked(str):
    """Text of a cell, and the runs behind it, which the page links to."""

    runs: tuple[Run, ...] = ()

    def __new__(cls, text: str, runs: Sequence[Run]) -> Linked:
        """The text with its runs."""
        linked = super().__new__(cls, text)
        linked.runs = tuple(runs)
        return linked


@dataclass(frozen=True)
class Table:
    """Header and rows; a note below it explains how to read it."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    @property
    def prose_columns(self) -> set[int]:
        """Columns with long texts, which are set left and wrapped."""
        return {place for row in self.rows for place, cell in enumerate(row) if len(cell) > 50}

    def markdown(self) -> str:
        """A pipe table and the note."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{body}\n\n{self.note}\n"

    def csv(self) -> str:
        """Comma-separated, with a header."""
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()
