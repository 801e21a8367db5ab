"""Grade answers with a judge: FastChat's single-answer grading and pairwise comparison (Zheng et al., 2023).

Every request and every raw judgement is kept in a file of FastChat's form. A judgement without a rating is asked for
again; if there still is none, the rating is null.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .prompts import Prompt, prompt_name
from .questions import REFERENCE_CATEGORIES, Question, are_texts, check_id
from .rows_file import open_rows

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_TEMPERATURES = (0.0, 0.7, 0.7)
"""Of the first request and of its repetitions: at 0, a repetition would give the same judgement."""

_KEYS = {"question_id", "category", "turn", "judge"}
_KEYS_OF_ONE = {"model", "user_prompt", "score"}
_KEYS_OF_TWO = {"model_1", "model_2", "g1_user_prompt", "g2_user_prompt", "g1_winner", "g2_winner"}
"""What is read of a judgement, of one answer or of two."""

_TEXTS = {str, type(None)}

Answers = Mapping[int | str, Sequence[str]]
"""Question -> the answers to its turns."""
Row = dict[str, Any]


class Judge(Protocol):
    """What grades; see `Endpoint`."""

    model: str

    async def ask(self, messages: list[dict[str, str]], temperature: float) -> str:
        """Return the judge's answer."""


def rating_of(text: str) -> float | None:
    """The last rating "[[5]]" in a judgement; None if there is none from 1 to 10."""
    found = _RATING.findall(text)
    rating = float(found[-1]) if found else 0.0
    return rating if 1 <= rating <= 10 else None


def winner_of(text: str) -> str | None:
    """The last decision in a judgement: "A", "B", or "C" for a tie; None if there is none."""
    found = _WINNER.findall(text)
    return found[-1] if found else None


