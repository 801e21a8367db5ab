"""What a report says: sentences and tables, computed once for the page, Markdown and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .answer import Answer, answer
from .overview import overview, parameters
from .sections import Report, Section
from .table import Table
from .tables import every_run, tables_of
from .verdict import verdict


@dataclass(frozen=True)
class Chapter:
    """A section with its sentences and its tables."""

    section: Section
    verdict: list[str]
    tables: dict[str, Table]


@dataclass(frozen=True)
class Contents:
    """All chapters, and what concerns the report as a whole."""

    answer: Answer | None
    chapters: list[Chapter]
    overview: Table | None
    "None unless the report has several shipped experiments"
    parameters: Table | None
    "None unless the report has an experiment"
    every_run: Table


@lru_cache(maxsize=1)
def contents_of(report: Report) -> Contents:
    """The contents of a report."""
    return Contents(
        answer(report.sections),
        [Chapter(section, verdict(section), tables_of(section)) for section in report.sections],
        overview(report.sections),
        parameters() if any(section.experiment for section in report.sections) else None,
        every_run(run for section in report.sections for run in section.runs),
    )
