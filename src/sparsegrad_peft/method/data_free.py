"""Data-free bases: orthonormal rows without calibration.

    U[i, j] = w_j / ‖w_group‖   for the columns j of group i,   0 elsewhere

A seeded permutation deals the n columns into as many groups as there are rows, of nearly equal size, and `w` are random
numbers of random sign. No column is in two groups, so the rows are orthonormal without an orthogonalization: seconds
for the largest models, and the same numbers in every process. Such a basis holds rows/n of a gradient's energy in
expectation, as any random one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import Basis

_SEED = 0


def data_free_rows(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Return `rows` orthonormal rows of length n, always the same ones; None, the identity, if rows = n.

    Raises:
        ValueError: rows is not between 1 and n.
    """
    if not 1 <= rows <= n:
        raise ValueError(f"expected between 1 and {n} rows, found {rows}")
    if rows == n:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    columns = torch.randperm(n, generator=generator, device="cpu")
    w = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    w *= 1 - 2 * torch.randint(2, (n,), generator=generator, device="cpu")
    groups = torch.arange(n, device="cpu") % rows  # group of each of the permuted columns
    norms = torch.zeros(rows, dtype=torch.float64, device="cpu").index_add_(0, groups, w.square()).sqrt()
    matrix = torch.zeros(rows, n, dtype=dtype, device="cpu")
    matrix[groups, columns] = (w / norms[groups]).to(dtype)
    return matrix


def data_free_basis(r: int, c: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Basis:
    """Return the data-free basis of layers (out, in): `V` (r, out) and `U` (c, in)."""
    return Basis(data_free_rows(c, in_features, dtype), data_free_rows(r, out_features, dtype))


def is_data_free(matrix: Tensor | None, n: int) -> bool:
    """True if these are, to rounding, the rows that `data_free_rows` returns for length n."""
    if matrix is None:
        return True
    rows = data_free_rows(len(matrix), n, matrix.dtype) if matrix.shape[1] == n else None
    return rows is not None and torch.allclose(matrix.cpu(), rows, rtol=1e-2, atol=0)
