"""What gradients of different steps have in common: as the formulas say, and where the eigensolver struggles."""

from __future__ import annotations

import pytest
import torch

from helpers import F64
from sparsegrad_peft.method.common_energy import eigenbasis_of_halves, eigenbasis_of_pairs
from sparsegrad_peft.method.hosvd import eigenbasis


@pytest.mark.parametrize("steps", [(4, 4), (5, 4)])
def test_common_share_of_halves(steps: tuple[int, int]) -> None:
    """From whole sums of both halves: the product of their means, beside their difference."""
    gradients = torch.randn(sum(steps), 7, 5, dtype=F64) + 2 * torch.randn(7, 5, dtype=F64)
    M = torch.stack([gradients[::2].sum(0), gradients[1::2].sum(0)])
    found = eigenbasis_of_halves([M], steps, 3)
    assert found.common is not None
    for u, share in zip(found.vectors, found.common, strict=True):
        first, second = M[0] @ u / steps[0], M[1] @ u / steps[1]
        noise = (first - second).square().sum() / (1 / steps[0] + 1 / steps[1])
        expected = max(float(first @ second), 0) / (max(float(first @ second), 0) + float(noise))
        assert float(share) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("of", ["single gradients", "pairs", "halves"])
def test_features_without_a_gradient(of: str) -> None:
    """Dead neurons give many eigenvalues of 0, for which LAPACK's solver does not converge in float32."""
    torch.manual_seed(0)
    G = torch.zeros(2, 256, 85)
    living = torch.randperm(256)[:42]
    G[:, living] = torch.randn(2, 42, 85)
    M, gram = G.sum(0), G[0] @ G[0].T + G[1] @ G[1].T
    if of == "single gradients":
        found = eigenbasis(gram)
    elif of == "pairs":
        found = eigenbasis_of_pairs([M.T], gram, 2)
    else:
        found = eigenbasis_of_halves([G.mT], (1, 1), 42)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(len(found.vectors)), rtol=0, atol=1e-4)
    assert float(found.vectors[:20, living].square().sum()) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("of", ["pairs", "halves"])
def test_directions_without_gradients_share_nothing(of: str) -> None:
    """Rounding divided by rounding would be a share of up to 1, and so the largest scale."""
    torch.manual_seed(0)
    plane = torch.randn(3, 12)
    gradients = torch.randn(12, 7, 3) @ plane + torch.randn(7, 3) @ plane
    if of == "pairs":
        found = eigenbasis_of_pairs([gradients.sum(0)], sum(G.T @ G for G in gradients), 12, 8)
    else:
        found = eigenbasis_of_halves([torch.stack([gradients[::2].sum(0), gradients[1::2].sum(0)])], (6, 6), 8)
    assert found.common is not None
    energies = (gradients @ found.vectors.T).square().sum((0, 1))
    known = energies > 1e-9 * energies.sum()
    assert known.sum() == 3
    assert not bool(found.common[~known].any())
    assert bool(found.common.any())