@dataclass(frozen=True)
class Item:
    """What one row of the judgement file is about: a turn of a question, answered by one model or by two."""

    question: Question
    turn: int
    answers: dict[str, Sequence[str]]
    "name of the model -> its answers to the question's turns"

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the row in the file."""
        return (self.question.id, self.turn, *self.answers)


def single_items(questions: Sequence[Question], models: Mapping[str, Answers]) -> list[Item]:
    """Every first and second turn, for each model by itself."""
    return [
        Item(question, turn, {name: answers[question.id]})
        for question in questions
        for turn in range(1, min(len(question.turns), 2) + 1)
        for name, answers in models.items()
    ]


def pair_items(questions: Sequence[Question], models: Mapping[str, Answers]) -> list[Item]:
    """Every first and second turn, for the first model and each other one."""
    (first, answers), *others = models.items()
    return [
        Item(question, turn, {first: answers[question.id], name: other[question.id]})
        for question in questions
        for turn in range(1, min(len(question.turns), 2) + 1)
        for name, other in others
    ]


def has_reference(question: Question, turn: int) -> bool:
    """True if the category is graded with reference answers and the question has them."""
    return question.category in REFERENCE_CATEGORIES and len(question.reference) >= turn


class Grading:
    """Grades items with a judge.

    Args:
        judge: grades.
        prompts: by name; see `read_prompts`.
        concurrency: largest number of requests at the same time.
    """

    def __init__(self, judge: Judge, prompts: Mapping[str, Prompt], concurrency: int = 8) -> None:
        self.judge, self.prompts, self.concurrency = judge, prompts, concurrency

    async def run(
        self, items: Sequence[Item], path: Path, advance: Callable[[int], None] = lambda count: None
    ) -> list[Row]:
        """Grade the items that the file has no judgement of, and add the judgements to it.

        A judgement counts if it was asked for with the same text. Those of earlier answers stay in the file.

        Returns:
            The rows of all items.

        Raises:
            EndpointError: a request failed for good. The judgements so far are in the file.
            ValueError: the file is of another judge, or damaged.
            FileExistsError: another process writes the file.
        """
        with open_rows(path, _check_row) as file:
            if others := {row["judge"][0] for row in file.rows} - {self.judge.model}:
                raise ValueError(f"{path} holds judgements of {', '.join(sorted(others))}; write another file")
            asked = {item.key: [messages[1]["content"] for _, messages in self._requests(item)] for item in items}

            def counts(row: Row) -> bool:
                """Whether a row is of an item, and of its present answers, questions and prompts."""
                return _key(row) in asked and _prompts_of(row) == asked[_key(row)]

            done = {_key(row) for row in file.rows if counts(row)}
            advance(len(done))
            limit = asyncio.Semaphore(self.concurrency)

            async def grade(item: Item) -> None:
                async with limit:
                    row = await (self._rate(item) if len(item.answers) == 1 else self._compare(item))
                file.append(row)
                advance(1)

            tasks = [asyncio.ensure_future(grade(item)) for item in items if item.key not in done]
            try:
                await asyncio.gather(*tasks)
            finally:  # after an error or Ctrl-C
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [row for row in file.rows if counts(row)]

    async def _rate(self, item: Item) -> Row:
        (name,) = item.answers
        ((prompt, messages),) = self._requests(item)
        raw, rating = await self._until_parsed(messages, rating_of)
        return {
            "question_id": item.question.id, "category": item.question.category, "turn": item.turn, "model": name,
            "judge": [self.judge.model, prompt], "user_prompt": messages[1]["content"], "judgment": raw[-1],
            "attempts": raw, "score": rating, "tstamp": time.time(),
        }  # fmt: skip

    async def _compare(self, item: Item) -> Row:
        """Ask in both orders, since judges prefer a position. A winner is only who wins in both."""
        first, second = item.answers
        row: Row = {
            "question_id": item.question.id, "category": item.question.category, "turn": item.turn, "model_1": first,
            "model_2": second,
        }  # fmt: skip
        for game, a, b, (prompt, messages) in zip(
            ("g1", "g2"), ("model_1", "model_2"), ("model_2", "model_1"), self._requests(item), strict=True
        ):
            raw, letter = await self._until_parsed(messages, winner_of)
            winner = {"A": a, "B": b, "C": "tie", None: None}[letter]
            row |= {
                "judge": [self.judge.model, prompt], f"{game}_user_prompt": messages[1]["content"],
                f"{game}_judgment": raw[-1], f"{game}_attempts": raw, f"{game}_winner": winner,
            }  # fmt: skip
        return {**row, "tstamp": time.time()}

    def _requests(self, item: Item) -> list[tuple[str, list[dict[str, str]]]]:
        """The prompt's name and the messages about an item, once for each order of the answers."""
        answers = list(item.answers.values())
        if len(answers) == 1:
            return [self._messages(item, {"answer": answers[0]})]
        orders = (answers, answers[::-1])
        return [self._messages(item, {"answer_a": one, "answer_b": two}) for one, two in orders]

    def _messages(self, item: Item, answers: Mapping[str, Sequence[str]]) -> tuple[str, list[dict[str, str]]]:
        """The prompt's name, and the messages."""
        question = item.question
        referenced = has_reference(question, item.turn)
        name = prompt_name("single" if len(answers) == 1 else "pair", item.turn, referenced)
        values = {f"ref_answer_{turn}": text for turn, text in enumerate(question.reference, start=1)}
        for field, texts in {"question": question.turns, **answers}.items():
            values |= {field: texts[0]} | {f"{field}_{turn}": text for turn, text in enumerate(texts, start=1)}
        return name, self.prompts[name].messages({"ref_answer_2": "", **values})

    async def _until_parsed(self, messages: list[dict[str, str]], parse: Callable[[str], Any]) -> tuple[list[str], Any]:
        """Ask until a judgement can be parsed: all raw judgements, and what was parsed or None."""
        raw: list[str] = []
        for temperature in _TEMPERATURES:
            raw.append(await self.judge.ask(messages, temperature))
            if (found := parse(raw[-1])) is not None:
                return raw, found
        return raw, None


def _check_row(row: Row, where: str) -> None:
    """Raise ValueError if a row is no judgement."""
    expected = _KEYS | (_KEYS_OF_ONE if "model" in row else _KEYS_OF_TWO)
    if not expected <= row.keys():
        raise ValueError(f"{where}: expected a judgement, found the keys {', '.join(row)}; name another --output")
    check_id(row["question_id"], where)
    if not are_texts(row["judge"]) or not row["judge"]:
        raise ValueError(
            f"{where}: expected the names of the judge and of its prompt, found {str(row['judge'])[:60]!r}; name "
            "another --output"
        )
    winners = [row[name] for name in ("g1_winner", "g2_winner") if name in row]
    score, numbers = row.get("score"), (int, float)
    if type(row["turn"]) is not int or type(score) not in (type(None), *numbers) or {*map(type, winners)} - _TEXTS:
        raise ValueError(
            f"{where}: expected a turn and a score that are numbers, and winners that are texts, found "
            f"{row['turn']!r}, {score!r} and {winners!r}; name another --output"
        )


def _prompts_of(row: Row) -> list[str]:
    """What the judge was asked, once for each order of the answers."""
    return [row["user_prompt"]] if "model" in row else [row["g1_user_prompt"], row["g2_user_prompt"]]


def _key(row: Row) -> tuple[Any, ...]:
    models = [row["model"]] if "model" in row else [row["model_1"], row["model_2"]]
    return (row["question_id"], row["turn"], *models)
