"""A Markdown page with the answers of several models side by side, and their grades (the paper's Appendix E)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..run.markdown import as_cell
from .questions import Question
from .ratings import Mean


def answers_page(
    questions: Sequence[Question],
    models: Mapping[str, Mapping[int | str, Sequence[str]]],
    rows: Sequence[Mapping[str, Any]],
    table: Mapping[str, Mapping[str, Mean]],
    note: str,
) -> str:
    """Return the page.

    Args:
        questions: all questions.
        models: model -> question -> answers to its turns.
        rows: the judgements; those of single answers give a rating beside each answer.
        table: see `table_of`; empty if nothing was graded.
        note: what the numbers of the table mean, or why there are none.
    """
    ratings = {(row["question_id"], row["turn"], row.get("model")): row.get("score") for row in rows}
    names = list(dict.fromkeys(name for means in table.values() for name in means))
    lines = ["# Answers"]
    lines += ["", _row("", *table), f"| --- |{' --- |' * len(table)}"] if table else []
    lines += [_row(name, *(str(means.get(name, "")) for means in table.values())) for name in names]
    lines += ["", note]
    for question in questions:
        lines += ["", f"## {as_cell(str(question.id))}, {as_cell(question.category)}"]
        for turn, text in enumerate(question.turns, start=1):
            lines += ["", f"### Turn {turn}", "", *_verbatim(text)]
            for name, answers in models.items():
                rating = ratings.get((question.id, turn, name))
                shown = "" if rating is None else f", rated {rating:g}"
                lines += ["", f"**{as_cell(name)}**{shown}", "", *_verbatim(answers[question.id][turn - 1])]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(as_cell, cells)) + " |"


def _verbatim(text: str) -> Iterator[str]:
    """Yield a block that shows a text as it is, whatever marks it has."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    yield from (f"{fence}text", text, fence)
