"""A few tokens at a time, as in decoding: the update as two thin matrices that are kept from call to call.

    x Uᵀ Sᵀ V = (x downᵀ) upᵀ        down (m, in), up (out, m), m = min(r, c)

With one token a product costs the bytes of its matrices: `U`, `S` and `V` are c·in + r·c + r·out numbers, `down` and
`up` are m·(in + out). With the default sizes that is a quarter less, and one call less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.basis import Basis

FEW = 16
"""Tokens. With more, products cost multiply-adds, and those of the factors are no more than these."""


@dataclass(frozen=True)
class Folded:
    """The two matrices, and what they were made of."""

    down: Tensor
    up: Tensor
    source: tuple[object, ...]


def few_tokens(x: Tensor, training: bool) -> bool:
    """Whether a call is one of inference on at most `FEW` tokens."""
    if training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.shape[:-1].numel() <= FEW


def folded(former: Folded | None, S: Tensor, basis: Basis, dtype: torch.dtype) -> Folded | None:
    """The two matrices, made anew where `S` or its basis is another than before, or was written to.

    A write through `.data` is none that PyTorch counts: after one, `model.eval()` drops what is kept.

    Args:
        former: those of the call before.
        S: core (r, c).
        basis: with `U` and `V`.
        dtype: of the input.

    Returns:
        None where they would be no smaller than the factors, or where `S` does not count its changes.
    """
    U, V = basis.U, basis.V
    if U is None or V is None or S.is_inference():
        return None
    (r, c), in_, out = S.shape, U.shape[1], V.shape[1]
    if min(r, c) * (in_ + out) >= c * in_ + r * c + r * out:
        return None
    source = (*((part._version, part.data_ptr()) for part in (S, U, V)), dtype)
    if former is not None and former.source == source:
        return former
    down, up = (S @ U.to(S.dtype), V.T) if r <= c else (U, V.T.to(S.dtype) @ S)
    return Folded(down.to(dtype).contiguous(), up.to(dtype).contiguous(), source)


def apply_folded(x: Tensor, weight: Tensor, bias: Tensor | None, matrices: Folded) -> Tensor:
    """`x (W + Vᵀ S U)ᵀ + b`: (..., in) -> (..., out), in the type of `x`."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y.addmm_(flat @ matrices.down.T, matrices.up.T)
    return y.view(*x.shape[:-1], len(weight))
