"""Answer files in FastChat's form: {"question_id", "model_id", "choices": [{"index": 0, "turns": [TEXT, ...]}]}.

Those of `sparsegrad generate` also hold the question, as "question".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks.read import read_objects
from .questions import Question, are_texts, check_id


def read_answers(path: Path, questions: Sequence[Question]) -> tuple[str, dict[int | str, list[str]]]:
    """Read an answer file: the model's name, and the turns of its first choice by question.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no answer or answers another question, the file has answers of several models or two to
            a question, or it lacks an answer to a turn of a question.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected answers, as sparsegrad generate writes them")
    by_id = {question.id: question for question in questions}
    found: dict[int | str, list[str]] = {}
    names = set()
    for line, row in read_objects(path):
        turns, question = turns_of(row, f"{path}, line {line}"), row["question_id"]
        check_question(row, by_id, f"{path}, line {line}")
        if question in found:
            raise ValueError(f"{path}, line {line}: a second answer to question {question}")
        found[question] = turns
        names.add(str(row["model_id"]))
    if len(names) != 1:
        raise ValueError(f"{path}: expected answers of one model, found {', '.join(sorted(names)) or 'none'}")
    missing = [q.id for q in questions if len(found.get(q.id, ())) < len(q.turns)]
    if missing:
        raise ValueError(
            f"{path}: expected an answer to each turn, found none for {len(missing)} questions, such as {missing[0]}; "
            "finish it with sparsegrad generate"
        )
    return names.pop(), found


def turns_of(row: Mapping[str, Any], where: str) -> list[str]:
    """Return the turns of an answer's first choice.

    Args:
        row: a line of an answer file.
        where: the line's place, for the message.

    Raises:
        ValueError: the row is no answer.
    """
    if not {"question_id", "model_id", "choices"} <= row.keys():
        raise ValueError(f"{where}: expected an answer of FastChat's form, found the keys {', '.join(row)}")
    check_id(row["question_id"], where)
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        turns = None
    if not are_texts(turns):
        raise ValueError(f"{where}: expected choices with a list of texts as turns, found {str(row['choices'])[:60]!r}")
    return list(turns)


def check_question(row: Mapping[str, Any], questions: Mapping[int | str, Question], where: str) -> None:
    """Refuse an answer to a question that has been changed since.

    Args:
        row: a line of an answer file. Without "question", as in FastChat's files, it is not checked.
        questions: by id.
        where: the line's place, for the message.

    Raises:
        ValueError: the question of this id has another category or other turns.
    """
    question = questions.get(row["question_id"])
    if question is not None and row.get("question", question.asked) != question.asked:
        raise ValueError(
            f"{where}: the answer is to another question {question.id}: {row['question']!r:.400}; the file of "
            f"questions has {question.asked!r:.400}. Use the questions that were answered, or write to another file"
        )
