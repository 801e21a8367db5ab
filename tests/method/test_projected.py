"""Random projections of the sums of large models, compared with the whole sums and `reference.half_grams`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import F64
from sparsegrad_peft import PairStatistics, ProjectedStatistics, calibrate, group_linears
from sparsegrad_peft.method import reference, sum_sizes
from sparsegrad_peft.method.projected import Projections, random_vectors
from sparsegrad_peft.method.sizes import Sizes


def projected(out: int, in_: int, left: int, right: int, dtype: torch.dtype = F64) -> ProjectedStatistics:
    """Make empty projections of one layer."""
    like = torch.empty(0, dtype=dtype)
    sums = Projections(torch.zeros(2, left, in_, dtype=dtype), torch.zeros(2, out, right, dtype=dtype))
    return ProjectedStatistics(
        "g", ("a",), random_vectors(out, left, like), random_vectors(in_, right, like), {"a": sums}
    )


def low_rank(n: int, out: int, in_: int, rank: int) -> Tensor:
    """Make similar gradients (n, out, in) within `rank` directions of either side, of falling strength."""
    strength = torch.logspace(0, -0.5, rank, dtype=F64)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=F64)).Q for size in (out, in_))
    cores = torch.eye(rank, dtype=F64) + 0.02 * torch.randn(n, rank, rank, dtype=F64)
    return (left * strength) @ cores @ (right * strength).T


def halves(gradients: Tensor) -> Tensor:
    """Return the sums of every other gradient, (2, out, in)."""
    return torch.stack([gradients[::2].sum(0), gradients[1::2].sum(0)])


def test_projections_are_exact_for_a_low_rank() -> None:
    gradients = low_rank(6, 40, 30, 5)
    statistics = projected(40, 30, 12, 13)
    for G in gradients:
        statistics.add(G)
    M, sums = halves(gradients), statistics.sums["a"]
    torch.testing.assert_close(sums.left, statistics.psi.T @ M / 12**0.5)
    torch.testing.assert_close(sums.right, M @ statistics.omega / 13**0.5)
    basis = statistics.basis(c=5, r=5, dtype=F64)
    for side, gram in zip((basis.U, basis.V), reference.half_grams(gradients[None]), strict=True):
        assert side is not None
        best = torch.linalg.eigh(gram).eigenvectors[:, -5:]
        torch.testing.assert_close(side.T @ side, best @ best.T, rtol=0, atol=1e-9)  # the same space


@pytest.mark.parametrize(("decay", "held"), [(1.5, 0.75), (6, 0.95)])
def test_nearly_the_best_directions_and_neurons_of_a_long_spectrum(decay: float, held: float) -> None:
    torch.manual_seed(0)
    M = torch.randn(300, 200, dtype=F64) * torch.logspace(0, -decay, 200, dtype=F64)
    M *= torch.logspace(0, -1, 300, dtype=F64)[torch.randperm(300), None]
    statistics = projected(300, 200, 2 * 20 + 16, 64)
    statistics.add(M)
    basis = statistics.basis(c=20, r=40, selected=(True, False), dtype=F64)
    assert basis.U is not None
    assert basis.V is not None
    best = torch.linalg.svdvals(M)[:20].square().sum()
    assert held < float((M @ basis.U.T).square().sum() / best) <= 1
    energies = M.square().sum(1)
    assert float(energies[basis.V.long()].sum() / energies.topk(40).values.sum()) > 0.97


class Block(nn.Module):
    """An up- and a down-projection."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.down(torch.tanh(self.up(x))).square().mean()
        return loss


def calibrated(model: nn.Module, sizes: Sizes | None, batches: list[Tensor]) -> Any:
    return calibrate(
        model, batches, groups=group_linears(model, shared=False), sizes=sizes, loss_fn=lambda model, x: model(x),
        n_steps=len(batches), mean_gradient=True, progress=False,
    )  # fmt: skip


def test_calibration_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections are those of the whole gradients. Layers of a size use the same random vectors."""
    torch.manual_seed(0)
    model, batches = Block(200, 400), [torch.randn(7, 200) for _ in range(2)]
    sizes = Sizes(narrow=10, wide=30, neurons=True)
    whole = calibrated(model, sizes, batches)
    gradients = [calibrated(model, None, batches[:1]), calibrated(model, None, batches[1:])]
    monkeypatch.setattr(sum_sizes, "_MOST_NUMBERS", 1000)
    small = calibrated(model, sizes, batches)
    vectors = set()
    for name, statistics in small.groups.items():
        assert isinstance(whole.groups[name], PairStatistics)
        assert isinstance(statistics, ProjectedStatistics)
        M = torch.stack([one.groups[name].M[name] for one in gradients])
        expected = statistics.psi.T @ M / statistics.psi.shape[1] ** 0.5
        torch.testing.assert_close(
            statistics.sums[name].left, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
        vectors |= {id(statistics.psi), id(statistics.omega)}
    assert len(vectors) == 2  # (200, 32) and (400, 28), for the up and the down projections
    found = small.bases(sizes=sizes)
    assert {tuple(len(side) for side in (basis.U, basis.V)) for basis in found.values()} == {(10, 30), (30, 10)}
    with pytest.raises(ValueError, match=r"group 'up'.*input side: 80 rows .*leading 56.*sizes=None"):
        small.bases(sizes=Sizes(narrow=80, wide=30, neurons=True))


def test_under_a_callers_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_sizes, "_MOST_NUMBERS", 1000)
    sizes = Sizes(10, 15)
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrated(Block(200, 400), sizes, [torch.randn(7, 200)])
        for basis in found.bases(sizes=sizes).values():
            assert all(bool(side.isfinite().all()) for side in basis.buffers())
    for name, statistics in found.groups.items():
        assert isinstance(statistics, ProjectedStatistics)
        assert statistics.sums[name].left.dtype == statistics.sums[name].right.dtype == torch.float32
