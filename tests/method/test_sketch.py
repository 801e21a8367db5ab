"""Leading directions from a sketch, compared with those of the whole Gram matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import F64
from sparsegrad_peft import GramStatistics, calibrate, group_linears
from sparsegrad_peft.method.calibrate import Calibration
from sparsegrad_peft.method.hosvd import eigenbasis
from sparsegrad_peft.method.sizes import Rows, Sizes
from sparsegrad_peft.method.sketch import eigenbasis_of_sketch, random_vectors, sketch_width


def gradients(n: int, out: int, in_: int, rank: int, dtype: torch.dtype = F64) -> Tensor:
    """Make gradients (n, out, in) within `rank` directions of either side, of falling strength."""
    strength = torch.logspace(0, -1.5, rank, dtype=F64)
    left = torch.linalg.qr(torch.randn(out, rank, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(in_, rank, dtype=F64)).Q
    cores = torch.randn(n, rank, rank, dtype=F64) * strength[:, None] * strength
    return (left @ cores @ right.T).to(dtype)


def sketched(stack: Tensor, width_in: int, width_out: int) -> GramStatistics:
    _, out, in_ = stack.shape
    gram_in, gram_out = stack.new_zeros(in_, width_in), stack.new_zeros(out, width_out)
    probes = {
        "probe_in": random_vectors(in_, width_in, gram_in),
        "probe_out": random_vectors(out, width_out, gram_out),
    }
    gram = GramStatistics("mlp", ("layer.0",), gram_in, gram_out, **probes)
    for G in stack:
        gram.add(G)
    return gram


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 2e-3)])
def test_exact_where_it_is_wide_enough(dtype: torch.dtype, tolerance: float) -> None:
    stack = gradients(5, 40, 30, 6, dtype)
    gram = sketched(stack, 10, 12)
    for product, probe, whole in (
        (gram.gram_in, gram.probe_in, sum(G.T @ G for G in stack.double())),
        (gram.gram_out, gram.probe_out, sum(G @ G.T for G in stack.double())),
    ):
        assert isinstance(whole, Tensor)
        assert probe is not None
        found = eigenbasis_of_sketch(product, probe, 4, gram.energy, name="g")
        expected = eigenbasis(whole, 4)
        torch.testing.assert_close(found.vectors.double(), expected.vectors, rtol=0, atol=tolerance)
        torch.testing.assert_close(found.spectrum[:6].double(), expected.spectrum[:6], rtol=tolerance, atol=1e-9)
        assert found.energy == pytest.approx(float(whole.trace()), rel=1e-6)
        assert found.rank == 6
        assert found.captured == pytest.approx(expected.captured, rel=1e-4)


def test_nearly_the_best_directions_where_it_is_not() -> None:
    """A sketch twice as wide as the rows asked for, of a spectrum with a long tail."""
    stack = torch.randn(40, 200, 40, dtype=F64) * torch.logspace(0, -1.5, 200, dtype=F64)[:, None]
    gram = sketched(stack, 40, 2 * 20 + 16)
    assert gram.probe_out is not None
    whole = torch.einsum("noi,npi->op", stack, stack)
    V = eigenbasis_of_sketch(gram.gram_out, gram.probe_out, 20, gram.energy, name="g").vectors
    best = eigenbasis(whole, 20)
    assert 0.95 < float((V @ whole * V).sum() / best.energy) / best.captured <= 1
    torch.testing.assert_close(V @ V.T, torch.eye(20, dtype=F64), rtol=0, atol=1e-12)


def test_more_rows_than_there_are_directions_complete_the_basis() -> None:
    gram = sketched(gradients(2, 40, 30, 3), 20, 20)
    assert gram.probe_in is not None
    found = eigenbasis_of_sketch(gram.gram_in, gram.probe_in, 9, gram.energy, name="g")
    assert found.rank == 3
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(9, dtype=F64), rtol=0, atol=1e-12)


def test_directions_below_rounding_are_not_counted() -> None:
    """Of a gradient `diag(1, s)`, the second direction has `s²` of the energy. For n = 1,024, √n eps is 7e-15."""
    n = 1024
    for energy, rank in ((5e-14, 2), (1e-15, 1)):
        gram = sketched(torch.zeros(1, n, n, dtype=F64), 6, 6)
        G = torch.zeros(n, n, dtype=F64)
        G[0, 0], G[1, 1] = 1, energy**0.5
        gram.add(G)
        for product, probe in ((gram.gram_in, gram.probe_in), (gram.gram_out, gram.probe_out)):
            assert probe is not None
            found = eigenbasis_of_sketch(product, probe, 2, gram.energy, name="g")
            assert found.rank == rank
            assert float(found.vectors[0, 0]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "n", "expected"),
    [(0.03, 3072, 2 * 96 + 16), (45, 1536, 106), (45, 511, None), (0.33, 3072, None), ("energy:0.9", 3072, None),
     ("full", 3072, None)],
)  # fmt: skip
def test_only_where_it_saves_half(rows: Rows, n: int, expected: int | None) -> None:
    assert sketch_width(rows, n) == expected


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 1040), nn.Linear(1040, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def blocks() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Sequential(Block(), Block())
    batches = [torch.randn(64, 24) for _ in range(3)]
    return model, {"batches": batches, "loss_fn": lambda m, x: m(x).square().mean(), "n_steps": 3, "progress": False}


@pytest.mark.parametrize("shared", [True, False])
def test_calibration_of_a_large_side(shared: bool) -> None:
    model, options = blocks()
    groups = group_linears(model, shared=shared)
    sizes = Sizes(narrow=16, wide=20)
    whole = calibrate(model, groups=groups, **options)
    small = calibrate(model, groups=groups, sizes=sizes, **options)
    probes = set()
    for name, gram in small.groups.items():
        wide_is_in = len(gram.gram_in) == 1040
        product, probe = (gram.gram_in, gram.probe_in) if wide_is_in else (gram.gram_out, gram.probe_out)
        other, no_probe = (gram.gram_out, gram.probe_out) if wide_is_in else (gram.gram_in, gram.probe_in)
        exact = whole.groups[name].gram_in if wide_is_in else whole.groups[name].gram_out
        assert probe is not None
        assert no_probe is None
        assert product.shape == (1040, 56)
        assert other.shape == (24, 24)
        probes.add(id(probe))
        torch.testing.assert_close(product, exact @ probe, rtol=1e-3, atol=1e-4 * float(product.abs().max()))
        assert gram.energy == pytest.approx(float(exact.trace()), rel=1e-4)
        found, best = small.bases(sizes=sizes)[name], whole.bases(sizes=sizes)[name]
        matrix, optimum = (found.U, best.U) if wide_is_in else (found.V, best.V)
        assert matrix is not None
        assert optimum is not None
        held = float((matrix @ exact * matrix).sum() / (optimum @ exact * optimum).sum())
        assert 0.97 < held < 1.0001  # gradients of 64 rows have few directions
    assert len(probes) == 1  # one matrix of random vectors for all sides of a size


def test_under_a_callers_autocast() -> None:
    """The model computes in the type of autocast; the sums are float32."""
    model, options = blocks()
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model, sizes=Sizes(narrow=16, wide=20), **options)
    for gram in found.groups.values():
        assert gram.gram_in.dtype == gram.gram_out.dtype == torch.float32
        assert all(len(side) for side in found.bases(sizes=Sizes(narrow=16, wide=20))[gram.name].buffers())


def test_larger_bases_than_it_was_made_for_are_refused() -> None:
    model, options = blocks()
    small = calibrate(model, sizes=Sizes(narrow=16, wide=20), **options)
    small.bases(sizes=Sizes(narrow=24, wide=12))
    with pytest.raises(ValueError, match=r"group '\*\.up'.*output side: 60 rows .*leading 56.*sizes=None"):
        small.bases(sizes=Sizes(narrow=16, wide=60))
    with pytest.raises(ValueError, match="'full' rows were asked for"):
        small.bases()


@pytest.mark.parametrize(("value", "message"), [(0.0, "no gradient reached"), (float("nan"), "not finite")])
def test_nothing_to_choose_from(value: float, message: str) -> None:
    gram = sketched(torch.full((1, 6, 5), value, dtype=F64), 3, 3)
    with pytest.raises(ValueError, match=rf"group 'mlp' \(layer\.0\), input side.*{message}"):
        Calibration({"mlp": gram}).bases(c=1, r=1)
