"""The answer that a report begins with: the first comparison that tells something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .sections import Section
from .statistics import FEWEST, Comparison, by_unit, compare_all
from .verdict import verdict


@dataclass(frozen=True)
class Answer:
    """A sentence, and the section whose plots show it."""

    sentence: str
    section: Section


def answer(sections: Sequence[Section]) -> Answer | None:
    """Return the comparison of a section's first method with its baseline.

    It is the first section with enough pairs of runs for a test; or else the one with the most pairs, or else the first
    section. None without sections.
    """
    found = [(section, comparison) for section in sections for comparison in _first_comparisons(section)]
    enough = [pair for pair in found if pair[1].pairs >= FEWEST]
    if not found:
        return Answer(verdict(sections[0])[0], sections[0]) if sections else None
    section, comparison = enough[0] if enough else max(found, key=lambda pair: pair[1].pairs)
    return Answer(str(comparison), section)


def _first_comparisons(section: Section) -> Iterator[Comparison]:
    if not section.scored:
        return
    others = [method for method in section.methods if method != section.baseline]
    for part in by_unit(section).values():
        compared = [comparison for comparison in compare_all(part.runs, others, section.baseline) if comparison.pairs]
        yield from compared[:1]
