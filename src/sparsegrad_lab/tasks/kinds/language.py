"""Causal language modelling: texts, prompts with answers, conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ..language import IGNORED, Writer, language_features
from ..library_logs import suppress_library_logs
from ..metrics import check_finite, score
from ..pretrained import load_tokenizer
from ..settings import DataArguments
from ..task import Task
from .kind import Kind, Rows

_PROMPTS = 8  # per generation batch


class LanguageKind(Kind):
    """Causal language modelling. There is no head: with `rest: freeze` only the adapter trains."""

    auto = AutoModelForCausalLM
    task_type = TaskType.CAUSAL_LM

    def processor(self, model: str | Path) -> Any:
        """Load the tokenizer."""
        return load_tokenizer(model)

    def features(self, task: Task, split: str, processor: Any, data: DataArguments) -> Dataset:
        """Tokenize a split and label the tokens to learn."""
        writer = Writer(processor, task.text, data.template == "plain")
        return language_features(task, split, writer, data.max_length)

    def collator(self, processor: Any, length: int | None) -> Callable[[Rows], dict[str, Tensor]]:
        """Return a collator that pads on the right."""

        def collate(rows: Rows) -> dict[str, Tensor]:
            longest = length or max(len(row["input_ids"]) for row in rows)

            def padded(column: str, value: int) -> Tensor:
                return torch.tensor([[*row[column], *[value] * (longest - len(row[column]))] for row in rows])

            mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            return {
                "input_ids": padded("input_ids", processor.pad_token_id),
                "attention_mask": torch.tensor(mask),
                "labels": padded("labels", IGNORED),
            }

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
        prompts = [writer.encode([(writer.prompt(row[column]), False)])[0] for row in rows]
        found: Rows = []
        for start in range(0, len(rows), _PROMPTS):
            texts = _generate(model, processor, prompts[start : start + _PROMPTS], max_new_tokens)
            found += [{**row, "prediction": text} for row, text in zip(rows[start:], texts, strict=False)]
        return found

    def prompt_columns(self, task: Task) -> tuple[str, ...]:
        """Return the column of the text, or of the prompt."""
        return task.text[:1]


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Return the continuations of prompts; these are padded on the left."""
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    device = next(model.parameters()).device
    ids = torch.tensor([[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with suppress_library_logs():
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
