"""The pretrained model of a run: with a new head, or that of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..methods.by_name import check_layers
from ..tasks.kinds import KINDS
from ..tasks.library_logs import suppress_library_logs
from ..tasks.load import load_task
from ..tasks.pretrained import first_line, load_config, model_path
from ..tasks.task import LANGUAGE, TEXT, Task
from .settings import RunArguments

_LEARNT_POSITIONS = {
    "albert": 0, "bart": 0, "bert": 0, "distilbert": 0, "electra": 0, "gpt2": 0, "mbart": 0, "opt": 0,
    "camembert": 2, "mpnet": 2, "roberta": 2, "xlm-roberta": 2,
}  # fmt: skip
"Models with a vector for each position -> how many of these are for no position, by `model_type`."


def load_model(model: str, task: Task, tokenizer: Any, folder: str | Path | None = None) -> nn.Module:
    """The pretrained model with a head for the task; or that of `folder`, a finished run's.

    A head that comes with the pretrained model is kept where it has the right size, and is a new one elsewhere.

    Raises:
        ValueError: the weights are not there, or are damaged.
    """
    kind, place = KINDS[task.kind], folder or model_path(model)
    try:
        with suppress_library_logs():  # it announces the new head, which is meant
            found: Any = kind.auto.from_pretrained(
                place, dtype=torch.float32, ignore_mismatched_sizes=folder is None, **kind.options(task)
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{place}: the model's weights cannot be read ({first_line(error)}); save or download it anew"
        ) from error
    if getattr(found.config, "pad_token_id", 0) is None and hasattr(tokenizer, "pad_token_id"):
        found.config.pad_token_id = tokenizer.pad_token_id
    model_with_head: nn.Module = found
    return model_with_head


def without_weights(config: PretrainedConfig, kind: str = TEXT) -> nn.Module | None:
    """A model's modules with the head for a kind of task, to look at before the weights are loaded or downloaded.

    Returns:
        The model, with parameters that have no storage; None for one that looks at numbers while it is made.

    Raises:
        ValueError: `transformers` has no such model with a head.
    """
    try:
        with suppress_library_logs(), torch.device("meta"):
            found: nn.Module = KINDS[kind].auto.from_config(config)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"transformers has no {config.model_type} model that {KINDS[kind].does}") from None
    except (RuntimeError, NotImplementedError):
        return None
    return found


def load_run_task(arguments: RunArguments) -> tuple[Task, nn.Module | None]:
    """The task of a run, and its model's modules without weights, None for a model that needs them to be made.

    Raises:
        ValueError: no training rows, no such model, or see `check_layers`: in plain words, before weights are loaded.
    """
    task = load_task(arguments.task, arguments.data)
    if "train" not in task.splits:
        raise ValueError(f"{task.name} has no training rows in {task.source}")
    config = load_config(model_path(arguments.model))
    shapes = without_weights(config, task.kind)
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
