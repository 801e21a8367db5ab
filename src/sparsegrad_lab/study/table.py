"""A table of a report as text, for Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Run

_NUMBER = re.compile(r"[-+]?\d(?!.*, )[\d.,]*(e[-+]?\d+)?(?![\w:])")
_NO_NUMBER = ("", "none", "resumed", "not run", "not all run")


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
    def number_columns(self) -> set[int]:
        """Columns of numbers, which are aligned right; some of their cells may say that there is none."""
        found = set()
        for place in range(1, len(self.header)):
            cells = [row[place] for row in self.rows if row[place] not in _NO_NUMBER]
            if cells and sum(bool(_NUMBER.match(cell)) for cell in cells) * 2 > len(cells):
                found.add(place)
        return found

    @property
    def prose_columns(self) -> set[int]:
        """Columns with long texts, which get more room."""
        return {place for row in self.rows for place, cell in enumerate(row) if len(cell) > 50}

    def markdown(self, note: str | None = None) -> str:
        """A pipe table and the note, or another text in its place."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{body}\n\n{self.note if note is None else note}\n"

    def csv(self) -> str:
        """Comma-separated, with a header."""
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()
