"""Answers to the turns of questions, in FastChat's form (fastchat/llm_judge/gen_model_answer.py)."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tasks.checksums import sha256_of
from ..tasks.conversations import Message
from ..tasks.generation import RowSampling
from .answers import check_question, turns_of
from .model import ChatModel
from .questions import Question
from .rows_file import open_rows

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
"""Category -> temperature (fastchat/llm_judge/common.py, temperature_config)."""
_OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class AnswerSettings:
    """What decides an answer, besides model and question."""

    seed: int = 0
    max_new_tokens: int = 1024
    temperature: float | None = None
    "of all questions; None: by category, as FastChat does"

    def temperature_of(self, category: str) -> float:
        """The temperature of a category's questions; 0: greedy."""
        given = TEMPERATURES.get(category, _OTHER_TEMPERATURE)
        return given if self.temperature is None else self.temperature


def answer_questions(
    model: ChatModel,
    questions: Sequence[Question],
    path: Path,
    *,
    model_id: str,
    settings: AnswerSettings,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Answer all questions that the file has no answer to, and add the answers to it.

    An answer depends on the model, the question and the settings, not on its batch: each turn of each question has a
    random stream of its own. (Rounding differs between batches, which may change a token now and then.)

    Args:
        model: answers.
        questions: what to answer.
        path: FastChat's answer file.
        model_id: name of the model in it.
        settings: seed, length and temperature.
        batch_size: questions that are answered at the same time.
        advance: gets the number of questions that are done.

    Returns:
        The number of new answers.

    Raises:
        ValueError: the file has answers of another model, to other questions or with other settings, or a line of it
            is damaged.
        FileExistsError: another process writes the file.
    """
    described = {**asdict(settings), "model": model.name}
    if model.weights is not None:
        described["weights_sha256"] = sha256_of(sorted(model.weights.glob("*.safetensors")))
    by_id = {question.id: question for question in questions}

    def check(row: dict[str, Any], where: str) -> None:
        try:
            turns_of(row, where)
        except ValueError as error:
            raise ValueError(f"{error}; name another --output") from None
        _check_same(row, described, model_id, path)
        check_question(row, by_id, where)

    with open_rows(path, check) as file:
        done = {row["question_id"] for row in file.rows}
        open_questions = [question for question in questions if question.id not in done]
        advance(len(questions) - len(open_questions))
        for start in range(0, len(open_questions), batch_size):
            batch = open_questions[start : start + batch_size]
            for question, turns in zip(batch, _answers(model, batch, settings), strict=True):
                file.append({
                    "question_id": question.id, "question": question.asked, "answer_id": uuid.uuid4().hex,
                    "model_id": model_id,
                    "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(), "settings": described,
                })  # fmt: skip
            advance(len(batch))
    return len(open_questions)


def _answers(model: ChatModel, questions: Sequence[Question], settings: AnswerSettings) -> list[list[str]]:
    """The answers to all turns of some questions, turn by turn."""
    conversations: list[list[Message]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [number for number, question in enumerate(questions) if turn < len(question.turns)]
        for number in asked:
            conversations[number].append({"role": "user", "content": questions[number].turns[turn]})
        sampling = RowSampling(
            [settings.temperature_of(questions[number].category) for number in asked],
            [_seed(settings.seed, questions[number].id, turn) for number in asked],
        )
        texts = model.answer([conversations[number] for number in asked], settings.max_new_tokens, sampling)
        for number, text in zip(asked, texts, strict=True):
            conversations[number].append({"role": "assistant", "content": text})
            answers[number].append(text)
    return answers


def _seed(seed: int, question: int | str, turn: int) -> int:
    """A seed for one turn of one question."""
    digest = hashlib.sha256(f"{seed}/{question}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_same(row: dict[str, Any], described: dict[str, Any], model_id: str, path: Path) -> None:
    there = {"model_id": row.get("model_id"), **(row.get("settings") or {})}
    here = {"model_id": model_id, **described}
    if "weights_sha256" not in there:  # an earlier version did not name the weights
        here.pop("weights_sha256", None)
    differences = [
        f"{name} ({there.get(name)} there, {here[name]} here)" for name in here if there.get(name) != here[name]
    ]
    if differences:
        raise ValueError(
            f"{path} holds answers that differ in {', '.join(differences)}; write another file, or remove this one"
        )
