"""Load the task and the model of a run. They are checked together before any weights are loaded or downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from ..methods.method import Adapted
from ..methods.registry import find_method
from ..tasks.kinds import KINDS
from ..tasks.kinds.packing import prepare_model
from ..tasks.kinds.writer import IGNORED
from ..tasks.library_logs import suppress_library_logs
from ..tasks.load import load_task
from ..tasks.model_folder import model_path
from ..tasks.pretrained import NeedsWeightsError, check_causal, load_config
from ..tasks.registry import TASKS
from ..tasks.task import LANGUAGE, Task
from ..tasks.unrelated import unrelated_texts
from .exit_codes import refusing
from .interrupts import interrupts_kept
from .settings import RunArguments

_UNUSED_POSITIONS = {
    "albert": 0, "bart": 0, "bert": 0, "distilbert": 0, "electra": 0, "gpt2": 0, "mbart": 0, "opt": 0,
    "camembert": 2, "mpnet": 2, "roberta": 2, "xlm-roberta": 2,
}  # fmt: skip
"""`model_type` of models with learned position embeddings -> how many of these no token uses."""


@dataclass(frozen=True)
class Inputs:
    """All that a trainer is made of."""

    task: Task
    processor: Any
    "tokenizer or image processor"
    adapted: Adapted
    features: dict[str, Dataset]
    "split -> model inputs"
    unrelated: Dataset | None = None
    "model inputs of texts that are not trained on; see `data.unrelated`"

    @property
    def tokens(self) -> dict[str, int] | None:
        """Number of tokens in the train split, and of those that are learnt; None for other tasks than language."""
        if self.task.kind != LANGUAGE:
            return None
        rows = self.features["train"]
        learnt = sum(sum(label != IGNORED for label in labels) for labels in rows["labels"])
        return {"train": sum(map(len, rows["input_ids"])), "learnt": learnt}


def load_inputs(arguments: RunArguments) -> Inputs:
    """Load task, tokenizer and model, add the adapter, and tokenize.

    Raises:
        ValueError: see `load_run_task`; the weights cannot be read, or rows and model do not fit.
    """
    task, _ = load_run_task(arguments)
    kind = KINDS[task.kind]
    set_seed(arguments.seeds[0])
    processor = kind.processor(arguments.model)
    with suppress_library_logs(), interrupts_kept():
        adapted = load_adapted(arguments, task, processor, four_bits=arguments.load_in_4bit)
        with refusing():
            features = {split: kind.features(task, split, processor, arguments.data) for split in task.splits}
            unrelated = unrelated_features(arguments, processor)
        features = {split: rows if split == "train" else longest_first(rows) for split, rows in features.items()}
    for rows in [*features.values(), *([] if unrelated is None else [unrelated])]:
        kind.check_features(rows, adapted.model, processor)
    if arguments.data.packing:
        prepare_model(adapted.model, features["train"]["input_ids"][0])
    return Inputs(task, processor, adapted, features, unrelated)


def load_adapted(arguments: RunArguments, task: Task, processor: Any, *, four_bits: bool) -> Adapted:
    """Load the model and add the adapter.

    Args:
        arguments: the settings.
        task: the task.
        processor: tokenizer or image processor.
        four_bits: quantize the model's linear layers.
    """
    compute = compute_type(arguments) if four_bits else None
    model = KINDS[task.kind].load_model(
        arguments.model, task, processor, four_bits=compute, dtype=frozen_type(arguments)
    )
    with refusing():
        adapted = find_method(arguments.method).adapt(model, arguments.setup())
    for parameter in adapted.model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:  # such as a head, in a model of bfloat16
            parameter.data = parameter.data.float()
    return adapted


def frozen_type(arguments: RunArguments) -> torch.dtype:
    """Return the type of the weights that do not train."""
    return torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32


def compute_type(arguments: RunArguments) -> torch.dtype:
    """Return the type in which a run computes with 4-bit weights: that of its mixed precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.training.precision]


def unrelated_features(arguments: RunArguments, processor: Any) -> Dataset | None:
    """Tokenize the texts that are not trained on; None if the settings name none."""
    if arguments.data.unrelated is None:
        return None
    task = unrelated_texts(arguments.data.unrelated)
    return longest_first(KINDS[task.kind].features(task, task.name, processor, arguments.data))


def longest_first(rows: Dataset) -> Dataset:
    """Order the rows that are evaluated by length: batches need less padding, and one too large for memory is first."""
    if "input_ids" not in rows.column_names:
        return rows
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))


@refusing()
def load_run_task(arguments: RunArguments) -> tuple[Task, nn.Module | None]:
    """Load the task, and the model's modules without weights.

    Returns:
        The task, and the model on the meta device; None for a model that cannot be built there.

    Raises:
        ValueError: there are no training rows; or the model, the method's settings and the task do not fit.
    """
    task = load_task(arguments.task, arguments.data)
    if "train" not in task.splits:
        advice = "give data.folder with them, or data.val_size to train on a part of the evaluation rows"
        if "train_file" in TASKS[arguments.task].reads:
            advice = "give data.train_file"
        raise ValueError(f"{task.name} has no training rows in {task.source}; {advice}")
    config = load_config(model_path(arguments.model))
    empty_model: nn.Module | None
    try:
        empty_model = KINDS[task.kind].empty_model(config)
    except NeedsWeightsError:
        empty_model = None
    task = KINDS[task.kind].in_model_order(task, config)
    if task.kind == LANGUAGE:
        check_causal(arguments.model, config if empty_model is None else empty_model.config)
    _check_positions(arguments, config)
    if empty_model is not None:
        find_method(arguments.method).target_layers(empty_model, arguments.adapter)
    return task, empty_model


def _check_positions(arguments: RunArguments, config: Any) -> None:
    """Raise ValueError if rows may be longer than the model's learned position embeddings allow."""
    limit = getattr(config, "max_position_embeddings", None)
    if config.model_type not in _UNUSED_POSITIONS or limit is None:
        return
    limit -= _UNUSED_POSITIONS[config.model_type]
    if arguments.data.max_length > limit:
        raise ValueError(
            f"data.max_length: expected at most {limit} tokens, the number of positions of {arguments.model}; found "
            f"{arguments.data.max_length}"
        )
