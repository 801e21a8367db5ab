"""Build a model without weights, and find the layers that SparseGrad adapts."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import transformers
from torch import nn
from transformers import PretrainedConfig

from sparsegrad_peft.tuner.config import SparseGradConfig
from sparsegrad_peft.tuner.peft_private import include_all_linear_layers
from sparsegrad_peft.tuner.targets import choose_targets

from ..tasks.pretrained import NeedsWeightsError, build_without_weights, load_config

_AUTO_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""PEFT's task type -> the class of the model with its head."""


def model_type_of(model: nn.Module) -> str:
    """Return `config.model_type`, or "" for a model without a config."""
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def build_model(model: str | nn.Module | PretrainedConfig, task_type: str | None, num_labels: int | None) -> nn.Module:
    """Return the model's modules; from a name or config, on the meta device. A module is returned as it is.

    Raises:
        FileNotFoundError, ValueError: see `load_config` and `build_without_weights`.
    """
    if isinstance(model, nn.Module):
        return model
    config = load_config(model) if isinstance(model, str) else copy.deepcopy(model)
    if num_labels is not None:
        config.num_labels = num_labels
    auto = None
    if task_type is not None:
        auto = _AUTO_CLASSES.get(str(task_type).rpartition(".")[2].upper())
        if auto is None:
            raise ValueError(f"task_type must be one of {', '.join(_AUTO_CLASSES)}, found {task_type!r}")
    try:
        return build_without_weights(config, auto)
    except NeedsWeightsError as error:
        raise ValueError(f"{error}; load the model and pass it to inspect()") from error


def resolve_targets(
    model: nn.Module, target_modules: Iterable[str] | str | None, task_type: str | None, *, experts: bool
) -> tuple[list[str] | str, list[str]]:
    """Return the linear layers and the fused experts that `SparseGradConfig(target_modules=...)` adapts.

    The layers are in a form that `group_linears` takes. `experts` is False for a form that leaves fused experts out.

    Raises:
        ValueError: None was given, and the model has no known MLP layers.
    """
    if target_modules is None:
        return choose_targets(model, model_type_of(model), experts=experts)
    return _named_targets(model, target_modules, task_type), []


def _named_targets(model: nn.Module, target_modules: Iterable[str] | str, task_type: str | None) -> list[str] | str:
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        config = SparseGradConfig(target_modules="all-linear", task_type=task_type)
        names = set(include_all_linear_layers(config, model).target_modules or ())
        return [name for name, _ in model.named_modules() if name in names]
    return target_modules if isinstance(target_modules, str) else sorted(target_modules)
