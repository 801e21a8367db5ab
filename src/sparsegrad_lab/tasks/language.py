"""Texts, prompts with answers, and conversations -> token ids, and which of them a language model learns.

A row is written as one text in pieces, some of them learnt:

    text             the text and the end-of-text token, all of it learnt
    prompt, answer   as they are, with a space between where there is none; the answer is learnt
    conversation     Human: ... Assistant: ..., a blank line between; the assistant's part is learnt

The last two are written with the tokenizer's chat template, where it has one. After an answer the end-of-text token is
learnt too, or generation would not end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .oasst1 import COLUMN
from .pretrained import check_length
from .task import Task

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not learnt, as PyTorch's cross entropy has it."""

Pieces = list[tuple[str, bool]]
"""Parts of a text, and whether each is learnt."""


@dataclass(frozen=True)
class Writer:
    """How rows are written for a tokenizer.

    Args:
        tokenizer: a fast one, which tells where in the text a token stands.
        columns: the task's text.
        plain: without the chat template.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """

    tokenizer: Any
    columns: tuple[str, ...]
    plain: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer, which tells where a token stands in the text; found a "
                f"{type(self.tokenizer).__name__}; save it as tokenizer.json"
            )

    @property
    def templated(self) -> bool:
        """Whether the chat template is what rows are written with."""
        turns = len(self.columns) == 2 or self.columns == (COLUMN,)
        return turns and not self.plain and self.tokenizer.chat_template is not None

    def pieces(self, turns: Sequence[str]) -> Pieces:
        """Of the row's text, of prompt and answer, or of a conversation; an odd number of turns waits for an answer."""
        if self.templated:
            return self._by_template(turns)
        if self.columns == (COLUMN,):
            asked = [f"Human: {turn}\n\nAssistant:" for turn in turns[::2]]
            asked[1:] = [f"\n\n{turn}" for turn in asked[1:]]
        else:
            asked = list(turns[::2])
        answers = [
            f"{'' if prompt[-1:].isspace() or turn[:1].isspace() else ' '}{turn}{self._end}"
            for prompt, turn in zip(asked, turns[1::2], strict=False)
        ]
        found: Pieces = []
        for number, prompt in enumerate(asked):
            found += [(prompt, False), *((answer, True) for answer in answers[number : number + 1])]
        return found

    def row(self, row: Mapping[str, Any]) -> Pieces:
        """Of a row with all of its columns."""
        if len(self.columns) == 1 and self.columns != (COLUMN,):
            return [(row[self.columns[0]] + self._end, True)]
        return self.pieces(row[COLUMN] if self.columns == (COLUMN,) else [row[column] for column in self.columns])

    def prompt(self, text: str) -> str:
        """What a model goes on with: a text, a prompt, or what the human says first."""
        return "".join(piece for piece, _ in self.pieces([text]))

    def encode(self, pieces: Pieces, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """Token ids, and the same as labels with -100 where nothing is learnt; what is too long is cut off.

        A token belongs to the piece in which it begins. The first token has nothing before it and is not learnt.
        """
        start = self._beginning
        encoded = self.tokenizer(
            "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
        )
        ends, at = [], 0
        for text, _ in pieces:
            at += len(text)
            ends.append(at)
        ids, labels, piece = list(start), [IGNORED] * len(start), 0
        for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            while piece < len(ends) - 1 and begin >= ends[piece]:
                piece += 1
            ids.append(token)
            labels.append(token if pieces[piece][1] else IGNORED)
        labels[:1] = [IGNORED] * len(labels[:1])
        return ids[:max_length], labels[:max_length]

    @property
    def _end(self) -> str:
        return self.tokenizer.eos_token or ""

    @property
    def _beginning(self) -> list[int]:
        """The token that the model expects before a text; a chat template writes it itself."""
        first = self.tokenizer.bos_token_id
        return [first] if not self.templated and first is not None and self.tokenizer("a").input_ids[0] == first else []

    def _by_template(self, turns: Sequence[str]) -> Pieces:
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        found: Pieces = []
        before = ""
        for number in range(len(turns)):
            text = self.tokenizer.apply_chat_template(
                messages[: number + 1], tokenize=False, add_generation_prompt=number % 2 == 0
            )
            if not text.startswith(before):
                raise ValueError(
                    "the model's chat template writes earlier turns anew when one is added, so that it cannot be told "
                    "what is learnt; set data.template to plain"
                )
            found.append((text[len(before) :], number % 2 == 1))
            before = text
        return found


def language_features(task: Task, split: str, writer: Writer, max_length: int) -> Dataset:
    """Token ids and "labels" of a split. Rows of which nothing is learnt within `max_length` are left out.

    Raises:
        ValueError: `max_length` is more than the model can read, or no row is left.
    """
    check_length(writer.tokenizer, max_length)
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in task.splits[split]:
        ids, labels = writer.encode(writer.row(row), max_length)
        if any(label != IGNORED for label in labels):
            found["input_ids"].append(ids)
            found["labels"].append(labels)
    left_out = len(task.splits[split]) - len(found["labels"])
    if not found["labels"]:
        raise ValueError(
            f"{task.name}, {split}: in none of {left_out} rows is anything to learn within the first {max_length} "
            "tokens; raise data.max_length"
        )
    if left_out:
        logger.warning(
            "%s, %s: %d of %d rows left out, whose first %d tokens hold nothing to learn", task.name, split, left_out,
            len(task.splits[split]), max_length,
        )  # fmt: skip
    return Dataset.from_dict(found)
