"""One look at the gradient: shares of energy in several bases, and which rows of `∂L/∂y` are zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.selection import energy_share

from .scene import Scene

DENSITY = 0.01
"""The paper's share of entries: that of the selection, and of what "the largest" are."""

PADDING, UNREAD, LIVE, LIVE_PADDING = range(4)
"""What a token's row of `∂L/∂y` is: zero, since it is padding; zero, though it is none: what follows does not read this
position; not zero; and not zero though it is padding, which no model should show."""

Bases = Mapping[str, Mapping[str, Basis]]
"""Way of calibrating -> layer -> basis."""


def kinds(live: Tensor, mask: Tensor) -> Tensor:
    """What each token is, (batch, sequence), from `live` (its row is not zero) and `mask` (it is no padding)."""
    mask = mask.bool()
    return torch.where(live, torch.where(mask, LIVE, LIVE_PADDING), torch.where(mask, UNREAD, PADDING))


def shares_of(tokens: list[Tensor]) -> dict[str, float]:
    """The share of tokens of each kind, over several batches."""
    counts = sum(torch.bincount(found.reshape(-1), minlength=4) for found in tokens)
    assert isinstance(counts, Tensor)
    share = (counts / counts.sum()).tolist()
    names = ("padding", "unread", "live", "live_padding")
    return {name: round(value, 6) for name, value in zip(names, share, strict=True)}


@contextmanager
def watching(scene: Scene, names: Mapping[str, str]) -> Iterator[list[dict[str, Tensor]]]:
    """Notes, while gradients are taken, which tokens have a row of `∂L/∂y` that is not exactly zero.

    Args:
        scene: whose model.
        names: what to call it -> layer.

    Yields:
        A list to which the caller appends a dict before each backward pass, with the batch's "mask"; each of the names
        then gets its (batch, sequence) truth values there.
    """
    notes: list[dict[str, Tensor]] = []

    def hook(key: str) -> Callable[..., None]:
        def note(delta: Tensor) -> None:
            mask = notes[-1]["mask"]
            live = (delta != 0).any(-1).reshape(mask.shape).cpu()
            # A layer that several blocks share is passed several times.
            notes[-1][key] = live | notes[-1].get(key, torch.zeros_like(live))

        def forward(module: Any, inputs: Any, y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(note)

        return forward

    handles = [scene.model.get_submodule(name).register_forward_hook(hook(key)) for key, name in names.items()]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def look(scene: Scene, bases: Bases, watched: Mapping[str, str], n_batches: int, offset: int,
         advance: Callable[[], None]) -> tuple[dict[str, dict[str, float]], dict[str, list[Tensor]]]:  # fmt: skip
    """Gradients of fresh batches, one at a time; the model is left as it was.

    Args:
        scene: model and batches.
        bases: in which to take each gradient.
        watched: name -> layer whose rows of `∂L/∂y` are looked at.
        n_batches: how many batches.
        offset: which ones, see `Scene.batches`.
        advance: called after each.

    Returns:
        way -> role -> share of energy in the largest `DENSITY` of entries, mean over layers and batches; and name ->
        the kinds of each batch's tokens.
    """
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in bases}
    measured = {name for by_layer in bases.values() for name in by_layer}

    def measure(name: str, G: Tensor) -> None:
        if name in measured:
            for way, by_layer in bases.items():
                found[way][scene.role(name)].append(energy_share(by_layer[name].to_basis(G), DENSITY))

    with watching(scene, watched) as notes:

        def begin(batch: Any) -> None:
            ids = batch["input_ids"]
            notes.append({"mask": batch.get("attention_mask", torch.ones_like(ids)).cpu()})
            advance()

        stream_gradients(
            scene.model, dict.fromkeys([*measured, *watched.values()]), measure, step=scene.steps(offset, begin),
            n_steps=n_batches,
        )  # fmt: skip
        tokens = {key: [kinds(note[key], note["mask"]) for note in notes] for key in watched}
    means = {
        way: {role: round(sum(values) / len(values), 6) for role, values in sorted(roles.items(), reverse=True)}
        for way, roles in found.items()
    }
    return means, tokens
