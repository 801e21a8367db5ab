"""The groups of layers to adapt: sizes, trained entries, and bytes of their bases and of calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparsegrad_peft.method.experts import expert_layout, owner_of, target_shape
from sparsegrad_peft.method.selection import resolve_k
from sparsegrad_peft.method.sketch import sketch_width
from sparsegrad_peft.tuner.config import SparseGradConfig

FLOAT32 = 4
"""Bytes of a float32 number: complete bases, Gram matrices, and everything that trains."""


@dataclass(frozen=True)
class GroupRow:
    """Layers with the same role and shape.

    Attributes:
        name: the group's name, see `group_linears`.
        layers: number of layers.
        out, in_: shape of each layer's weight, (out, in).
        r, c: shape of each layer's core `S`, (r, c): rows of `V` and of `U`.
        entries_per_layer: trained entries of a layer, r · c.
        entries: trained entries of the group.
        k_per_layer: entries of a layer that a step updates, at the given density.
        selected: True for a side (output, input) that selects features and rotates nothing.
        bases_bytes: `U` (c, in) and `V` (r, out), for the group or for each layer: bfloat16, complete ones float32;
            int32 indices of selected features; scales in float32.
        experts: number of experts that are one layer here; 1 for a linear layer.
        gram_bytes: Gram matrices of both sides, or their sketches, in float32 during calibration; as many as bases. Of
            a selected side, the diagonal.
    """

    name: str
    layers: int
    out: int
    in_: int
    r: int
    c: int
    entries_per_layer: int
    entries: int
    k_per_layer: int
    selected: tuple[bool, bool]
    bases_bytes: int
    gram_bytes: int
    experts: int = 1

    @property
    def lora_entries_per_rank(self) -> int:
        """Entries that LoRA trains in a layer for each rank; PEFT gives every expert its own pair of matrices."""
        wide, narrow = max(self.out, self.in_), min(self.out, self.in_)
        return wide + self.experts * narrow

    @property
    def rotated_sides(self) -> list[tuple[int, int]]:
        """(directions, kept rows) of the input and the output side, without selected ones."""
        sides = ((self.in_, self.c), (self.out, self.r))
        return [side for side, is_selected in zip(sides, self.selected[::-1], strict=True) if not is_selected]


def group_rows(
    model: nn.Module, groups: Mapping[str, list[str]], config: SparseGradConfig, density: float
) -> list[GroupRow]:
    """Return a row for each group.

    Raises:
        ValueError: a size or the density is out of range, or a size depends on gradients ("energy:SHARE").
    """
    rows, sizes = [], config.sizes
    for name, layers in groups.items():
        out, in_ = target_shape(model, layers[0])
        owner, parameter = owner_of(model, layers[0])
        sizes.check(out, in_, f"group {name}")
        r, c = sizes.counts(out, in_)
        if r is None or c is None:
            raise ValueError(
                f"{sizes}: this size depends on the gradients, which inspect does not have; give a count or a fraction"
            )
        pairs = 1 if config.shared else len(layers)
        select_out, select_in = sizes.selected(out, in_)
        sums = sum(
            n if is_selected else n * (sketch_width(kept, n) or n)
            for n, kept, is_selected in ((in_, c, select_in), (out, r, select_out))
        )
        scales = (r + c) * FLOAT32 if config.exponent else 0
        rows.append(GroupRow(
            name=name, layers=len(layers), out=out, in_=in_, r=r, c=c, entries_per_layer=r * c,
            entries=len(layers) * r * c, k_per_layer=resolve_k(r * c, density=density),
            selected=(select_out, select_in),
            bases_bytes=pairs * (sizes.basis_bytes(out, in_, config.dtype_of_bases.itemsize) + scales),
            gram_bytes=pairs * sums * FLOAT32,
            experts=1 if parameter is None else expert_layout(owner, parameter).experts,
        ))  # fmt: skip
    return rows


def calibration_bytes(rows: list[GroupRow], weight_bytes: int) -> int:
    """Return the extra memory of calibration at its peak.

    That is all Gram matrices or sketches, the random vectors of the sketches (once for each size of a side), and the
    gradient of the largest layer, with a float32 copy (of one expert) if the weights (`weight_bytes` an entry) are
    narrower.
    """
    sketches = {(n, sketch_width(kept, n)) for row in rows for n, kept in row.rotated_sides}
    random_vectors = sum(n * width for n, width in sketches if width is not None) * FLOAT32
    copy = 0 if weight_bytes == FLOAT32 else FLOAT32
    gradient = max(row.out * row.in_ * weight_bytes + row.out * row.in_ // row.experts * copy for row in rows)
    return sum(row.gram_bytes for row in rows) + random_vectors + gradient
