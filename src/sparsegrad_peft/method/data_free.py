"""Data-free bases: orthonormal rows without calibration.

    U[i, j] = w_j / ‖w_group‖   for the columns j of group i,   0 elsewhere

A seeded permutation deals the n columns into as many groups as there are rows, of nearly equal size, and `w` are random
numbers of random sign. No column is in two groups, so the rows are orthonormal without an orthogonalization: seconds
for the largest models, and the same numbers in every process. A side that selects features takes a seeded sample of
them. Either kind holds rows/n of a gradient's energy in expectation, as any random choice does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import Basis
from .sides import is_selected

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


def data_free_features(count: int, n: int) -> Tensor | None:
    """Return `count` of n features, ascending, always the same ones; None, the identity, if count = n."""
    if count == n:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(n, generator=generator, device="cpu")[:count].sort().values.int()


def data_free_basis(
    r: int,
    c: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    selected: tuple[bool, bool] = (False, False),
) -> Basis:
    """Return the data-free basis of layers (out, in), with `r` rows of `V` and `c` rows of `U`.

    `selected` is True for a side (output, input) that selects features.
    """
    V = data_free_features(r, out_features) if selected[0] else data_free_rows(r, out_features, dtype)
    U = data_free_features(c, in_features) if selected[1] else data_free_rows(c, in_features, dtype)
    return Basis(U, V, in_features=in_features, out_features=out_features)


def is_data_free(matrix: Tensor | None, n: int) -> bool:
    """True if this is, up to rounding, the side that `data_free_basis` has for n features."""
    if matrix is None:
        return True
    if is_selected(matrix):
        features = data_free_features(len(matrix), n) if len(matrix) <= n else None
        return features is not None and torch.equal(matrix.cpu(), features)
    rows = data_free_rows(len(matrix), n, matrix.dtype) if matrix.shape[1] == n else None
    return rows is not None and torch.allclose(matrix.cpu(), rows, rtol=1e-2, atol=0)
