"""The pretrained model of a run: with a new head, or that of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..methods.by_name import check_layers
from ..tasks.kinds import KINDS
from ..tasks.load import load_task
from ..tasks.pretrained import NeedsWeightsError, load_config, model_path
from ..tasks.task import LANGUAGE, Task
from .settings import RunArguments

_LEARNT_POSITIONS = {
    "albert": 0, "bart": 0, "bert": 0, "distilbert": 0, "electra": 0, "gpt2": 0, "mbart": 0, "opt": 0,
    "camembert": 2, "mpnet": 2, "roberta": 2, "xlm-roberta": 2,
}  # fmt: skip
"Models with a vector for each position -> how many of these are for no position, by `model_type`."


def load_model(model: str, task: Task, tokenizer: Any, folder: str | Path | None = None) -> nn.Module:
    """Load the pretrained model with a head for the task, or the model of `folder`; see `Kind.load_model`."""
    return KINDS[task.kind].load_model(model, task, tokenizer, folder)


def load_run_task(arguments: RunArguments) -> tuple[Task, nn.Module | None]:
    """The task of a run, and its model's modules without weights, None for a model that needs them to be made.

    Raises:
        ValueError: no training rows, no such model, or see `check_layers`: in plain words, before weights are loaded.
    """
    task = load_task(arguments.task, arguments.data)
    if "train" not in task.splits:
        raise ValueError(f"{task.name} has no training rows in {task.source}")
    config = load_config(model_path(arguments.model))
    try:
        shapes = KINDS[task.kind].empty_model(config)
    except NeedsWeightsError:
        shapes = None
    task = KINDS[task.kind].in_model_order(task, config)
    _check_reads_ahead(arguments.model, config if shapes is None else shapes.config, task.kind)
    _check_positions(arguments, config)
    if shapes is not None:
        check_layers(shapes, arguments)
    return task, shapes


def _check_reads_ahead(model: str, config: Any, kind: str) -> None:
    """Raise ValueError where a model for masked words is to go on with texts: it reads the words it would predict."""
    name = config.model_type
    both = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind == LANGUAGE and both and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"{model} is a {name}, which reads the words that it would have to predict; expected a language model, "
            "such as gpt2 or a LLaMA"
        )


def _check_positions(arguments: RunArguments, config: Any) -> None:
    """Raise ValueError where a row may be longer than the model has learnt positions for."""
    limit = getattr(config, "max_position_embeddings", None)
    if config.model_type not in _LEARNT_POSITIONS or limit is None:
        return
    limit -= _LEARNT_POSITIONS[config.model_type]
    if arguments.data.max_length > limit:
        raise ValueError(
            f"data.max_length: expected at most {limit} tokens, for which {arguments.model} has positions; found "
            f"{arguments.data.max_length}"
        )
