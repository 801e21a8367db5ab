"""Data types to compute in, and arithmetic that neither overflows nor loses an update to rounding."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)
"""Types too coarse for a weight that is updated in place: an update below 2⁻⁹ of an entry would be rounded away."""


PLAIN = (torch.float32, torch.float64, *HALF_PRECISION)
"""Types of weights that are not quantized."""


def autocast_kind(device: torch.device) -> str:
    """Return the device type to ask autocast about; it raises for types that it does not know, such as "meta"."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the types of the operands, whatever autocast the caller is in."""
    return torch.autocast(autocast_kind(device), enabled=False)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type that a linear layer computes in: autocast's, or the weight's if it is off or `x` is float64."""
    kind = autocast_kind(x.device)
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for any narrower type."""
    return torch.promote_types(dtype, torch.float32)


def unit_norm_(matrix: Tensor) -> Tensor:
    """Scale in place to Frobenius norm 1. Zeros stay zeros, NaN and infinity become NaN.

    The largest entry is divided out first, so the squares in the norm neither overflow nor underflow.
    """
    for order in (torch.inf, 2):
        norm = torch.linalg.vector_norm(matrix, order)
        matrix.div_(torch.where(norm == 0, 1, norm))
    return matrix
