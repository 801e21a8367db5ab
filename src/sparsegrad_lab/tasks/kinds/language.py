"""Texts to go on with: causal language modelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ...run.settings import RunArguments
from ..language import IGNORED, Writer, language_features
from ..library_logs import suppress_library_logs
from ..metrics import check_finite, score
from ..pretrained import load_tokenizer
from ..task import Task
from .kind import Kind, Rows

if TYPE_CHECKING:
    from ...run.finished_run import Finished

_PROMPTS = 8  # that are gone on with at once


class LanguageKind(Kind):
    """Nothing but the adapter is trained with `rest: freeze`: there is no head."""

    auto = AutoModelForCausalLM
    task_type = TaskType.CAUSAL_LM
    does = "goes on with a text"

    def processor(self, model: str | Path) -> Any:
        """The tokenizer."""
        return load_tokenizer(model)

    def features(self, task: Task, split: str, processor: Any, arguments: RunArguments) -> Dataset:
        """Token ids, and which of them are learnt."""
        writer = Writer(processor, task.text, arguments.data.template == "plain")
        return language_features(task, split, writer, arguments.data.max_length)

    def collator(self, processor: Any, arguments: RunArguments) -> Callable[[Rows], dict[str, Tensor]]:
        """Pads on the right, where the positions of the tokens stay what they are."""
        fixed = None if arguments.training.padding == "dynamic" else arguments.data.max_length

        def collate(rows: Rows) -> dict[str, Tensor]:
            length = fixed or max(len(row["input_ids"]) for row in rows)

            def padded(column: str, value: int) -> Tensor:
                return torch.tensor([[*row[column], *[value] * (length - len(row[column]))] for row in rows])

            mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
            return {
                "input_ids": padded("input_ids", processor.pad_token_id),
                "attention_mask": torch.tensor(mask),
                "labels": padded("labels", IGNORED),
            }

        return collate

    def evaluation_batch(self, arguments: RunArguments) -> int:
        """That of training: the outputs have an entry for each token and word."""
        return arguments.training.batch_size

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """(rows, 2): summed loss and number of the tokens that are learnt, so that the mean over all rows is exact."""
        logits = super().reduced(logits, labels)
        wanted = labels[:, 1:]
        # Row by row: in float32 the outputs take twice as much as the model's own.
        losses = [
            cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="sum")
            for row, targets in zip(logits[:, :-1], wanted, strict=True)
        ]
        return torch.stack([torch.stack(losses), (wanted != IGNORED).sum(1).float()], dim=1)

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Loss over all learnt tokens of all rows; outputs: those of `reduced`."""
        check_finite(outputs)
        return score(task.metrics, outputs[:, 1], outputs[:, 0])

    def predict(self, run: Finished, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> Rows:
        """What the model goes on with, the likeliest token each time, up to its end or `max_new_tokens`."""
        writer = Writer(run.tokenizer, run.task.text, run.config["data"].get("template") == "plain")
        (column,) = self.prompt_columns(run.task)
        prompts = [writer.encode([(writer.prompt(row[column]), False)])[0] for row in rows]
        found: Rows = []
        for start in range(0, len(rows), _PROMPTS):
            texts = _generate(run, prompts[start : start + _PROMPTS], max_new_tokens)
            found += [{**row, "prediction": text} for row, text in zip(rows[start:], texts, strict=False)]
        return found

    def prompt_columns(self, task: Task) -> tuple[str, ...]:
        """The text, or the prompt."""
        return task.text[:1]


@torch.inference_mode()
def _generate(run: Finished, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Texts after prompts, which are padded on the left: what is new stands after all of them."""
    model: Any = run.model
    length = max(map(len, prompts))
    pad = run.tokenizer.pad_token_id
    device = next(model.parameters()).device
    ids = torch.tensor([[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with suppress_library_logs():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            pad_token_id=pad, eos_token_id=run.tokenizer.eos_token_id,
        )  # fmt: skip
    texts: list[str] = run.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
