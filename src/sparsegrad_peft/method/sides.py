"""Sides of a basis: take coordinates of one side of a layer, and put them back.

A side of `n` features with `k` rows is one of three kinds:

    rotated    (k, n) floating point, orthonormal rows     take: x sideᵀ            put: z side
    selected   (k,) int32, distinct features               take: x[..., side]       put: zeros, then [..., side] = z
    identity   None, k = n                                 take: x                  put: z

A selected side is the matrix of `k` rows of the identity, held as its `k` indices. Both directions copy numbers and
multiply nothing. It suits the wide side of an MLP, whose features are neurons: calibration selects those on which the
gradients of different steps agree most, or those that hold the most gradient energy.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

Side = Tensor | None

Scales = tuple[Tensor | None, Tensor | None]
"""Scales of a core's rows (r,) and columns (c,); None is 1."""


def is_selected(side: Side) -> TypeGuard[Tensor]:
    """True for a side that is a vector of feature indices."""
    return side is not None and not side.is_floating_point()


def kept_count(side: Side, features: int) -> int:
    """`k`, the number of coordinates that the side keeps of `features`."""
    return features if side is None else len(side)


def cast(side: Side, dtype: torch.dtype) -> Side:
    """The side in the type to compute in; indices stay integers."""
    return side if side is None or is_selected(side) else side.to(dtype)


def take(x: Tensor, side: Side) -> Tensor:
    """Coordinates along the last dimension: (..., n) -> (..., k)."""
    if side is None:
        return x
    return x.index_select(-1, side) if is_selected(side) else x @ side.T


def put(z: Tensor, side: Side, features: int) -> Tensor:
    """From coordinates back to features, the transpose of `take`: (..., k) -> (..., n)."""
    if side is None:
        return z
    if is_selected(side):
        return z.new_zeros(*z.shape[:-1], features).index_copy_(-1, side.long(), z)
    return z @ side


def scaled(S: Tensor, scales: Scales) -> Tensor:
    """Return `S` (r, c) with its rows and columns scaled."""
    scale_out, scale_in = scales
    S = S if scale_out is None else S * scale_out.to(S.dtype)[:, None]
    return S if scale_in is None else S * scale_in.to(S.dtype)


def as_matrix(side: Side, features: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The side as a matrix (k, n), for code that is not time-critical: export, combination, refresh."""
    if side is None:
        return torch.eye(features, dtype=dtype, device=device)
    if is_selected(side):
        rows = torch.zeros(len(side), features, dtype=dtype, device=side.device)
        return rows.scatter_(1, side.long()[:, None], 1.0)
    return side.to(dtype)


def check_selected(side: Tensor, features: int | None, name: str) -> None:
    """Raise unless `side` holds distinct indices of `features` features (None: their number is unknown).

    Raises:
        TypeError: not a vector of int32.
        ValueError: empty, out of range, or an index that stands twice.
    """
    if side.dim() != 1 or side.dtype != torch.int32:
        raise TypeError(f"{name}: expected a vector of int32 indices, found {side.dtype} of shape {tuple(side.shape)}")
    distinct = side.unique()
    end = "the number of features" if features is None else str(features)
    below = features is None or (len(distinct) > 0 and int(distinct[-1]) < features)
    if not len(distinct) or int(distinct[0]) < 0 or not below or len(distinct) < len(side):
        found = f"from {int(side.min())} to {int(side.max())}" if len(side) else "none"
        raise ValueError(
            f"{name}: expected distinct feature indices from 0 to below {end}; found {len(side)} "
            f"({len(distinct)} distinct), {found}"
        )
