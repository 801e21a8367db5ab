"""Causal language modelling: texts, prompts with answers, conversations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ..conversations import CONVERSATION_COLUMNS, prompt_conversation
from ..generation import generate, generation_ends
from ..metrics import check_finite, score
from ..pretrained import check_length
from ..read import Row, check_columns
from ..settings import DataArguments
from ..task import Task
from .kind import Kind, Rows, check_token_ids, warn_of_cut_rows
from .packing import pack
from .writer import IGNORED, Writer

logger = logging.getLogger(__name__)

_PROMPTS = 8  # per generation batch


class LanguageKind(Kind):
    """Causal language modelling. There is no head: with `rest: freeze` only the adapter trains."""

    auto = AutoModelForCausalLM
    task_type = TaskType.CAUSAL_LM

    def model_options(self, task: Task) -> dict[str, Any]:
        """Return no options: there is no head."""
        return {}

    def features(self, task: Task, split: str, processor: Any, data: DataArguments) -> Dataset:
        """Tokenize a split and label the tokens to learn. Rows with nothing to learn in `max_length` are skipped.

        With `data.packing`, several rows of the train split are packed into one; see `pack`.
        """
        check_length(processor, data.max_length)
        writer = Writer(processor, task.text, data.template == "plain")
        rows = task.splits[split]
        found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row in rows:
            ids, labels = writer.encode_row(row, data.max_length)
            if any(label != IGNORED for label in labels):
                found["input_ids"].append(ids)
                found["labels"].append(labels)
        skipped = len(rows) - len(found["labels"])
        if skipped == len(rows):
            raise ValueError(
                f"{task.name}, {split}: no row has anything to learn in its first {data.max_length} tokens; raise "
                "data.max_length"
            )
        if skipped:
            logger.warning(
                "%s, %s: skipped %d of %d rows with nothing to learn in their first %d tokens", task.name, split,
                skipped, len(rows), data.max_length,
            )  # fmt: skip
        warn_of_cut_rows([len(ids) for ids in found["input_ids"]], data.max_length, f"{task.name}, {split}")
        features = Dataset.from_dict(found)
        if not data.packing or split != "train":
            return features
        packed = pack(features, data.max_length)
        logger.warning(
            "%s, %s: packed %d rows into %d; a row has %.0f of %d tokens on average", task.name, split, len(features),
            len(packed), sum(map(len, packed["input_ids"])) / len(packed), data.max_length,
        )  # fmt: skip
        return packed

    def collator(self, processor: Any, length: int | None) -> Callable[[Rows], dict[str, Tensor]]:
        """Return a collator that pads on the right. Padding of packed rows is one more sequence, with no loss."""

        def collate(rows: Rows) -> dict[str, Tensor]:
            longest = length or max(len(row["input_ids"]) for row in rows)

            def padded(column: str, value: int) -> Tensor:
                return torch.tensor([[*row[column], *[value] * (longest - len(row[column]))] for row in rows])

            tokens = {
                "input_ids": padded("input_ids", processor.pad_token_id),
                "labels": padded("labels", IGNORED),
            }
            if "position_ids" in rows[0]:
                places = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
                return {**tokens, "position_ids": torch.tensor(places)}
            mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            return {**tokens, "attention_mask": torch.tensor(mask)}

        return collate

    def evaluation_batch_size(self, training_batch_size: int) -> int:
        """Return the training batch size: the logits are large, one per token and vocabulary entry."""
        return training_batch_size

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """Return (rows, 2): summed loss and number of the learnt tokens, so that the mean over all rows is exact."""
        logits = super().reduced(logits, labels)
        wanted = labels[:, 1:]
        # Row by row: a float32 copy of all logits would need twice the memory of the logits.
        losses = [
            cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="sum")
            for row, targets in zip(logits[:, :-1], wanted, strict=True)
        ]
        return torch.stack([torch.stack(losses), (wanted != IGNORED).sum(1).float()], dim=1)

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Return the metrics over all learnt tokens; outputs: see `reduced`."""
        check_finite(outputs)
        return score(task.metrics, outputs[:, 1], outputs[:, 0])

    def predict(
        self, model: nn.Module, processor: Any, task: Task, rows: Sequence[dict[str, Any]], data: DataArguments,
        max_new_tokens: int,
    ) -> Rows:  # fmt: skip
        """Return the rows with the model's continuation: greedy, until an end token or `max_new_tokens`."""
        writer = Writer(processor, task.text, data.template == "plain")
        (column,) = self.prompt_columns(task)
        prompts = [writer.encode_prompt(row[column]) for row in rows]
        for ids in prompts:
            check_token_ids(ids, model, processor)
        ends = sorted(writer.end_tokens() | generation_ends(model))
        found: Rows = []
        for start in range(0, len(rows), _PROMPTS):
            texts = generate(model, processor, prompts[start : start + _PROMPTS], max_new_tokens, ends)
            found += [{**row, "prediction": text} for row, text in zip(rows[start:], texts, strict=False)]
        return found

    def prompt_columns(self, task: Task) -> tuple[str, ...]:
        """Return the column of the text, of the prompt, or of the conversation."""
        return task.text[:1]

    def check_rows(self, task: Task, rows: Sequence[Row], where: str) -> None:
        """Raise ValueError for a row without a prompt: a text, or a conversation with a message of the user."""
        (column,) = self.prompt_columns(task)
        chats = column in CONVERSATION_COLUMNS or len(task.text) == 2
        for row in rows:
            if chats and isinstance(row.get(column), list):
                prompt_conversation(row[column], f"{where}, line {row.line}, {column}")
            else:
                check_columns([row], [column], where)
