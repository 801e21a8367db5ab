"""The two short runs: regular fine-tuning, along which bases age, and the published method, for what it touches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.linear import is_conv1d
from sparsegrad_peft.method.optim import SparseGradAdamW
from sparsegrad_peft.method.restored_state import untouched
from sparsegrad_peft.tuner.trainer import TrainingDivergedError

from ..run.settings import LEARNING_RATES, RunArguments
from .image import encode, shrink
from .measure import DENSITY
from .scene import Scene

TRAINING = 2
"""Offset of the batches that both runs learn from."""


def run(scene: Scene, optimizer: torch.optim.Optimizer, steps: int, visit: Callable[[int], None],
        advance: Callable[[], None]) -> dict[str, Any]:  # fmt: skip
    """Train for so many steps, with `visit(step)` before the first, after each, and so after the last.

    Returns:
        "losses" of the steps, and "norms": group -> `‖dW‖/‖W‖` (Frobenius) of each of its layers at the end.

    Raises:
        TrainingDivergedError: a loss is not finite.
    """
    start = {name: scene.weight(name).detach().clone() for name in scene.layers}
    losses = []
    step_loss = scene.steps(TRAINING, lambda batch: None)
    scene.model.train()
    visit(0)
    for step in range(1, steps + 1):
        loss = step_loss()
        losses.append(round(loss.item(), 5))
        if not math.isfinite(losses[-1]):
            raise TrainingDivergedError(
                f"the loss of step {step} is {losses[-1]}; lower the learning rate, found "
                f"{optimizer.param_groups[0]['lr']:g} (training.learning_rate)"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance()
        visit(step)
    norms = {
        group: [relative_change(start[name], scene.weight(name)) for name in names]
        for group, names in scene.groups.items()
    }
    return {"losses": losses, "norms": norms}


@torch.no_grad()
def relative_change(before: Tensor, after: Tensor) -> float:
    """`‖after - before‖ / ‖before‖`, Frobenius."""
    return round(float((after - before).norm() / before.norm()), 8)


def regular(scene: Scene, steps: int, visit: Callable[[int], None], advance: Callable[[], None]) -> dict[str, Any]:
    """Regular fine-tuning by AdamW; the model is afterwards what it was. Returns what `run` does, and the rate."""
    rate = LEARNING_RATES["full"]
    with untouched(scene.model, keep_values_of=scene.trained):
        optimizer = torch.optim.AdamW(scene.trained, lr=rate, weight_decay=0.0)
        return {"learning_rate": rate, **run(scene, optimizer, steps, visit, advance)}


def published(scene: Scene, arguments: RunArguments, bases: Mapping[str, Basis], steps: int,
              advance: Callable[[], None]) -> dict[str, Any]:  # fmt: skip
    """The published method: complete bases, the largest entries in each step; the model is afterwards what it was.

    Returns:
        What `run` does, the rate, "k" of each layer of the block by role, "touched": role -> share of that layer's
        entries that were selected up to each step, and "all": the same over all layers; "images": role -> the share of
        each cell's entries.
    """
    # Without one given: that of a run that selects as many, not of one that trains a small core whole.
    rate = arguments.training.learning_rate or LEARNING_RATES["meprop"]
    rest_rate = arguments.training.rest_learning_rate or rate
    density = arguments.adapter.density
    selection: dict[str, Any] = {"k": arguments.adapter.k, "density": density}
    if arguments.adapter.k is None and density is None:
        selection["density"] = DENSITY
    weights = {name: scene.weight(name) for name in scene.layers}
    own = {id(weight) for weight in weights.values()}
    rest = [parameter for parameter in scene.trained if id(parameter) not in own]
    numel = sum(weight.numel() for weight in weights.values())
    touched: dict[str, list[float]] = {role: [] for role in (*scene.pair, "all")}

    with untouched(scene.model, keep_values_of=scene.trained):
        optimizer = SparseGradAdamW(
            [{"params": list(weights.values()), "sparse": True, **selection}, {"params": rest, "lr": rest_rate}],
            lr=rate,
            bases={weight: _as_stored(scene, name, bases[name]) for name, weight in weights.items()},
        )

        def visit(step: int) -> None:
            for role, name in scene.pair.items():
                touched[role].append(round(optimizer.touched(weights[name]) / weights[name].numel(), 8))
            touched["all"].append(round(sum(map(optimizer.touched, weights.values())) / numel, 8))

        found = run(scene, optimizer, steps, visit, advance)
        images = {}
        for role, name in scene.pair.items():
            mask = touched_mask(optimizer, weights[name])
            mask = mask.T if is_conv1d(scene.model.get_submodule(name)) else mask
            cells = shrink(mask.float(), "mean")
            images[role] = encode(torch.where(cells > 0, cells, torch.nan), 0.0, 1.0)
    return {"learning_rate": rate, "selection": {k: v for k, v in selection.items() if v is not None}, **found,
            "touched": touched, "images": images}  # fmt: skip


def touched_mask(optimizer: SparseGradAdamW, weight: nn.Parameter) -> Tensor:
    """True where an entry, in the basis, was ever selected; of the weight's shape."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[optimizer.state[weight]["positions"].long()] = True
    return mask.view(weight.shape)


def _as_stored(scene: Scene, name: str, basis: Basis) -> Basis:
    """A Conv1D keeps its weight transposed, (in, out): its two sides change places."""
    return Basis(basis.V, basis.U) if is_conv1d(scene.model.get_submodule(name)) else basis
