"""Method `literal` in a run: the published layer in the place of each MLP layer, and plain weights in the end.

model ──► calibrate ──► LiteralSparseGradLinear ──► training ──► restore_linears ──► model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import calibrate
from sparsegrad_peft.method.groups import linear_shape
from sparsegrad_peft.method.literal import LiteralSparseGradLinear, Products
from sparsegrad_peft.method.surgery import replace_linears, restore_linears

from ..run.meter import measured
from ..run.trainer import RunTrainer


@dataclass(frozen=True)
class LiteralLayers:
    """Which layers the published one takes the place of, and how it computes."""

    groups: Mapping[str, Sequence[str]]
    "group -> layer names, from `group_linears`"
    products: Products
    k: int | None
    density: float | None

    def put_into(self, model: nn.Module, bases: Mapping[str, Basis]) -> None:
        """Replace the layers, in place. Biases train as they did before; the weights, in the basis."""
        replace_linears(
            model, self.groups, bases, LiteralSparseGradLinear.from_linear,
            k=self.k, density=self.density, products=self.products,
        )  # fmt: skip


class LiteralTrainer(RunTrainer):
    """A run's trainer that puts the published layer into the model once its bases are known.

    Args:
        literal: the layers.

    Raises:
        ValueError: several processes, whose gradients cannot be averaged: each selects entries of its own.
    """

    def __init__(self, *args: Any, literal: LiteralLayers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.literal = literal
        if self.args.world_size > 1:
            raise ValueError(f"method literal is for training in one process, found {self.args.world_size}")
        accelerator: Any = self.accelerator
        accelerator.clip_grad_norm_ = self._clip  # PyTorch's, which it calls, does not take COO gradients

    @property
    def _layers(self) -> list[LiteralSparseGradLinear]:
        return [module for module in self.model.modules() if isinstance(module, LiteralSparseGradLinear)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Calibrate and replace the layers, where a checkpoint has not done it; then `SparseGradAdamW`."""
        if not self._layers:
            with measured() as phase:
                self._on_training_batches(self._calibrate_and_replace)
            self.calibrated(phase)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _calibrate_and_replace(self, model: nn.Module, batches: Any, **options: Any) -> None:
        found = calibrate(model, batches, groups=self.literal.groups, progress=False, **options)
        self.literal.put_into(model, found.bases())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._layers:  # room for what it holds
            bases = {}
            for group, names in self.literal.groups.items():
                out_features, in_features = linear_shape(self.model.get_submodule(names[0]), names[0])
                bases[group] = Basis(torch.eye(in_features), torch.eye(out_features))
            self.literal.put_into(self.model, bases)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """By the norm of all gradients, those in the basis as they were selected; returns it as it was."""
        self.accelerator.unscale_gradients()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # A COO gradient is that of one backward pass, in which no position stands twice.
        values = [grad._values() if grad.is_sparse else grad for grad in grads]
        device = values[0].device
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value).to(device) for value in values]))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for value in values:
            value.mul_(scale.to(value.device))
        return norm

    def trained_entries(self, targets: Sequence[str]) -> dict[str, Any]:
        """As of any run; touched are the entries that selection has ever chosen."""
        assert self.optimizer is not None
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        touched = sum(optimizer.touched(layer.W_tilde) for layer in self._layers)
        return {**super().trained_entries(targets), "touched": touched}

    def make_plain(self) -> None:
        """Weights in the original space again."""
        restore_linears(self.model)
