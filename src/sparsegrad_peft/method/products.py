"""Products of several matrices in the cheapest order, counted in multiply-adds.

Nearly everything SparseGrad computes is a chain of at most four matrices: `V δᵀ x Uᵀ` (the gradient in the basis),
`Vᵀ S U` (the weight update), `x Uᵀ Sᵀ V` (the update applied to an input). Their order decides the cost: with 2048
tokens and a BERT up-projection truncated to a tenth of each side, `V (δᵀ x̃)` takes 0.6 billion multiply-adds and
`(V δᵀ) x̃` 2.0 billion. `None` in a chain stands for an identity matrix and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chain_cost(*dims: int) -> int:
    """Multiply-adds of a matrix chain in its cheapest order.

    `dims` are the sizes met along the chain: a (2, 3) by (3, 5) by (5, 7) product is `chain_cost(2, 3, 5, 7)`.
    """
    return _cheapest(dims)[0]


def _cheapest(dims: tuple[int, ...]) -> tuple[int, int]:
    """(multiply-adds, where to cut the chain in two); plain recursion, since a chain has at most four matrices."""
    if len(dims) <= 2:
        return 0, 0
    best, cut = -1, 0
    for s in range(1, len(dims) - 1):
        left, right = _cheapest(dims[: s + 1])[0], _cheapest(dims[s:])[0]
        cost = left + right + dims[0] * dims[s] * dims[-1]
        if best < 0 or cost < best:
            best, cut = cost, s
    return best, cut


def _split(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    dims = (*(f.shape[0] for f in factors), factors[-1].shape[1])
    cut = _cheapest(dims)[1]
    return factors[:cut], factors[cut:]


def chain(*factors: Tensor | None) -> Tensor:
    """Product of the matrices, left to right, `None` taken as the identity; the order of work is the cheapest."""
    present = [f for f in factors if f is not None]
    if len(present) == 1:
        return present[0]
    left, right = _split(present)
    return chain(*left) @ chain(*right)


def add_chain(out: Tensor, *factors: Tensor | None, in_place: bool = False) -> Tensor:
    """`out + chain(*factors)`, the last product and the sum as one `addmm`; with `in_place`, written into `out`."""
    present = [f for f in factors if f is not None]
    if len(present) == 1:
        return out.add_(present[0]) if in_place else out + present[0]
    left, right = _split(present)
    if in_place:
        return out.addmm_(chain(*left), chain(*right))
    return torch.addmm(out, chain(*left), chain(*right))
