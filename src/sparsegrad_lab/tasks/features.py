"""Rows -> token ids, padded when a batch is made (to its longest row), not before."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from .task import Task


def tokenize(task: Task, split: str, tokenizer: Any, max_length: int) -> Dataset:
    """Token ids and "labels" of a split. Longer rows are cut off, the longer sentence of a pair first.

    The data set is kept in memory and nothing is written to disk: these are small tasks.

    Raises:
        ValueError: `max_length` is more than the tokenizer's model can read.
    """
    check_length(tokenizer, max_length)

    def encode(rows: dict[str, list[Any]]) -> Any:
        encoded = tokenizer(*(rows[column] for column in task.text), truncation=True, max_length=max_length)
        number = float if task.labels is None else int
        return {**encoded, "labels": [number(label) for label in rows["label"]]}

    data = task.splits[split]
    return data.map(
        encode, batched=True, remove_columns=data.column_names, keep_in_memory=True, load_from_cache_file=False
    )


def check_length(tokenizer: Any, max_length: int) -> None:
    """Raise ValueError for a `max_length` that is more than the tokenizer's model can read."""
    limit = tokenizer.model_max_length  # a huge number where it is not known
    if max_length > limit:
        raise ValueError(f"max_length: expected at most {limit} tokens (the model's own limit), found {max_length}")
