"""Step 3: the gradient in the basis -> its `k` largest entries (paper: top-k of the gradient).

`topk_magnitude` is the paper's rule: exactly the `k` entries largest in magnitude, as COO. In an identity basis the
same function is MeProp's rule. `sparse_dense_product` is the paper's equations (1) and (2).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import at_least_float32


def resolve_k(numel: int, k: int | None = None, density: float | None = None) -> int:
    """Return the number of entries to keep out of `numel`, from a count or a share.

    A `density` is rounded down, to at least one entry.

    Raises:
        TypeError: `k` is not an integer, or `density` is not a number.
        ValueError: none or both of `k` and `density` given; `k` outside 1..numel; `density` outside (0, 1]; no entries.
    """
    if (k is None) == (density is None):
        raise ValueError(
            "expected exactly one of k (a count) and density (a share of the entries), "
            f"found k={k} and density={density}"
        )
    if numel < 1:
        raise ValueError("expected at least one entry to select from, found none")
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
    return max(1, math.floor(round(density * numel, 6)))  # 0.29 of 100 is 29; as floats, 0.29 * 100 is a little less


# The stride at which a matrix is sampled to guess a bound below its k-th largest entry. It is a prime, so that the
# sample is not drawn from a few columns only.
_SAMPLE_STRIDE = 61


def topk_positions(magnitude: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Return the flat positions (int64, ascending) of the `k` largest values; of equal values, the first are taken.

    `torch.topk` leaves the choice among equal values open, and it differs between devices.

    Raises:
        ValueError: there is a NaN.
    """
    if bool(magnitude.isnan().any()):
        raise ValueError(
            f"{int(magnitude.isnan().sum())} of the {magnitude.numel()} gradient entries are NaN, so the largest {k} "
            "are not defined; look for a loss that is not finite, and check the gradient before the step"
        )
    return largest_positions(magnitude, k)


def largest_positions(magnitude: Tensor, k: int) -> Tensor:
    """Do what `topk_positions` does, for values that are known to be numbers."""
    candidates = _candidates(magnitude, k)
    if candidates is None:
        return _topk_exact(magnitude, k)
    return candidates[_topk_exact(magnitude[candidates], k)]


def _topk_exact(magnitude: Tensor, k: int) -> Tensor:
    threshold = torch.kthvalue(magnitude, magnitude.numel() - k + 1).values
    found = (magnitude >= threshold).nonzero().squeeze(1)
    if found.numel() == k:
        return found
    above, ties = found[magnitude[found] > threshold], found[magnitude[found] == threshold]
    return torch.cat([above, ties[: k - above.numel()]]).sort().values


def _candidates(magnitude: Tensor, k: int) -> Tensor | None:
    """Return the positions (ascending) of all entries above a bound, at least `k` of them; None if that saves nothing.

    Finding the k-th largest of all entries takes several times as long as comparing all with a bound. The bound is
    guessed from a sample such that about 1.5 k entries pass. A bad guess costs time, but does not change the result.
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
    """Return the `k` entries of a gradient that are largest in magnitude, as a coalesced sparse COO tensor.

    There are exactly `k` coordinates, with zeros among them if fewer than `k` entries are nonzero. Of entries of equal
    magnitude, the first in row-major order are taken.

    Args:
        grad: (r, c), dense; the gradient in the basis, `G_tilde = V G Uᵀ` (or `G` itself: MeProp's rule).
        k: entries to keep.
        density: the same as a share of `r * c`, rounded down to at least one entry (paper: 0.01).

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
    """Apply the rule of the authors' code, for comparison: the k-th largest *signed* entry is a bound on magnitudes.

    It keeps `k` entries only if the k largest in value are also the k largest in magnitude. Asked for 100 of 4,800
    standard normal entries it keeps about 200, and all of them if their mean is well below zero.
    """
    threshold = torch.kthvalue(grad.reshape(-1), grad.numel() - k + 1).values
    return torch.where(grad.abs() >= threshold, grad, 0).to_sparse_coo().coalesce()


def coo_from_flat(
    positions: Int[Tensor, " k"], values: Float[Tensor, " k"], shape: tuple[int, int]
) -> Float[Tensor, "r c"]:
    """Make a coalesced COO matrix from flat row-major `positions` in ascending order."""
    columns = shape[1]
    index = torch.stack([torch.div(positions, columns, rounding_mode="floor"), positions % columns])
    return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)


def flat_from_coo(matrix: Float[Tensor, "r c"]) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Return the flat row-major positions (int64, ascending) and values of a COO matrix. Sums repeated coordinates."""
    matrix = matrix.coalesce()
    rows, columns = matrix.indices()
    return rows * matrix.shape[1] + columns, matrix.values()


def compressed_product(
    A: Float[Tensor, "b c"], B: Float[Tensor, "c d"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows d"]]:
    """Compute equation (1) of the paper: the rows of `A B` for which `A` has a nonzero, and their indices.

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
    stored = A.values() != 0  # COO may hold zeros, as from `topk_magnitude` if fewer than k entries are nonzero
    values, (entry_rows, entry_cols) = A.values()[stored], A.indices()[:, stored]
    rows, entry_rows = entry_rows.unique(return_inverse=True)
    cols, entry_cols = entry_cols.unique(return_inverse=True)
    left = values.new_zeros(rows.numel(), cols.numel())
    left[entry_rows, entry_cols] = values
    return rows, left @ B[cols]


def sparse_dense_product(A: Float[Tensor, "b c"], B: Float[Tensor, "c d"]) -> Float[Tensor, "b d"]:
    """Compute the sparse-by-dense product as COO: paper, equations (1) and (2).

    With `rows` and `cols` those of `A` that hold a nonzero,

        C = A[rows][:, cols] B[cols]          (1)
        C_coo(rows[k], l) = C(k, l)           (2)

    The work is that of a dense product of the remaining rows and columns. This pays off if whole rows are zero (padded
    or unread tokens); otherwise it is a dense product with extra copying.

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
    """Return the share (0 to 1) of the squared gradient that the largest `density` of its entries hold (figure 2)."""
    squared = grad.detach().reshape(-1).to(at_least_float32(grad.dtype)).square()
    total = squared.sum()
    if total == 0:
        return 0.0
    positions = topk_positions(squared, resolve_k(squared.numel(), density=density))
    return float(squared[positions].sum() / total)
