"""Data types to compute in, and arithmetic that neither overflows nor loses an update to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)
"""Types too coarse for a weight that is updated in place: an update below 2⁻¹² of an entry (float16), or below 2⁻⁹
(bfloat16), would be rounded away."""


PLAIN = (torch.float32, torch.float64, *HALF_PRECISION)
"""Types of weights that are not quantized."""


def autocast_kind(device: torch.device) -> str:
    """Return the device type to ask autocast about; it raises for types that it does not know, such as "meta"."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the types of the operands, whatever autocast the caller is in."""
    return torch.autocast(autocast_kind(device), enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute without autocast, and multiply float32 as float32, whether or not the caller allows TF32 or bfloat16.

    Bases are made, checked and changed in it: TF32 rounds to 2⁻¹¹, and rows in it are orthonormal to a thousandth only.
    """
    with without_autocast(device):
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8 and earlier
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        # The functions above raise once one of these settings has been made.
        settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = "none"  # as `torch.backends.fp32_precision` says
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


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
