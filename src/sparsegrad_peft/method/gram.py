"""Step 1b: sums over the gradients of a group of layers, each gradient by itself (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

`hosvd.py` decomposes the sums. For a side that selects features instead of rotating, the diagonal is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gram_out), len(self.gram_in)

    @torch.no_grad()
    def add(self, G: Tensor, layer: str = "", *, normalize: bool = False) -> None:
        parts = G if G.dim() == 3 else G[None]
        for number, part in enumerate(cast_parts(parts, self.gram_in, normalize)):
            with without_autocast(part.device):
                _add_side(_of_expert(self.gram_in, number, len(parts)), part)
                _add_side(_of_expert(self.gram_out, number, len(parts)), part.T)
        self.n_gradients += 1

    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        gram = self.gram_out if output else self.gram_in
        if selected:
            return strongest_features(gram if gram.dim() == 1 else gram.diagonal(), rows, name=name)
        if gram.dim() == 1:
            raise ValueError(
                f"{name}: the statistics were collected for features, expected directions; calibrate with the sizes of "
                "the bases"
            )
        return eigenbasis(gram, rows, name=name)


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
