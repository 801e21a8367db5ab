"""Step 2, the other way: bases of what the gradients of different steps have in common (not in the paper).

`pairs.py` and `projected.py` say which sums this takes and why. As in `hosvd.py`, a side is rotated to the leading
eigenvectors, or its strongest features are selected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from .hosvd import (
    Eigenbasis,
    StrongestFeatures,
    check_energy,
    count_by_energy,
    eigenbasis,
    eigh,
    fix_signs,
    strongest_features,
)
from .precision import without_autocast
from .sizes import Rows, check_rows, row_count


def eigenbasis_of_pairs(
    factors: Sequence[Float[Tensor, "_ n"]],
    own: Float[Tensor, "n n"],
    steps: float,
    rows: Rows = "full",
    *,
    name: str = "the products of pairs",
) -> Eigenbasis:
    """Return the eigenvectors of `A = Σ FᵀF - own` over factors, with the largest eigenvalues first.

    Each factor is the sum of `steps` gradients, and `own` the sum of their Gram matrices. `A` is symmetric and may have
    negative eigenvalues. They count as an energy of 0. If all are within rounding errors, as for a single
    gradient, `Σ FᵀF` takes the place of `A`.

    Raises:
        ValueError: the factors or `own` are not finite, or the factors are zero; `rows` is out of range.
    """
    n = len(own)
    check_rows(rows, n, name)
    with without_autocast(own.device):
        total = torch.zeros_like(own)
        for F in factors:
            total.addmm_(F.T, F)
    check_energy(total, float(total.diagonal().sum()), name)
    check_energy(own, float(own.diagonal().sum()), name)
    rounding = math.sqrt(n) * torch.finfo(own.dtype).eps * float(own.diagonal().sum())
    values, columns = eigh(total - own)  # ascending
    if steps <= 1 or float(values[-1]) <= rounding:
        return eigenbasis(total, rows, name=name)
    found = _of_eigenpairs(values, columns, rows, rounding)
    with without_autocast(own.device):
        energies = (found.vectors @ own * found.vectors).sum(1)
    return replace(found, common=_common(found.spectrum[: len(found.vectors)] / (steps - 1), energies))


def eigenbasis_of_halves(
    factors: Sequence[Float[Tensor, "2 _ n"]], steps: tuple[int, int], rows: int, *, name: str = "the sums"
) -> Eigenbasis:
    """Return the eigenvectors of `A = Σ (F₁ᵀF₂ + F₂ᵀF₁) / 2` over pairs of factors, with the largest eigenvalues first.

    `A` is symmetric and may have negative eigenvalues, in directions where the two factors disagree. They count as an
    energy of 0. If all are within rounding errors, `F₁ + F₂` takes the place of both factors. No (n, n) matrix is made.

    Args:
        factors: (2, m, n) for each layer.
        steps: number of gradients in `F₁` and in `F₂`.
        rows: how many rows to keep.
        name: of the sums in messages.

    Raises:
        ValueError: the factors are not finite or zero; `rows` is out of range.
    """
    check_rows(rows, factors[0].shape[2], name)
    for pair in factors:
        check_energy(pair, float(pair.square().sum()), name)
    with without_autocast(factors[0].device):
        halves = [torch.cat([pair[half] for pair in factors]).double() for half in (0, 1)]
        Q, R = torch.linalg.qr(torch.cat(halves).T)
        first, second = R.chunk(2, dim=1)
        product = first @ second.T
        values, mixing = eigh((product + product.T) / 2)
        columns = (Q @ mixing).to(factors[0].dtype)
    rounding = torch.finfo(values.dtype).eps * float(R.square().sum())
    if float(values[-1]) <= rounding:
        whole = eigenbasis_of_halves([pair.sum(0).expand(2, -1, -1) for pair in factors], steps, rows, name=name)
        return replace(whole, common=None)
    found = _of_eigenpairs(values.to(factors[0].dtype), columns, rows, rounding)
    with without_autocast(factors[0].device):
        along = [pair @ found.vectors.T for pair in factors]  # (2, m, rows)
    return replace(found, common=_common_of_halves(along, steps))


def strongest_features_of_pairs(
    factors: Sequence[Float[Tensor, "_ n"]], own: Float[Tensor, " n"], steps: float, rows: Rows, *,
    name: str = "the side",
) -> StrongestFeatures:  # fmt: skip
    """Return the features with the largest entries on the diagonal of `A`, see `eigenbasis_of_pairs`.

    `own` is the diagonal of the matrix to subtract.
    """
    total = torch.stack([F.square().sum(0) for F in factors]).sum(0)
    check_energy(total, float(total.sum()), name)
    check_energy(own, float(own.sum()), name)
    energies = total - own
    if steps <= 1 or float(energies.max()) <= math.sqrt(len(own)) * torch.finfo(own.dtype).eps * float(own.max()):
        return strongest_features(total, rows, name=name)
    found = strongest_features(energies.clamp_min(0), rows, name=name)
    return replace(found, common=_common(found.energies / (steps - 1), own[found.features.long()]))


def strongest_features_of_halves(
    factors: Sequence[Float[Tensor, "2 _ n"]], steps: tuple[int, int], rows: Rows, *, name: str = "the side"
) -> StrongestFeatures:
    """Return the features with the largest entries on the diagonal of `A`, see `eigenbasis_of_halves`."""
    for pair in factors:
        check_energy(pair, float(pair.square().sum()), name)
    energies = torch.stack([(pair[0] * pair[1]).sum(0) for pair in factors]).sum(0)
    if energies.max() <= 0:
        return strongest_features(
            torch.stack([pair.sum(0).square().sum(0) for pair in factors]).sum(0), rows, name=name
        )  # fmt: skip
    found = strongest_features(energies.clamp_min(0), rows, name=name)
    kept = found.features.long()
    return replace(found, common=_common_of_halves([pair[:, :, kept] for pair in factors], steps))


def _of_eigenpairs(
    values: Float[Tensor, " m"], columns: Float[Tensor, "n m"], rows: Rows, rounding: float
) -> Eigenbasis:
    """Return the leading eigenvectors of a matrix that may have negative eigenvalues, given in ascending order.

    Those up to `rounding` count as 0: nothing is known about their directions.
    """
    spectrum = values.flip(0)
    spectrum = torch.where(spectrum > rounding, spectrum, 0)
    rank = int((values.abs() > math.sqrt(len(columns)) * torch.finfo(values.dtype).eps * values[-1]).sum())
    count = row_count(rows, len(columns)) or count_by_energy(spectrum, str(rows))
    vectors = columns[:, -count:].flip(1).T.contiguous()
    return Eigenbasis(fix_signs(vectors), spectrum, float(spectrum.sum()), rank)


def _common(pairs: Float[Tensor, " k"], own: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the share of the energies `own` that is in products of different steps."""
    return (pairs / own.clamp_min(torch.finfo(own.dtype).tiny)).clamp(0, 1)


def _common_of_halves(along: Sequence[Float[Tensor, "2 _ k"]], steps: tuple[int, int]) -> Float[Tensor, " k"] | None:
    """Return the same from the sums of both halves along k directions; None if one half is empty.

    What the steps have in common is in the product of the means of both halves. It cancels in their difference, which
    holds the noise.
    """
    first, second = steps
    if not second:
        return None
    means = [(pair[0] / first, pair[1] / second) for pair in along]
    common = torch.stack([(one * other).sum(0) for one, other in means]).sum(0).clamp_min(0)
    energy = torch.stack([one.square() + other.square() for one, other in means]).sum((0, 1))
    # A direction without gradients has only rounding of the others, which would look like a share of its own.
    rounding = len(energy) * torch.finfo(energy.dtype).eps ** 2 * energy.sum()
    common = torch.where(energy > rounding, common, 0)
    noise = torch.stack([(one - other).square().sum(0) for one, other in means]).sum(0)
    return _common(common, common + noise * first * second / (first + second))
