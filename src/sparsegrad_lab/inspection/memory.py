"""Bytes of weights, bases, gradients and optimizer state under each method."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegrad_peft.method.selection import resolve_k

from .groups import FLOAT32, GroupRow

MOMENTS = 8
"""Bytes an entry: AdamW's two moments."""
TOUCHED = 12
"""Bytes an entry that was ever selected: its position and two moments, see `method/optim.py`."""
COO = 20
"""Bytes an entry of a COO gradient: row and column (int64) and the value."""


@dataclass(frozen=True)
class MethodBytes:
    """Memory of one method.

    Frozen parameters have the type of the weights. What trains is float32, and so are its gradients and moments.

    Attributes:
        key: "full", "layers", "lora", "block", "topk", "published" or "published_plain".
        name: the method with its numbers, for the table.
        trained: trained entries.
        weights_bytes: the model, with what the method adds or converts to float32.
        bases_bytes: all bases.
        gradients_bytes: of what trains.
        optimizer_bytes_low: optimizer state after the first step.
        optimizer_bytes_high: optimizer state once every entry was selected; the same as `low` without selection.
        activations_bytes: what autograd saves for backward; None if it was not asked for, or cannot be counted.
    """

    key: str
    name: str
    trained: int
    weights_bytes: int
    bases_bytes: int
    gradients_bytes: int
    optimizer_bytes_low: int
    optimizer_bytes_high: int
    activations_bytes: int | None = None

    @property
    def total_bytes_high(self) -> int:
        """The sum, with the upper bound of the optimizer state, and with the activations if they were counted."""
        state = self.weights_bytes + self.bases_bytes + self.gradients_bytes + self.optimizer_bytes_high
        return state + (self.activations_bytes or 0)


def method_bytes(
    total: int, rows: list[GroupRow], lora_rank: int, density: float, weight_bytes: int
) -> list[MethodBytes]:
    """Return the memory of each method for a model of `total` parameters, frozen ones of `weight_bytes` each."""
    layers = sum(row.layers * row.out * row.in_ for row in rows)  # weights, without biases
    entries = sum(row.entries for row in rows)
    k = sum(row.layers * row.k_per_layer for row in rows)
    k_complete = sum(row.layers * resolve_k(row.out * row.in_, density=density) for row in rows)
    bases = sum(row.bases_bytes for row in rows)
    complete = sum(row.in_**2 + row.out**2 for row in rows) * FLOAT32
    lora = lora_rank * sum(row.layers * row.lora_entries_per_rank for row in rows)
    in_float32 = (total - layers) * weight_bytes + layers * FLOAT32
    adapted = total * weight_bytes + FLOAT32 * entries

    def dense(key: str, name: str, trained: int, weights: int, bases: int = 0) -> MethodBytes:
        state = MOMENTS * trained
        return MethodBytes(key, name, trained, weights, bases, FLOAT32 * trained, state, state)

    def selecting(key: str, name: str, trained: int, weights: int, bases: int, gradients: int, k: int) -> MethodBytes:
        name = f"{name}, top {density:.4g}"
        return MethodBytes(key, name, trained, weights, bases, gradients, TOUCHED * k, TOUCHED * trained)

    methods = [
        dense("full", "all weights, AdamW", total, FLOAT32 * total),
        dense("layers", "these layers, AdamW", layers, in_float32),
        dense("lora", f"LoRA rank {lora_rank}, AdamW", lora, total * weight_bytes + FLOAT32 * lora),
        dense("block", "SparseGrad, all of S", entries, adapted, bases),
        selecting("topk", "SparseGrad", entries, adapted, bases, FLOAT32 * entries, k),
    ]
    if any(row.experts > 1 for row in rows):  # complete bases of all experts' neurons are no option
        return methods
    return [
        *methods,
        selecting("published", "published layer", layers, in_float32, complete, COO * k_complete, k_complete),
        selecting("published_plain", "plain weights", layers, in_float32, complete, FLOAT32 * layers, k_complete),
    ]
