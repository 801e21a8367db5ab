"""The two short training runs of the figures: regular fine-tuning, and SparseGrad as published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.optim import SparseGradAdamW
from sparsegrad_peft.method.plain import is_conv1d
from sparsegrad_peft.method.restored_state import restored_state
from sparsegrad_peft.method.surgery import weight_bases
from sparsegrad_peft.tuner.trainer import TrainingDivergedError

from ..methods.registry import METHODS
from ..run.settings import RunArguments
from .cells import share_of_cell
from .setup import DENSITY, TRAINING_BATCHES, Setup

FINE_TUNING, SPARSEGRAD = "regular fine-tuning", "SparseGrad"
"""Names of the runs in the data and in the figures."""


def fine_tune(setup: Setup, steps: int, visit: Callable[[int], None], advance: Callable[[], None]) -> dict[str, Any]:
    """Train all weights with AdamW and restore the model. Returns `train`'s result and "learning_rate"."""
    rate = METHODS["full"].learning_rate
    with restored_state(setup.model, keep_values_of=setup.trained):
        optimizer = torch.optim.AdamW(setup.trained, lr=rate, weight_decay=0.0)
        return {"learning_rate": rate, **train(setup, optimizer, steps, visit, advance)}


def train_sparsegrad(
    setup: Setup, arguments: RunArguments, bases: Mapping[str, Basis], steps: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train with complete bases and the largest entries of each step, as published, and restore the model.

    Returns:
        `train`'s result, "learning_rate", "selection" (k or density), "touched": role or "all" -> share of the entries
        that were ever selected, at each step from 0, and "images": role -> the share in each cell.
    """
    # The default rate of the method that selects 1 % of all entries too; SparseGrad's is for a small core.
    rate = arguments.training.learning_rate or METHODS["meprop"].learning_rate
    k, density = arguments.adapter.k, arguments.adapter.density
    selection = {"k": k} if k is not None else {"density": DENSITY if density is None else density}
    weights = {name: setup.weight(name) for name in setup.layers}
    groups = {name: [name] for name in weights}
    own = {id(weight) for weight in weights.values()}
    rest = [parameter for parameter in setup.trained if id(parameter) not in own]
    numel = sum(weight.numel() for weight in weights.values())
    touched: dict[str, list[float]] = {role: [] for role in (*setup.shown_layers, "all")}

    with restored_state(setup.model, keep_values_of=setup.trained):
        optimizer = SparseGradAdamW(
            [{"params": list(weights.values()), "sparse": True, **selection},
             {"params": rest, "lr": arguments.training.rest_learning_rate or rate}],
            lr=rate,
            bases=weight_bases(setup.model, groups, {name: bases[name] for name in weights}),
        )  # fmt: skip

        def visit(step: int) -> None:
            for role, name in setup.shown_layers.items():
                touched[role].append(round(optimizer.touched(weights[name]) / weights[name].numel(), 8))
            touched["all"].append(round(sum(map(optimizer.touched, weights.values())) / numel, 8))

        run = train(setup, optimizer, steps, visit, advance)
        images = {}
        for role, name in setup.shown_layers.items():
            mask = touched_mask(optimizer, weights[name])
            images[role] = share_of_cell(mask.T if is_conv1d(setup.model.get_submodule(name)) else mask)
    return {"learning_rate": rate, "selection": selection, **run, "touched": touched, "images": images}


def train(
    setup: Setup, optimizer: torch.optim.Optimizer, steps: int, visit: Callable[[int], None],
    advance: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Train for `steps` steps. Calls `visit(step)` before the first step (0) and after each.

    Returns:
        "losses" of the steps, and "norms": group -> `‖dW‖/‖W‖` (Frobenius) of each of its layers at the end.

    Raises:
        TrainingDivergedError: a loss is not finite.
    """
    start = {name: setup.weight(name).detach().clone() for name in setup.layers}
    losses = []
    loss_step = setup.loss_step(TRAINING_BATCHES, lambda batch: None)
    setup.model.train()
    visit(0)
    for step in range(1, steps + 1):
        loss = loss_step()
        losses.append(round(loss.item(), 5))
        if not math.isfinite(losses[-1]):
            raise TrainingDivergedError(
                f"the loss of step {step} is {losses[-1]}; lower training.learning_rate, found "
                f"{optimizer.param_groups[0]['lr']:g}"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance()
        visit(step)
    norms = {
        group: [relative_change(start[name], setup.weight(name)) for name in names]
        for group, names in setup.groups.items()
    }
    return {"losses": losses, "norms": norms}


@torch.no_grad()
def relative_change(before: Tensor, after: Tensor) -> float:
    """Return `‖after - before‖ / ‖before‖` (Frobenius)."""
    return round(float((after - before).norm() / before.norm()), 8)


def touched_mask(optimizer: SparseGradAdamW, weight: nn.Parameter) -> Tensor:
    """Return a mask of the weight's shape: True where an entry, in the basis, was ever selected."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[optimizer.state[weight]["positions"].long()] = True
    return mask.view(weight.shape)
