"""Sentences with a class or a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ...run.settings import RunArguments
from ..features import tokenize
from ..metrics import predictions_of, score
from ..pretrained import load_tokenizer
from ..task import Task
from .kind import Kind, Rows

if TYPE_CHECKING:
    from ...run.finished_run import Finished


def class_options(task: Task) -> dict[str, Any]:
    """For a model with a head of as many outputs as there are classes, or one for a number."""
    if task.labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(task.labels),
        "problem_type": "single_label_classification",
        "label2id": {name: i for i, name in enumerate(task.labels)},
        "id2label": dict(enumerate(task.labels)),
    }


def with_probabilities(rows: Sequence[dict[str, Any]], logits: np.ndarray[Any, Any], labels: Sequence[str]) -> Rows:
    """The rows, each with its class and the probability of every class; logits: (rows, classes)."""
    probabilities = torch.from_numpy(logits).softmax(-1).tolist()
    return [
        {**row, "prediction": labels[max(range(len(labels)), key=found.__getitem__)],
         **{f"p({name})": round(p, 6) for name, p in zip(labels, found, strict=True)}}
        for row, found in zip(rows, probabilities, strict=True)
    ]  # fmt: skip


class TextKind(Kind):
    """Text classification and regression."""

    auto = AutoModelForSequenceClassification
    task_type = TaskType.SEQ_CLS
    does = "sorts texts into classes"
    heads = ("classifier", "score", "pooler", "pre_classifier", "classification_head")

    def processor(self, model: str | Path) -> Any:
        """The tokenizer."""
        return load_tokenizer(model)

    def options(self, task: Task) -> dict[str, Any]:
        """The classes."""
        return class_options(task)

    def features(self, task: Task, split: str, processor: Any, arguments: RunArguments) -> Dataset:
        """Token ids."""
        return tokenize(task, split, processor, arguments.data.max_length)

    def collator(self, processor: Any, arguments: RunArguments) -> DataCollatorWithPadding:
        """Pads a batch."""
        if arguments.training.padding == "dynamic":
            return DataCollatorWithPadding(processor)
        return DataCollatorWithPadding(processor, padding="max_length", max_length=arguments.data.max_length)

    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Of the classes with the largest output; outputs: (rows, classes)."""
        return score(task.metrics, np.asarray(labels), predictions_of(outputs, task.labels is None))

    def predict(self, run: Finished, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> Rows:
        """Class and probabilities, or the number."""
        logits = run.logits(tuple(row[column] for column in run.task.text) for row in rows)
        if run.task.labels is None:
            return [{**row, "prediction": float(value)} for row, value in zip(rows, logits[:, 0], strict=True)]
        return with_probabilities(rows, logits, run.task.labels)
