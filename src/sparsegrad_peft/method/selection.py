"""Step 3: the gradient in the basis -> its `k` largest entries (paper: top-k of the gradient).

`topk_magnitude` is the rule of the paper: exactly `k` entries, the largest in magnitude, as COO. In an identity basis
the same function is MeProp's rule. `sparse_dense_product` is the paper's equations (1) and (2).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def resolve_k(numel: int, k: int | None = None, density: float | None = None) -> int:
    """Number of entries to keep out of `numel`, from a count or a share.

    A `density` is rounded down, to at least one entry.

    Raises:
        TypeError: `k` is no integer, or `density` no number.
        ValueError: none or both of `k` and `density` given; `k` outside 1..numel; `density` outside (0, 1]; no entries.
    """
    if (k is None) == (density is None):
        raise ValueError(
            "expected exactly one of k (a count) and density (a share of the entries), "
            f"found k={k} and density={density}"
        )
    if numel < 1:
        raise ValueError("there are 0 entries, and at least one is kept")
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k is a count and must be an int, found {k!r}; for a share of the entries pass density")
        if not 1 <= k <= numel:
            raise ValueError(f"k must be between 1 and the {numel} entries there are, found {k}")
        return k
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density is a share of the entries and must be a number, found {density!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 (0.01 keeps one entry in a hundred), found {density}")
    return max(1, math.floor(round(density * numel, 6)))  # 0.29 of 100 is 29, though 0.29 * 100 is a little less


# A matrix is sampled at this stride to guess a bound below its k-th largest entry. A prime, so that the sample does not
# keep to a few columns.
_SAMPLE_STRIDE = 61


def topk_positions(magnitude: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Flat positions (int64, ascending) of the `k` largest of `magnitude`; of equal ones the first come first.

    `torch.topk` alone leaves the choice among equal values open, and makes it differently on each device.

    Raises:
        ValueError: there is a NaN.
    """
    if bool(magnitude.isnan().any()):
        raise ValueError(
            f"{int(magnitude.isnan().sum())} of the {magnitude.numel()} gradient entries are NaN, so the largest {k} "
            "are not defined; look for a loss that is not finite, and check the gradient before the step"
        )
    candidates = _candidates(magnitude, k)
    if candidates is None:
        return _topk_exact(magnitude, k)
    return candidates[_topk_exact(magnitude[candidates], k)]


def _topk_exact(magnitude: Tensor, k: int) -> Tensor:
    threshold = torch.kthvalue(magnitude, magnitude.numel() - k + 1).values
    above = (magnitude > threshold).nonzero().squeeze(1)
    ties = (magnitude == threshold).nonzero().squeeze(1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _candidates(magnitude: Tensor, k: int) -> Tensor | None:
    """Positions (ascending) of entries above a bound that at least `k` pass; None where that saves nothing.

    Finding the k-th of all entries takes several times as long as comparing all with a bound. The bound is guessed from
    a sample to let about 1.5 k pass. A bad guess costs time and never the result.
    """
    n = magnitude.numel()
    if k < 1024 or k > n // 8:
        return None
    sample = magnitude[::_SAMPLE_STRIDE]
    rank = min(sample.numel(), math.ceil(1.5 * k / n * sample.numel()) + 8)
    bound = torch.kthvalue(sample, sample.numel() - rank + 1).values
    candidates = (magnitude >= bound).nonzero().squeeze(1)
    return candidates if k <= candidates.numel() <= n // 2 else None


def topk_magnitude(
    grad: Float[Tensor, "r c"], k: int | None = None, *, density: float | None = None
) -> Float[Tensor, "r c"]:
    """The `k` entries of a gradient that are largest in magnitude, as a coalesced sparse COO tensor.

    Exactly `k` coordinates are returned, zeros included where there are fewer than `k` nonzero entries, and entries of
    equal magnitude are taken in row-major order.

    Args:
        grad: (r, c), dense; the gradient in the basis, `G_tilde = V G Uᵀ` (or `G` itself: MeProp's rule).
        k: how many entries to keep.
        density: the same as a share of `r * c`, rounded down to at least one entry. Paper: 0.01.

    Raises:
        ValueError: `grad` is not a dense matrix or holds NaN; `k` or `density` is out of range (see `resolve_k`).
    """
    if grad.layout != torch.strided or grad.dim() != 2:
        raise ValueError(f"expected a dense matrix (r, c), found shape {tuple(grad.shape)} with layout {grad.layout}")
    k = resolve_k(grad.numel(), k, density)
    flat = grad.detach().reshape(-1)
    positions = topk_positions(flat.abs(), k)
    return coo_from_flat(positions, flat[positions], (grad.shape[0], grad.shape[1]))


def topk_signed_threshold_as_published(grad: Float[Tensor, "r c"], k: int) -> Float[Tensor, "r c"]:
    """The rule of the authors' code, for comparison only: the k-th largest *signed* entry as a bound on magnitudes.

    It keeps `k` entries only if the k largest in value are also the k largest in magnitude: asked for 100 of 4,800
    standard normal entries it keeps about 200, and all of them once their mean is well below zero.
    """
    threshold = torch.kthvalue(grad.reshape(-1), grad.numel() - k + 1).values
    return torch.where(grad.abs() >= threshold, grad, 0).to_sparse_coo().coalesce()


def coo_from_flat(
    positions: Int[Tensor, " k"], values: Float[Tensor, " k"], shape: tuple[int, int]
) -> Float[Tensor, "r c"]:
    """Coalesced COO matrix from flat row-major `positions` in ascending order."""
    columns = shape[1]
    index = torch.stack([torch.div(positions, columns, rounding_mode="floor"), positions % columns])
    return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)


