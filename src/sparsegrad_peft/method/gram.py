"""Step 1b: sums over the gradients of a group of layers, each gradient by itself (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

`hosvd.py` decomposes the sums. For a side that selects features instead of rotating, the diagonal is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .hosvd import Eigenbasis, StrongestFeatures, eigenbasis, strongest_features
from .precision import without_autocast
from .sizes import Rows
from .statistics import Statistics, cast_parts


@dataclass
class GramStatistics(Statistics):
    """Gram matrices of one group's gradients."""

    gram_in: Tensor
    "`Σ GᵀG` (in, in); for a selected side, its diagonal (in,)"
    gram_out: Tensor
    "`Σ GGᵀ` (out, out); for a selected side, its diagonal (out,)"
    knows_common: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gram_out), len(self.gram_in)

    @torch.no_grad()
    def add(self, G: Tensor, layer: str = "", *, normalize: bool = False) -> None:
        parts = G if G.dim() == 3 else G[None]
        for number, part in enumerate(cast_parts(parts, self.gram_in, normalize)):
            with without_autocast(part.device):
                self._add_part(part, number, len(parts), layer)
        self.n_gradients += 1

    def _add_part(self, part: Tensor, number: int, count: int, layer: str) -> None:
        """Add the gradient of one of `count` experts, or the whole gradient if `count` is 1."""
        _add_side(_of_expert(self.gram_in, number, count), part)
        _add_side(_of_expert(self.gram_out, number, count), part.T)

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


@torch.no_grad()
def _add_side(sums: Tensor, G: Tensor) -> None:
    """Add `GᵀG` (n, n) for a gradient (m, n), or its diagonal (n,)."""
    if sums.dim() == 1:
        sums.add_(G.square().sum(0))
    else:
        sums.addmm_(G.T, G)


def _of_expert(sums: Tensor, number: int, count: int) -> Tensor:
    """Return the part of the sums that belongs to one of `count` experts: its neurons, or all of the hidden side."""
    return sums if count == 1 or sums.dim() == 2 else sums.view(count, -1)[number]
