"""SparseAdam's rule for selected entries, with moments held only for entries that were ever selected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def sparse_adam_update(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Update the moments of the selected entries in place and return the entries' change (all shapes (k,)).

    The rule is that of `torch.optim.SparseAdam`: moments of entries that are not selected do not change, bias
    correction uses the global step, `eps` is added before the correction, and there is no weight decay.
    """
    exp_avg.lerp_(values, 1 - beta1)
    exp_avg_sq.lerp_(values.square(), 1 - beta2)
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return exp_avg / exp_avg_sq.sqrt().add_(eps) * -step_size


def step_selected(
    state: dict[str, Any], positions: Tensor, values: Tensor, lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Take one step on selected entries, update their state, and return the entries' change (k,).

    Args:
        state: of one parameter, empty before its first step. Then `step`; `positions` (n,), int32, flat and ascending,
            of all entries ever selected; and their moments `exp_avg` and `exp_avg_sq` (n,).
        positions: (k,) of the selected entries, ascending.
        values: (k,), the gradient there.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: see `sparse_adam_update`.
    """
    if not state:
        state["step"] = 0
        state["positions"] = positions.new_empty(0, dtype=torch.int32)
        state["exp_avg"] = values.new_empty(0)
        state["exp_avg_sq"] = values.new_empty(0)
    if "positions" not in state:  # of a sharded parameter, which holds the moments of all entries
        state["positions"] = state["exp_avg_sq"].flatten().nonzero().squeeze(1).int()
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].flatten()[state["positions"]]
        state["step"] = int(state["step"])
    match_dtype(state, values.dtype)
    state["step"] += 1
    slots = _slots(state, positions)
    exp_avg, exp_avg_sq = state["exp_avg"][slots], state["exp_avg_sq"][slots]
    change = sparse_adam_update(exp_avg, exp_avg_sq, values, state["step"], lr, *betas, eps)
    state["exp_avg"][slots] = exp_avg
    state["exp_avg_sq"][slots] = exp_avg_sq
    return change


def match_dtype(state: dict[str, Any], dtype: torch.dtype) -> None:
    """Cast the moments to the type of the step: the parameter was cast, or the state comes from another type's run."""
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].to(dtype)


def _slots(state: dict[str, Any], positions: Tensor) -> Tensor:
    """Return where the moments of `positions` (ascending) are held, after inserting zeros for new positions."""
    known: Tensor = state["positions"]
    positions = positions.to(torch.int32)  # a layer has fewer than 2³¹ entries; half the bytes of int64
    slots = torch.searchsorted(known, positions)
    found = (
        known[slots.clamp_max(known.numel() - 1)] == positions
        if known.numel()
        else torch.zeros_like(slots, dtype=torch.bool)
    )
    new = positions[~found]
    if new.numel():
        order = torch.cat([known, new]).sort()
        state["positions"] = order.values
        for moment in ("exp_avg", "exp_avg_sq"):
            padded = torch.cat([state[moment], state[moment].new_zeros(new.numel())])
            state[moment] = padded[order.indices]
        slots = torch.searchsorted(order.values, positions)
    return slots
