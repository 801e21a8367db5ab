"""Helpers that several test files share: orthonormal rows, tiny models and their batches, a few steps of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64


def orthogonal(n: int, rows: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    """The first `rows` rows of a random orthogonal matrix (n, n); computed in float64, then cast."""
    return torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q[:rows].to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """One optimizer step a batch; returns the losses. Without `loss_fn`, the model's own loss of `model(**batch)`."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses
