"""Step 1b, the other way: what the gradients of a layer have in common, and the basis made from it (not in the paper).

    A = Σ over s ≠ t of G_sᵀ G_t = MᵀM - Σ GᵀG,  with M = Σ G (out, in)      eigenvectors: U
        Σ over s ≠ t of G_s G_tᵀ = M Mᵀ - Σ GGᵀ                              eigenvectors: V

A gradient of a few rows is mostly noise. In `Σ GᵀG` the noise of all steps adds up. Two steps take different batches.
So the noise has mean zero in the product of their gradients, and what they have in common remains. This holds as long
as calibration takes no batch twice. Beside the energy of the single gradients, `uᵀ A u` tells how much of the gradient
along a direction u is noise: the scales of the core follow this share.

`projected.py` has a form with less memory, for large models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .common_energy import eigenbasis_of_pairs, strongest_features_of_pairs
from .gram import GramStatistics
from .hosvd import Eigenbasis, StrongestFeatures
from .sizes import Rows


@dataclass
class PairStatistics(GramStatistics):
    """The sum of each layer's gradients, beside the Gram matrices of the single gradients of the group."""

    M: dict[str, Tensor] = field(default_factory=dict)
    "layer name -> the sum of its gradients (out, in)"
    knows_common: ClassVar[bool] = True

    @classmethod
    def empty(
        cls, name: str, layers: tuple[str, ...], out: int, in_: int, selected: tuple[bool, bool] = (False, False),
        **where: Any,
    ) -> GramStatistics:  # fmt: skip
        grams = GramStatistics.empty(name, layers, out, in_, selected, **where)
        M = {layer: torch.zeros(out, in_, **where) for layer in layers}
        return cls(name, layers, grams.gram_in, grams.gram_out, M)

    def _add_part(self, part: Tensor, layer: str, rows: slice, columns: slice) -> None:
        super()._add_part(part, layer, rows, columns)
        self.M[layer][rows, columns].add_(part)

    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        own = self._gram(output, selected, name)
        factors = [M.T if output else M for M in self.M.values()]
        steps = self.n_gradients / len(self.layers)
        if selected:
            return strongest_features_of_pairs(factors, own, steps, rows, name=name)
        return eigenbasis_of_pairs(factors, own, steps, rows, name=name)
