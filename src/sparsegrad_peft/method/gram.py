"""Step 1b: sums over the gradients of a group of layers, each gradient by itself (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

`hosvd.py` decomposes the sums. For a side that selects features instead of rotating, the diagonal is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .hosvd import Eigenbasis, StrongestFeatures, eigenbasis, strongest_features
from .sizes import Rows
from .statistics import Statistics


@dataclass
class GramStatistics(Statistics):
    """Gram matrices of one group's gradients."""

    gram_in: Tensor
    "`Σ GᵀG` (in, in); for a selected side, its diagonal (in,)"
    gram_out: Tensor
    "`Σ GGᵀ` (out, out); for a selected side, its diagonal (out,)"
    knows_common: ClassVar[bool] = False

    @classmethod
    def empty(
        cls, name: str, layers: tuple[str, ...], out: int, in_: int, selected: tuple[bool, bool] = (False, False),
        **where: Any,
    ) -> GramStatistics:  # fmt: skip
        """Return sums of zeros; of a side (output, input) that selects features, only the diagonal."""
        gram_out, gram_in = (
            torch.zeros((n,) if diagonal else (n, n), **where) for n, diagonal in zip((out, in_), selected, strict=True)
        )
        return cls(name, layers, gram_in, gram_out)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gram_out), len(self.gram_in)

    @property
    def _like(self) -> Tensor:
        return self.gram_in

    def _add_part(self, part: Tensor, layer: str, rows: slice, columns: slice) -> None:
        _add_side(self.gram_in, columns, part)
        _add_side(self.gram_out, rows, part.T)

    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        gram = self._gram(output, selected, name)
        return strongest_features(gram, rows, name=name) if selected else eigenbasis(gram, rows, name=name)

    def _gram(self, output: bool, selected: bool, name: str) -> Tensor:
        """Return a side's Gram matrix (n, n), or its diagonal (n,) for a selected side."""
        gram = self.gram_out if output else self.gram_in
        if selected:
            return gram if gram.dim() == 1 else gram.diagonal()
        if gram.dim() == 1:
            raise ValueError(
                f"{name}: the statistics were collected for features, expected directions; calibrate with the sizes of "
                "the bases"
            )
        return gram


def _add_side(sums: Tensor, place: slice, G: Tensor) -> None:
    """Add `GᵀG` (n, n) for a gradient (m, n), or its diagonal at its place."""
    if sums.dim() == 1:
        sums[place].add_(G.square().sum(0))
    else:
        sums.addmm_(G.T, G)
