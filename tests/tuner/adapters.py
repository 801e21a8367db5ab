"""Adapters for the tests of the tuner: made, calibrated, trained a little, and told apart."""

from __future__ import annotations

import copy
from typing import Any

from models import batch, make
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups
from sparsegrad_peft.tuner.layer import SparseGradLayer


def tuner_layers(model: nn.Module) -> list[SparseGradLayer]:
    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]


def cores(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.sparsegrad_S[adapter] for layer in tuner_layers(model)]


def train(model: nn.Module, data: dict[str, Tensor], steps: int = 3, lr: float = 0.02) -> None:
    optimizer = SparseGradAdamW(param_groups(model, density=0.2), lr=lr)
    for _ in range(steps):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(kind: str, *, calibrated: bool = True, trained: int = 3, **options: Any) -> tuple[PeftModel, nn.Module]:
    """An adapted model after a few steps of training, and the untouched base; uncalibrated: in the original space."""
    base = make(kind)
    if trained and not calibrated:
        options["original_space"] = True
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**{"c": 0.5, "r": 0.25, **options}))
    data = batch(kind)
    if calibrated:
        calibrate_adapter(model, [data], n_steps=3, training=False, progress=False)
    train(model, data, trained)
    return model.eval(), base


def differs(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
