"""The SVD of an adapter's update without forming it, and LoRA matrices from its leading terms.

    Vᵀ S U = Y (R S Tᵀ) Xᵀ = (Y P √s) (√s Qᵀ Xᵀ) = B A        R S Tᵀ = P diag(s) Qᵀ, an SVD of the size of the core

`X` and `Y` have orthonormal columns (`Uᵀ = X T` and `Vᵀ = Y R` by QR), so this is the SVD of the update. Its leading
terms are the best approximation of their rank, and the error is known exactly. (`U` and `V` themselves are orthonormal
only to the rounding of bfloat16.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.products import chain
from ..method.sides import as_matrix


@dataclass(frozen=True)
class Factors:
    """The SVD of one layer's update, strongest direction first: `B diag(s) A`."""

    B: Tensor
    "(out, R): `Vᵀ P`"
    s: Tensor
    "(R,) singular values, descending"
    A: Tensor
    "(R, in): `Qᵀ U`"
    rank: int
    "singular values that stand above the rounding of `S`"
    dtype: torch.dtype
    "of the LoRA matrices: the core's, at least float32"

    def error(self, rank: int) -> float:
        """Return `‖update - best approximation of this rank‖ / ‖update‖` (Frobenius norms)."""
        total = float(self.s.norm())
        return float(self.s[min(rank, self.rank) :].norm()) / total if total else 0.0

    def transposed(self) -> Factors:
        """Return the SVD of the transposed update."""
        return Factors(self.A.T, self.s, self.B.T, self.rank, self.dtype)

    def lora(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `B` (out, rank) and `A` (rank, in), padded with zeros if the update has fewer directions."""
        kept = min(rank, self.rank)
        root = self.s[:kept].sqrt()  # half to each side: entries of one size suit half precision
        B, A = self.B.new_zeros(len(self.B), rank), self.A.new_zeros(rank, self.A.shape[1])
        B[:, :kept], A[:kept] = self.B[:, :kept] * root, root[:, None] * self.A[:kept]
        return B.to(self.dtype), A.to(self.dtype)


def decompose(S: Tensor, U: Tensor | None, V: Tensor | None) -> Factors:
    X, T = (None, None) if U is None else torch.linalg.qr(U.double().T)  # (in, c), (c, c)
    Y, R = (None, None) if V is None else torch.linalg.qr(V.double().T)  # (out, r), (r, r)
    P, s, Q = torch.linalg.svd(chain(R, S.double(), None if T is None else T.T), full_matrices=False)
    dtype = torch.promote_types(S.dtype, torch.float32)
    # Rounding S to its type adds a matrix of random entries, whose largest singular value is below eps of S's own.
    rank = int((s > torch.finfo(dtype).eps * s[:1]).sum())
    return Factors(
        B=P[:, :rank] if Y is None else Y @ P[:, :rank],
        s=s,
        A=Q[:rank] if X is None else Q[:rank] @ X.T,
        rank=rank,
        dtype=dtype,
    )


@dataclass(frozen=True)
class ExpertFactors:
    """The SVDs of the updates of fused experts, one for each expert."""

    experts: list[Factors]

    @property
    def rank(self) -> int:
        """The largest rank of an expert's update."""
        return max(factors.rank for factors in self.experts)

    def error(self, rank: int) -> float:
        """Return the relative error of all experts together at this rank, as in `Factors.error`."""
        squares = [(float(factors.s.norm()) ** 2, factors.error(rank) ** 2) for factors in self.experts]
        total = sum(square for square, _ in squares)
        return math.sqrt(sum(square * error for square, error in squares) / total) if total else 0.0

    def lora(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `B` (out, rank · E), rank by rank, and `A` (E · rank, in), expert by expert, as PEFT has them."""
        pairs = [factors.lora(rank) for factors in self.experts]
        return torch.stack([B for B, _ in pairs], dim=2).flatten(1), torch.cat([A for _, A in pairs])


def decompose_experts(
    S: Tensor, U: Tensor | None, V: Tensor | None, size: tuple[int, int], experts: int
) -> ExpertFactors:
    """Return the SVD of each expert's update.

    Args:
        S: the scaled core (r, c) of all experts as one matrix.
        U: the input side, of directions, selected neurons or None.
        V: the output side, likewise. One of the sides belongs to the neurons of all experts.
        size: (out, in) of all experts as one matrix.
        experts: their number.
    """
    stacks_out = size[1] <= size[0]  # the neurons are the larger side, see `check_selects_neurons`
    if not stacks_out:  # the transposed problem
        S, U, V, size = S.T, V, U, size[::-1]
    neurons, hidden = size[0] // experts, size[1]
    everyone = torch.arange(size[0]) if V is None else V.long()
    directions = None if U is None else as_matrix(U, hidden, S.dtype)
    found = []
    for expert in range(experts):
        own = everyone // neurons == expert
        rows = as_matrix((everyone[own] % neurons).int(), neurons, S.dtype)  # (own, neurons)
        factors = decompose(S[own], directions, rows)
        found.append(factors if stacks_out else factors.transposed())
    return ExpertFactors(found)
