"""Questions in the form of MT-Bench: JSON lines with several turns each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks.read import read_objects

REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
"""Categories that FastChat grades with a reference answer (fastchat/llm_judge/common.py, NEED_REF_CATS)."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in its file.
        category: such as "math".
        turns: the user's messages.
        reference: reference answers, as many as turns, or none.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def asked(self) -> dict[str, Any]:
        """What decides an answer. Answer files keep it, so that a changed question is noticed."""
        return {"category": self.category, "turns": list(self.turns)}


def read_questions(path: Path) -> list[Question]:
    """Read a question file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no questions, or a line is no question; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected questions in the form of MT-Bench")
    found: dict[int | str, Question] = {}
    for line, item in read_objects(path):
        question = _question(item, f"{path}, line {line}")
        if question.id in found:
            raise ValueError(f"{path}, line {line}: the question_id {question.id!r} is there twice")
        found[question.id] = question
    if not found:
        raise ValueError(f"{path}: expected questions, found none")
    return list(found.values())


def _question(item: dict[str, Any], where: str) -> Question:
    name, category, turns = item.get("question_id"), item.get("category", "general"), item.get("turns")
    check_id(name, where)
    if not isinstance(category, str):
        raise ValueError(f"{where}: expected a text as category, found {category!r}")
    if not are_texts(turns) or not turns:
        raise ValueError(f"{where}: expected a list of texts as turns, found {str(turns)[:60]!r}")
    reference = item.get("reference") or []
    if not are_texts(reference):
        raise ValueError(f"{where}: expected a list of texts as reference, found {str(reference)[:60]!r}")
    return Question(item["question_id"], category, tuple(turns), tuple(reference))


def check_id(name: Any, where: str) -> None:
    """Raise ValueError unless `name` can be a question's id; `where` is its place in a file."""
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"{where}: expected a number or a text as question_id, found {name!r:.60}")


def are_texts(value: Any) -> bool:
    """True for a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
