"""Gradient statistics of a group: what `add` sums, and the bases made from the sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import F64
from sparsegrad_peft import GramStatistics
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.basis import ORTHOGONALITY_TOLERANCE


def empty(out: int, in_: int, dtype: torch.dtype = F64) -> GramStatistics:
    return GramStatistics("g", ("a",), torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype))


@pytest.mark.parametrize(
    ("scale", "tolerance"),
    [(1e-25, 1e-5), (1e-20, 1e-5), (1e-12, 1e-5), (1.0, 1e-5), (1e12, 1e-5), (1e18, 1e-5), (1e37, 1e-5)],
)
def test_normalized_gradients_count_alike_whatever_their_size(scale: float, tolerance: float) -> None:
    """In float32 the squares of the smallest and largest of these gradients underflow or overflow."""
    gradients = torch.randn(3, 4, 6, dtype=F64)
    gram = empty(4, 6, torch.float32)
    for G in gradients:
        gram.add(G.float() * scale, normalize=True)
    expected_in, expected_out = reference.grams(gradients, normalize=True)
    torch.testing.assert_close(gram.gram_in.double(), expected_in, rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(gram.gram_out.double(), expected_out, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_gradient_that_is_not_finite_is_not_swallowed(normalize: bool) -> None:
    """Statistics may be filled by hand. The decomposition then reports the entries."""
    gram, G = empty(4, 6), torch.randn(4, 6, dtype=F64)
    gram.add(G, normalize=normalize)
    G[1, 2] = float("nan")
    gram.add(G, normalize=normalize)
    with pytest.raises(ValueError, match="entries that are not finite"):
        gram.basis()


def test_half_precision_gradients_are_summed_in_float32() -> None:
    """10000 squared overflows float16."""
    gram = empty(2, 3, torch.float32)
    gram.add(torch.full((2, 3), 1e4, dtype=torch.float16))
    torch.testing.assert_close(gram.gram_in, torch.full((3, 3), 2e8))


def statistics(out: int = 6, in_: int = 9, dtype: torch.dtype = torch.float32, layers: int = 2) -> GramStatistics:
    names = tuple(f"layer.{i}" for i in range(layers))
    gram = GramStatistics("mlp", names, torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype))
    for G in torch.randn(12, out, in_, dtype=F64):
        gram.add(G)
    return gram


@pytest.mark.parametrize("sums", [torch.float32, F64])
@pytest.mark.parametrize("dtype", list(ORTHOGONALITY_TOLERANCE))
def test_type_of_the_bases(sums: torch.dtype, dtype: torch.dtype) -> None:
    """Bases of any type from sums of either type, also float64 bases from the default float32 sums."""
    gram = statistics(60, 90, sums)
    basis = gram.basis(c=40, r=40, dtype=dtype)
    expected = gram.basis(c=40, r=40, dtype=sums)
    for name in ("U", "V"):
        found = getattr(basis, name)
        assert found.dtype == dtype
        assert float((found.double() - getattr(expected, name).double()).abs().max()) < 1e-2
        if dtype == F64:
            assert float((found @ found.T - torch.eye(40)).abs().max()) < 1e-13
            assert float((found - getattr(expected, name)).abs().max()) < 1e-5
    assert basis.spectrum_in.dtype == basis.spectrum_out.dtype == sums


def test_sizes_and_spectra_of_both_sides() -> None:
    basis = statistics().basis(c=5, r="full")
    assert basis.U.shape == (5, 9)
    assert basis.V.shape == (6, 6)
    assert basis.spectrum_in.shape == (9,)
    assert basis.spectrum_out.shape == (6,)
    assert float(basis.spectrum_in.sum()) == pytest.approx(float(basis.spectrum_out.sum()), rel=1e-5)  # one energy
    assert bool((basis.spectrum_in.diff() <= 0).all())
    assert basis.layers == ("layer.0", "layer.1")


def test_sizes_out_of_range_name_group_and_side() -> None:
    with pytest.raises(ValueError, match=r"c, group 'mlp' \(layer\.0, layer\.1\): expected .*from 1 to 9, .*found 10"):
        statistics().basis(c=10)
    with pytest.raises(ValueError, match=r"r, group 'mlp' \(layer\.0\): expected .*from 1 to 6, .*found 'half'"):
        statistics(layers=1).basis(r="half")
    with pytest.raises(TypeError, match=r"c, group 'mlp' \(layer\.0, layer\.1, layer\.2 and 9 more\): .*found True"):
        statistics(layers=12).basis(c=True)


def sums_of(gradients: Tensor, dtype: torch.dtype = F64, name: str = "mlp") -> GramStatistics:
    _, out, in_ = gradients.shape
    gram_in, gram_out = torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype)
    gram = GramStatistics(name, ("layer.0", "layer.1"), gram_in, gram_out)
    for G in gradients:
        gram.add(G)
    return gram


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_completed_orthogonally_with_a_warning(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    gradients = torch.stack([torch.outer(torch.randn(4, dtype=F64), torch.randn(6, dtype=F64)) for _ in range(2)])
    basis = sums_of(gradients, dtype, "encoder.*.fc1").basis(dtype=dtype)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "group 'encoder.*.fc1' (layer.0, layer.1), input side" in caplog.messages[0]
    assert "in only 2 of the 6 directions asked for (also in 1 other side). The other rows" in caplog.messages[0]
    for side in (basis.U, basis.V):
        torch.testing.assert_close(side @ side.T, torch.eye(len(side), dtype=dtype), rtol=0, atol=1e-5)
    inside = gradients.to(dtype) @ basis.U[:2].T @ basis.U[:2]
    torch.testing.assert_close(inside, gradients.to(dtype), rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-8)


def test_no_warning_where_the_rows_asked_for_are_there(caplog: pytest.LogCaptureFixture) -> None:
    gradients = torch.stack([torch.outer(torch.randn(4, dtype=F64), torch.randn(6, dtype=F64)) for _ in range(2)])
    sums_of(gradients).basis(c=2, r=2)
    sums_of(gradients).basis(c="energy:0.99", r=1)
    sums_of(torch.randn(9, 4, 6, dtype=F64)).basis()
    assert not caplog.records
    sums_of(gradients).basis(c=3, r=2)
    assert len(caplog.records) == 1
