"""The trainer of method `literal`.

model ──► calibrate ──► LiteralSparseGradLinear ──► training ──► restore_linears ──► model
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import calibrate
from sparsegrad_peft.method.groups import linear_shape
from sparsegrad_peft.method.literal import LiteralSparseGradLinear, Products
from sparsegrad_peft.method.surgery import replace_linears, restore_linears

from .trainer import MethodTrainer


@dataclass(frozen=True)
class LiteralLayers:
    """The layers to replace, and how the published layer computes."""

    groups: Mapping[str, Sequence[str]]
    "group -> layer names, from `group_linears`"
    products: Products
    k: int | None
    density: float | None

    def replace_in(self, model: nn.Module, bases: Mapping[str, Basis]) -> None:
        """Replace the layers, in place. Weights are trained in the basis, biases as before."""
        make, options = LiteralSparseGradLinear.from_linear, {"k": self.k, "density": self.density}
        replace_linears(model, self.groups, bases, make, products=self.products, **options)


class LiteralTrainer(MethodTrainer):
    """Replaces the layers once their bases are known, and restores plain layers at the end.

    Args:
        literal: the layers.

    Raises:
        ValueError: several processes. Each selects entries of its own, so that gradients cannot be averaged.
    """

    def __init__(self, *args: Any, literal: LiteralLayers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.literal = literal
        if self.args.world_size > 1:
            raise ValueError(
                f"method literal trains in one process, found {self.args.world_size}; start it without torchrun or "
                "accelerate launch"
            )

    @property
    def _layers(self) -> list[LiteralSparseGradLinear]:
        return [module for module in self.model.modules() if isinstance(module, LiteralSparseGradLinear)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Calibrate and replace the layers, unless a checkpoint has; then create `SparseGradAdamW`."""
        if not self._layers:
            self._on_training_batches(self._calibrate_and_replace)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _calibrate_and_replace(self, model: nn.Module, batches: Any, **options: Any) -> None:
        calibration = calibrate(model, batches, groups=self.literal.groups, progress=False, **options)
        self.literal.replace_in(model, calibration.bases())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._layers:  # the checkpoint's tensors need these modules
            bases = {}
            for group, names in self.literal.groups.items():
                out_features, in_features = linear_shape(self.model.get_submodule(names[0]), names[0])
                bases[group] = Basis(torch.eye(in_features), torch.eye(out_features))
            self.literal.replace_in(self.model, bases)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip by the norm of all gradients, and return it. PyTorch's function refuses COO gradients."""
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm for the log. It is None if gradients are not clipped."""
        return self._clip(model, math.inf) if grad_norm is None else grad_norm

    def _clip(self, model: nn.Module, max_norm: float) -> Tensor:
        self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # A COO gradient comes from one backward pass, in which no position occurs twice.
        values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
        device = values[0].device
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value).to(device) for value in values]))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for value in values:
            value.mul_(scale.to(value.device))
        return norm

    def parameter_counts(self, targets: Sequence[str]) -> dict[str, Any]:
        """Number of trained parameters; "touched": the entries that were ever selected."""
        assert self.optimizer is not None
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        touched = sum(optimizer.touched(layer.W_tilde) for layer in self._layers)
        return {**super().parameter_counts(targets), "touched": touched}

    def make_plain(self) -> None:
        """Restore linear layers with weights in the original space."""
        restore_linears(self.model)
