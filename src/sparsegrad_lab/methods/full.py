"""Method `full`: regular fine-tuning of the MLP layers' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .method import LAYERS, LOOP, Adapted, Method, Setup

if TYPE_CHECKING:
    from torch import nn


class Full(Method):
    """AdamW on the weights themselves."""

    name = "full"
    order = 3
    summary = "regular fine-tuning of the layers' own weights"
    learning_rate = 1e-4
    leaves = "model"
    reads = LAYERS | LOOP - {"training.rest_learning_rate"}

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Freeze what is not trained."""
        from .training.layers import head_modules, train_only

        targets = self.target_layers(model, setup.adapter)
        train_only(model, None if setup.train_rest else [*targets, *head_modules(model, setup.heads)])
        return Adapted(model, optimizer=self.optimizer(model, targets, setup), targets=targets)

    def optimizer(self, model: nn.Module, targets: Sequence[str], setup: Setup) -> dict[str, Any]:
        """Arguments for `TrainingArguments` that choose another optimizer than AdamW."""
        return {}


METHOD = Full()
