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
    left, right = last_product(*factors)
    return left if right is None else left @ right


def last_product(*factors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The two matrices of the last product of `chain`, with all others computed. One matrix: (it, None)."""
    present = [f for f in factors if f is not None]
    if len(present) == 1:
        return present[0], None
    left, right = _split(present)
    return chain(*left), chain(*right)


def add_chain(out: Tensor, *factors: Tensor | None, in_place: bool = False) -> Tensor:
    """Return `out + chain(*factors)`; the last product and the sum are one `addmm`. `in_place` writes into `out`."""
    left, right = last_product(*factors)
    if right is None:
        return out.add_(left) if in_place else out + left
    return out.addmm_(left, right) if in_place else torch.addmm(out, left, right)
