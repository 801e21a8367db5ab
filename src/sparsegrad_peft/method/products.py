"""Products of several matrices in the cheapest order, counted in multiply-adds (`costs.py`).

Nearly everything SparseGrad computes is a chain of at most four matrices: `V δᵀ x Uᵀ` (the gradient in the basis),
`Vᵀ S U` (the weight update), `x Uᵀ Sᵀ V` (the update applied to an input). The order decides the cost: with 2048 tokens
and a BERT up-projection truncated to a tenth of each side, `V (δᵀ x̃)` takes 0.6 billion multiply-adds and `(V δᵀ) x̃`
takes 2.0 billion. `None` in a chain stands for the identity matrix and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .costs import cheapest_cut


def _split(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    dims = (*(f.shape[0] for f in factors), factors[-1].shape[1])
    cut = cheapest_cut(dims)[1]
    return factors[:cut], factors[cut:]


def chain(*factors: Tensor | None) -> Tensor:
    """Multiply the matrices in the cheapest order. `None` is the identity."""
    present = [f for f in factors if f is not None]
    if len(present) == 1:
        return present[0]
    left, right = _split(present)
    return chain(*left) @ chain(*right)


def add_chain(out: Tensor, *factors: Tensor | None, in_place: bool = False) -> Tensor:
    """Return `out + chain(*factors)`; the last product and the sum are one `addmm`. `in_place` writes into `out`."""
    present = [f for f in factors if f is not None]
    if len(present) == 1:
        return out.add_(present[0]) if in_place else out + present[0]
    left, right = _split(present)
    if in_place:
        return out.addmm_(chain(*left), chain(*right))
    return torch.addmm(out, chain(*left), chain(*right))
