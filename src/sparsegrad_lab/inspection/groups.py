"""The groups of layers to adapt: sizes, trained entries, and bytes of their bases and of calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparsegrad_peft.method.experts import expert_layout, owner_of, target_shape
from sparsegrad_peft.method.selection import resolve_k
from sparsegrad_peft.method.sum_sizes import SumsOf, projection_widths
from sparsegrad_peft.tuner.config import SparseGradConfig

FLOAT32 = 4
"""Bytes of a float32 number: complete bases, the sums of calibration, and everything that trains."""


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
        widths: random vectors of the projections of the summed gradients (see `projected.py`); None: whole sums.
        sums_bytes: the sums of the gradients, or their projections, in float32 during calibration.
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
    widths: tuple[int, int] | None
    sums_bytes: int
    experts: int = 1

    @property
    def lora_entries_per_rank(self) -> int:
        """Entries that LoRA trains in a layer for each rank; PEFT gives every expert its own pair of matrices."""
        wide, narrow = max(self.out, self.in_), min(self.out, self.in_)
        return wide + self.experts * narrow


def group_rows(
    model: nn.Module, groups: Mapping[str, list[str]], config: SparseGradConfig, density: float
) -> list[GroupRow]:
    """Return a row for each group.

    Raises:
        ValueError: a size or the density is out of range, or a size depends on gradients ("energy:SHARE").
    """
    rows, sizes = [], config.sizes
    shapes = {name: target_shape(model, layers[0]) for name, layers in groups.items()}
    for name, (out, in_) in shapes.items():
        sizes.check(out, in_, f"group {name}")
    sums = {
        name: SumsOf(len(layers), *shapes[name], sizes)
        if config.shared
        else SumsOf(1, *shapes[name], sizes, len(layers))
        for name, layers in groups.items()
    }
    all_widths = {} if sizes.by_side else projection_widths(sums)
    for name, layers in groups.items():
        out, in_ = shapes[name]
        owner, parameter = owner_of(model, layers[0])
        r, c = sizes.counts(out, in_)
        if r is None or c is None:
            raise ValueError(
                f"{sizes}: this size depends on the gradients, which inspect does not have; give a count or a fraction"
            )
        pairs = 1 if config.shared else len(layers)
        widths = all_widths.get(name)
        whole = sums[name].grams if sizes.by_side else sums[name].whole
        scales = (r + c) * FLOAT32 if config.exponent else 0
        rows.append(GroupRow(
            name=name, layers=len(layers), out=out, in_=in_, r=r, c=c, entries_per_layer=r * c,
            entries=len(layers) * r * c, k_per_layer=resolve_k(r * c, density=density),
            selected=sizes.selected(out, in_),
            bases_bytes=pairs * (sizes.basis_bytes(out, in_, config.dtype_of_bases.itemsize) + scales),
            widths=widths, sums_bytes=FLOAT32 * (whole if widths is None else sums[name].projected(widths)),
            experts=1 if parameter is None else expert_layout(owner, parameter).experts,
        ))  # fmt: skip
    return rows


def calibration_bytes(rows: list[GroupRow], weight_bytes: int) -> int:
    """Return the extra memory of calibration at its peak, with weights of `weight_bytes` an entry.

    That is all sums of gradients or their projections, the random vectors of the projections (once for each size of a
    side), and the gradient of the largest layer, with a float32 copy (of one expert) that is scaled to norm 1.
    """
    vectors = {(row.out, row.widths[0]) for row in rows if row.widths}
    vectors |= {(row.in_, row.widths[1]) for row in rows if row.widths}
    random_vectors = sum(n * width for n, width in vectors) * FLOAT32
    gradient = max(row.out * row.in_ * weight_bytes + row.out * row.in_ // row.experts * FLOAT32 for row in rows)
    return sum(row.sums_bytes for row in rows) + random_vectors + gradient
