"""Answer files in FastChat's form: {"question_id", "model_id", "choices": [{"index": 0, "turns": [TEXT, ...]}]}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..tasks.read import read_objects
from .questions import Question


def read_answers(path: Path, questions: Sequence[Question]) -> tuple[str, dict[int | str, list[str]]]:
    """Read an answer file: the model's name, and the turns of its first choice by question.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no answer, the file has answers of several models or two to a question, or it lacks an
            answer to a turn of a question.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected answers, as sparsegrad generate writes them")
    found: dict[int | str, list[str]] = {}
    names = set()
    for line, row in read_objects(path):
        try:
            turns, question, name = row["choices"][0]["turns"], row["question_id"], row["model_id"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}, line {line}: expected an answer of FastChat's form, found no {error}") from error
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}, line {line}: expected a list of texts as turns")
        if question in found:
            raise ValueError(f"{path}, line {line}: a second answer to question {question}")
        found[question] = turns
        names.add(str(name))
    if len(names) != 1:
        raise ValueError(f"{path}: expected answers of one model, found {', '.join(sorted(names)) or 'none'}")
    missing = [q.id for q in questions if len(found.get(q.id, ())) < len(q.turns)]
    if missing:
        raise ValueError(
            f"{path}: expected an answer to each turn, found none for {len(missing)} questions, such as {missing[0]}; "
            "finish it with sparsegrad generate"
        )
    return names.pop(), found
