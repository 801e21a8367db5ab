"""A model's modules without their weights, and which of its layers SparseGrad would take."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import transformers
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import PretrainedConfig

from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.tuner.config import SparseGradConfig
from sparsegrad_peft.tuner.targets import TARGETS, find_mlp_linears

from ..tasks.pretrained import NeedsWeightsError, build_without_weights, load_config

_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types -> the model with the head for it."""


def model_type_of(model: nn.Module) -> str:
    """`config.model_type`, "" where there is no config."""
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def built(model: str | nn.Module | PretrainedConfig, task_type: str | None, num_labels: int | None) -> nn.Module:
    """The model's modules, with parameters that have a shape and no storage."""
    if isinstance(model, nn.Module):
        return model
    config = load_config(model) if isinstance(model, str) else copy.deepcopy(model)
    if num_labels is not None:
        config.num_labels = num_labels
    try:
        return build_without_weights(config, _auto_class(task_type))
    except NeedsWeightsError as error:
        raise ValueError(f"{error}; load it and pass the model itself") from error


def _auto_class(task_type: str | None) -> Any:
    if task_type is None:
        return None
    auto = _HEADS.get(str(task_type).rpartition(".")[2].upper())
    if auto is None:
        raise ValueError(f"task_type must be one of {', '.join(_HEADS)}, found {task_type!r}")
    return getattr(transformers, auto)


def targets(model: nn.Module, target_modules: Iterable[str] | str | None, task_type: str | None) -> list[str] | str:
    """The layers that `SparseGradConfig(target_modules=...)` would adapt, in a form that `group_linears` takes."""
    if target_modules is None:
        if not mlp_linears(model):
            raise ValueError(
                f"{type(model).__name__}: no MLP layers known for model_type {model_type_of(model)!r}, and none found "
                "by structure; name the layers with target_modules (endings of their names, or a regular expression)"
            )
        return _mlp_targets(model)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        config = SparseGradConfig(target_modules="all-linear", task_type=task_type)
        names = set(_maybe_include_all_linear_layers(config, model).target_modules or ())
        return [name for name, _ in model.named_modules() if name in names]
    return target_modules if isinstance(target_modules, str) else sorted(target_modules)


def _mlp_targets(model: nn.Module) -> list[str] | str:
    return TARGETS.get(model_type_of(model)) or find_mlp_linears(model)


def mlp_linears(model: nn.Module) -> set[str]:
    """Names of the MLP's linear layers, whatever SparseGrad is asked to take."""
    try:
        groups = group_linears(model, _mlp_targets(model))
    except ValueError:  # nothing matches
        return set()
    return {name for names in groups.values() for name in names}