def flat_from_coo(matrix: Float[Tensor, "r c"]) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Flat row-major positions (int64, ascending) and values of a COO matrix; repeated coordinates are summed."""
    matrix = matrix.coalesce()
    rows, columns = matrix.indices()
    return rows * matrix.shape[1] + columns, matrix.values()


def compressed_product(
    A: Float[Tensor, "b c"], B: Float[Tensor, "c d"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows d"]]:
    """Equation (1) of the paper: the rows of `A B` that are not zero for want of a nonzero in `A`, and their numbers.

    Args:
        A: (b, c), sparse COO, or dense with zero rows or columns.
        B: (c, d), dense.

    Returns:
        `rows` (ascending), and `A[rows][:, cols] B[cols]`, where `rows` and `cols` are those of `A` with a nonzero.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(f"expected A (b, c) and B (c, d), found {tuple(A.shape)} and {tuple(B.shape)}")
    if A.layout == torch.strided:
        nonzero = A != 0
        rows = nonzero.any(dim=1).nonzero().squeeze(1)
        cols = nonzero.any(dim=0).nonzero().squeeze(1)
        left = A if rows.numel() == A.shape[0] else A[rows]
        if cols.numel() == A.shape[1]:
            return rows, left @ B
        return rows, left[:, cols] @ B[cols]
    A = A.coalesce()
    stored = A.values() != 0  # COO may hold zeros, `topk_magnitude`'s does where there are fewer than k other entries
    values, (entry_rows, entry_cols) = A.values()[stored], A.indices()[:, stored]
    rows, entry_rows = entry_rows.unique(return_inverse=True)
    cols, entry_cols = entry_cols.unique(return_inverse=True)
    left = values.new_zeros(rows.numel(), cols.numel())
    left[entry_rows, entry_cols] = values
    return rows, left @ B[cols]


def sparse_dense_product(A: Float[Tensor, "b c"], B: Float[Tensor, "c d"]) -> Float[Tensor, "b d"]:
    """Sparse-by-dense product as COO: paper, equations (1) and (2).

    With `rows` and `cols` those of `A` that hold a nonzero,

        C = A[rows][:, cols] B[cols]          (1)
        C_coo(rows[k], l) = C(k, l)           (2)

    so the work is that of a dense product of the rows and columns that are left: worth it where whole rows are zero
    (padded or unread tokens), no more than a dense product with some copying elsewhere.

    Args:
        A: (b, c), sparse COO, or dense with zero rows or columns.
        B: (c, d), dense.

    Returns:
        (b, d), coalesced sparse COO with one entry for each column of each row in `rows`.
    """
    rows, C = compressed_product(A, B)  # (1)
    columns = torch.arange(B.shape[1], device=B.device)
    index = torch.stack([rows.repeat_interleave(columns.numel()), columns.repeat(rows.numel())])
    shape = (A.shape[0], B.shape[1])
    return torch.sparse_coo_tensor(index, C.reshape(-1), shape, is_coalesced=True, check_invariants=False)  # (2)


def energy_share(grad: Float[Tensor, "r c"], density: float) -> float:
    """Share of the squared gradient that its largest `density` of entries hold (paper, figure 2): 1 is all of it."""
    squared = grad.detach().reshape(-1).square()
    total = squared.sum()
    if total == 0:
        return 0.0
    positions = topk_positions(squared, resolve_k(squared.numel(), density=density))
    return float(squared[positions].sum() / total)
