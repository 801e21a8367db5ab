"""Texts that a run does not train on: their perplexity before and after training shows what a model forgot."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .glue import load_glue
from .task import LANGUAGE, LOSSES, Task

COLUMN = "text"
_ROWS = 256


def unrelated_texts(source: str) -> Task:
    """Return a task with the split "unrelated": 256 texts at most, the same in each run.

    Args:
        source: a file with one text per line, or "cola": the sentences of CoLA's train set.

    Raises:
        FileNotFoundError: there is no such file, or CoLA is neither in SPARSEGRAD_DATA nor on the hub.
        ValueError: the file is not UTF-8, or has no text.
    """
    if source == "cola":
        (column,) = (task := load_glue("cola")).text
        texts = list(task.splits["train"][column])
    else:
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{source}: expected UTF-8; convert the file") from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{source}: expected texts, one per line; found none")
    rows = Dataset.from_dict({COLUMN: texts})
    return Task("unrelated", (COLUMN,), None, LOSSES, {"unrelated": rows}, source, LANGUAGE).limited(None, _ROWS)
