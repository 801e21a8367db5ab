"""Text classification and regression, of one text or a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ..metrics import predictions_of, score
from ..pretrained import check_length
from ..settings import DataArguments
from ..task import Task
from .kind import Kind, Rows, check_token_ids, warn_of_cut_rows

_BATCH_SIZE = 64


class TextKind(Kind):
    """Text classification and regression."""

    auto = AutoModelForSequenceClassification
    task_type = TaskType.SEQ_CLS
    heads = ("classifier", "score", "pooler", "pre_classifier", "classification_head")

    def features(self, task: Task, split: str, processor: Any, data: DataArguments) -> Dataset:
        """Tokenize a split. Long rows are truncated, the longer text of a pair first. Nothing is written to disk."""
        check_length(processor, data.max_length)

        def encode(rows: dict[str, list[Any]]) -> Any:
            encoded = processor(*(rows[column] for column in task.text), truncation=True, max_length=data.max_length)
            number = float if task.labels is None else int
            return {**encoded, "labels": [number(label) for label in rows["label"]]}

        rows = task.splits[split]
        features = rows.map(
            encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, load_from_cache_file=False
        )
        empty = [number for number, ids in enumerate(features["input_ids"], start=1) if not ids]
        if empty:
            raise ValueError(
                f"{task.name}, {split}: row {empty[0]} has an empty text, for which the tokenizer gives no tokens; "
                f"remove such rows ({len(empty)} of {len(rows)})"
            )
        warn_of_cut_rows([len(ids) for ids in features["input_ids"]], data.max_length, f"{task.name}, {split}")
        return features

    def collator(self, processor: Any, length: int | None) -> Callable[[Rows], dict[str, Tensor]]:
        """Return transformers' collator."""
        found: Any = DataCollatorWithPadding(processor, padding="max_length" if length else True, max_length=length)
        return found

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Return the metrics of the classes with the largest logits; outputs: (rows, classes)."""
        predictions = predictions_of(outputs, task.labels is None)
        return score(task.metrics, np.asarray(labels), predictions, task.positive_number)

    def predict(
        self, model: nn.Module, processor: Any, task: Task, rows: Sequence[dict[str, Any]], data: DataArguments,
        max_new_tokens: int,
    ) -> Rows:  # fmt: skip
        """Return the rows with their class and probabilities, or with the predicted number."""
        texts = [tuple(row[column] for column in task.text) for row in rows]
        logits = text_logits(model, processor, texts, data.max_length)
        if task.labels is None:
            return [{**row, "prediction": float(value)} for row, value in zip(rows, logits[:, 0], strict=True)]
        return with_probabilities(rows, logits, task.labels)


@torch.inference_mode()
def text_logits(
    model: nn.Module, tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int
) -> np.ndarray[Any, Any]:
    """Return the logits (rows, classes) of rows of one text or two."""
    device = next(model.parameters()).device
    found, lengths = [], []
    for start in range(0, len(texts), _BATCH_SIZE):
        columns = zip(*texts[start : start + _BATCH_SIZE], strict=True)
        batch = tokenizer(
            *map(list, columns), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        if not batch["input_ids"].numel():
            raise ValueError("the text is empty, and the tokenizer adds no tokens; give a longer text")
        check_token_ids(batch["input_ids"].flatten().tolist(), model, tokenizer)
        lengths += batch["attention_mask"].sum(1).tolist()
        found.append(model(**batch.to(device)).logits.float().cpu())
    warn_of_cut_rows(lengths, max_length, "predict")
    return torch.cat(found).numpy()


def with_probabilities(rows: Sequence[dict[str, Any]], logits: np.ndarray[Any, Any], labels: Sequence[str]) -> Rows:
    """Return the rows with "prediction" and the probability of each class; logits: (rows, classes)."""
    probabilities = torch.from_numpy(logits).softmax(-1).tolist()
    return [
        {**row, "prediction": labels[max(range(len(labels)), key=found.__getitem__)],
         **{f"p({name})": round(p, 6) for name, p in zip(labels, found, strict=True)}}
        for row, found in zip(rows, probabilities, strict=True)
    ]  # fmt: skip
