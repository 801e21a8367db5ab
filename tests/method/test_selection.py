"""Top-k selection against the oracle and a stable sort, and the sparse-by-dense products of the paper."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegrad_peft.method import reference, selection
from sparsegrad_peft.method.selection import (
    compressed_product,
    coo_from_flat,
    energy_share,
    flat_from_coo,
    resolve_k,
    sparse_dense_product,
    topk_magnitude,
    topk_positions,
    topk_signed_threshold_as_published,
)

property_test = settings(max_examples=100, deadline=None, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function without the test run's check of its annotations, which would raise first."""
    return inspect.unwrap(function)


@st.composite
def matrices(draw: st.DrawFn, least: int = 1, most: int = 9, values: st.SearchStrategy[float] | None = None) -> Tensor:
    """Small matrices with few different magnitudes (ties, both signs, many zeros) unless `values` says otherwise."""
    r, c = draw(st.integers(least, most)), draw(st.integers(least, most))
    entry = st.integers(-3, 3).map(float) if values is None else values
    entries = draw(st.lists(entry, min_size=r * c, max_size=r * c))
    return torch.tensor(entries, dtype=torch.float64).reshape(r, c)


def of_any_size() -> st.SearchStrategy[float]:
    return st.floats(width=32, allow_nan=False, allow_infinity=True)


def of_bfloat16() -> st.SearchStrategy[float]:
    return st.floats(-1e3, 1e3, width=16)


def stable_order(magnitude: Tensor, k: int) -> Tensor:
    """Return the positions of the `k` largest by a stable sort of all entries."""
    return magnitude.sort(descending=True, stable=True).indices[:k].sort().values


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_coalesced_truthfully(matrix: Tensor) -> None:
    """Check the flag: a tensor that wrongly claims to be coalesced gives wrong sums later, in silence."""
    assert matrix.is_coalesced()
    index, values = matrix._indices(), matrix._values()
    again = torch.sparse_coo_tensor(index.clone(), values.clone(), matrix.shape, check_invariants=True)
    assert again.is_coalesced() == (index.shape[1] < 2)  # torch knows as much
    again = again.coalesce()
    assert torch.equal(again.indices(), index)
    assert torch.equal(again.values(), values)


# topk_magnitude


@property_test
@given(st.data(), matrices() | matrices(values=of_any_size()), st.sampled_from(DTYPES))
def test_topk_magnitude_agrees_with_the_oracle(data: st.DataObject, grad: Tensor, dtype: torch.dtype) -> None:
    grad = grad.to(dtype)
    k = data.draw(st.integers(1, grad.numel()))
    kept = topk_magnitude(grad, k)
    mask = reference.topk_mask(grad, k)  # ties in row-major order

    assert kept.shape == grad.shape
    assert kept.dtype == dtype
    assert kept._nnz() == k  # exactly, zeros included
    assert_coalesced_truthfully(kept)
    rows, columns = kept.indices()
    assert torch.equal(torch.zeros_like(mask).index_put((rows, columns), torch.tensor(True)), mask)
    assert torch.equal(kept.values(), grad[rows, columns])
    flat = rows * grad.shape[1] + columns
    assert bool((flat.diff() > 0).all())
    if k < grad.numel():
        assert kept.values().abs().min() >= grad[~mask].abs().max()


@pytest.mark.parametrize("k", range(1, 13))
def test_ties_are_taken_in_row_major_order(k: int) -> None:
    """If all entries are equal, or all zero, the first `k` are taken."""
    for value in (0.0, -2.0):
        kept = topk_magnitude(torch.full((3, 4), value), k)
        assert flat_from_coo(kept)[0].tolist() == list(range(k))
        assert kept.values().tolist() == [value] * k


def test_negatives_count_by_magnitude() -> None:
    kept = topk_magnitude(torch.tensor([[1.0, -5.0, 0.5], [2.0, -3.0, 4.0]]), 3)
    assert kept.indices().tolist() == [[0, 1, 1], [1, 1, 2]]
    assert kept.values().tolist() == [-5.0, -3.0, 4.0]


def test_rows_are_the_matrix_s_own_whatever_its_storage() -> None:
    """A transposed view is read row by row, not in the order of its storage."""
    grad = normal(4, 6).T
    kept = topk_magnitude(grad, 5)
    assert torch.equal(kept.to_dense(), torch.where(reference.topk_mask(grad, 5), grad, 0))


def test_the_gradient_is_left_alone() -> None:
    """The selection is no part of the autograd graph and copies what it keeps."""
    grad = normal(4, 6).requires_grad_()
    before = grad.detach().clone()
    kept = topk_magnitude(grad, 24)
    assert not kept.requires_grad
    kept._values().zero_()
    assert torch.equal(grad.detach(), before)


def test_infinite_entries_are_the_largest() -> None:
    grad = torch.tensor([[1.0, -math.inf], [math.inf, 2.0]])
    assert topk_magnitude(grad, 2).values().tolist() == [-math.inf, math.inf]
    assert topk_magnitude(grad, 3).values().tolist() == [-math.inf, math.inf, 2.0]
    assert topk_magnitude(grad, 1).indices().tolist() == [[0], [1]]


@pytest.mark.parametrize("k", [1, 5, 6])
def test_nan_is_refused(k: int) -> None:
    grad = torch.tensor([[1.0, math.nan, 3.0], [math.nan, 0.0, math.inf]])
    with pytest.raises(ValueError, match=rf"2 of the 6 gradient entries are NaN, so the largest {k} are not defined"):
        topk_magnitude(grad, k)
    with pytest.raises(ValueError, match="look for a loss that is not finite"):
        topk_positions(grad.reshape(-1), k)


def test_nan_is_refused_where_the_shortcut_would_not_see_it() -> None:
    grad = normal(200, 100)
    grad[100, 1] = math.nan  # flat 10,001, off the sample's stride
    with pytest.raises(ValueError, match=r"1 of the 20000 gradient entries are NaN"):
        topk_magnitude(grad, 1500)


@pytest.mark.parametrize(
    ("what", "shape"),
    [("vector", (4,)), ("cube", (2, 2, 2)), ("number", ())],
)
def test_only_matrices(what: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a dense matrix \(r, c\), found shape"):
        bare(topk_magnitude)(torch.ones(shape), 1)


def test_no_sparse_matrices() -> None:
    with pytest.raises(ValueError, match=r"expected a dense matrix .* with layout torch.sparse_coo"):
        topk_magnitude(topk_magnitude(normal(3, 4), 2), 1)


# How many


@pytest.mark.parametrize(
    ("k", "density", "error", "words"),
    [
        (0, None, ValueError, "k must be between 1 and the 12 entries there are, found 0"),
        (-1, None, ValueError, "k must be between 1 and the 12 entries there are, found -1"),
        (13, None, ValueError, "k must be between 1 and the 12 entries there are, found 13"),
        (True, None, TypeError, "k is a count and must be an int, found True; .* pass density"),
        (1.0, None, TypeError, r"k is a count and must be an int, found 1\.0; .* pass density"),
        (0.01, None, TypeError, r"k is a count and must be an int, found 0\.01; .* pass density"),
        (None, 0, ValueError, r"density must be above 0 and at most 1 .*, found 0"),
        (None, 0.0, ValueError, r"density must be above 0 and at most 1 .*, found 0\.0"),
        (None, -0.1, ValueError, r"density must be above 0 and at most 1 .*, found -0\.1"),
        (None, 2, ValueError, r"density must be above 0 and at most 1 .*, found 2"),
        (None, math.nan, ValueError, r"density must be above 0 and at most 1 .*, found nan"),
        (None, True, TypeError, "density is a share of the entries and must be a number, found True"),
        (None, "0.01", TypeError, "density is a share of the entries and must be a number, found '0.01'"),
        (3, 0.5, ValueError, r"expected exactly one of k .* and density .*, found k=3 and density=0\.5"),
        (None, None, ValueError, r"expected exactly one of k .* and density .*, found k=None and density=None"),
    ],
)
def test_k_and_density_are_checked(k: Any, density: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bare(resolve_k)(12, k, density)


@pytest.mark.parametrize(
    ("k", "density", "words"), [(0, None, "found 0"), (13, None, "found 13"), (1, 1.0, "one of k")]
)
def test_topk_magnitude_checks_k_and_density(k: int, density: float | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        topk_magnitude(normal(3, 4), k, density=density)


@pytest.mark.parametrize(
    ("numel", "density", "k"),
    [(12, 1, 12), (12, 1.0, 12), (12, 0.5, 6), (12, 0.6, 7), (12, 0.01, 1), (1, 0.01, 1), (4800, 0.01, 48),
     (199, 0.01, 1), (200, 0.01, 2), (2_359_296, 0.01, 23_592),
     # 0.29 * 100 is 28.999999999999996 in floats, and 0.07 * 100 is 7.000000000000001
     (100, 0.29, 29), (100, 0.57, 57), (100, 0.07, 7), (1000, 0.0019999, 1)],
)  # fmt: skip
def test_a_density_is_rounded_down_to_at_least_one(numel: int, density: float, k: int) -> None:
    assert resolve_k(numel, density=density) == k


def test_topk_magnitude_takes_a_density() -> None:
    grad = normal(30, 20)
    assert torch.equal(topk_magnitude(grad, density=0.0117).to_dense(), topk_magnitude(grad, 7).to_dense())


@pytest.mark.parametrize("how", [{"k": 1}, {"density": 0.5}])
def test_a_matrix_without_entries_has_none_to_keep(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least one entry to select from, found none"):
        topk_magnitude(torch.zeros(0, 4), **how)


# The shortcut of large matrices

N = 16_000
SAMPLED = torch.arange(N) % 61 == 0
"""The entries that the bound is guessed from (the module's stride is asserted below)."""


def large(kind: str) -> Tensor:
    base = normal(N, seed=5).abs()
    return {
        "normal": base,
        "constant": torch.full((N,), 3.0, dtype=torch.float64),
        "zero": torch.zeros(N, dtype=torch.float64),
        "ties": (base * 4).round(),
        "mostly zero": torch.where(base > 1.2, base, 0),
        "two values": (base > 1.2).double(),
        "ascending": torch.arange(N, dtype=torch.float64),
        "descending": torch.arange(N, 0, -1, dtype=torch.float64),
        "sample is largest": torch.where(SAMPLED, base + 10, base),
        "sample is smallest": torch.where(SAMPLED, 0, base + 1),
        "sample is largest, equal": torch.where(SAMPLED, 9.0, base.round()),
        "infinite": torch.where(base > 1.5, math.inf, base),
    }[kind]


KINDS = [
    "normal", "constant", "zero", "ties", "mostly zero", "two values", "ascending", "descending", "sample is largest",
    "sample is smallest", "sample is largest, equal", "infinite",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1023, 1024, 1025, 1600, N // 8, N // 8 + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_large_selections_are_exact(kind: str, k: int, dtype: torch.dtype) -> None:
    """Equal to a stable sort, position by position, whether the sampled bound is good, bad, or not tried."""
    magnitude = large(kind).to(dtype)
    expected = stable_order(magnitude, k)
    assert torch.equal(topk_positions(magnitude, k), expected)
    assert torch.equal(selection._topk_exact(magnitude, k), expected)


def test_large_selections_agree_with_the_oracle() -> None:
    for kind in ("ties", "constant", "normal"):
        signed = (large(kind) * normal(N, seed=6).sign()).reshape(160, 100)
        kept = topk_magnitude(signed, 1500)
        assert torch.equal(kept.to_dense(), torch.where(reference.topk_mask(signed, 1500), signed, 0)), kind
        assert kept._nnz() == 1500
        assert_coalesced_truthfully(kept)


@pytest.mark.parametrize(
    ("kind", "k", "used"),
    [("normal", 1023, False), ("normal", 1024, True), ("normal", N // 8, True), ("normal", N // 8 + 1, False),
     ("ties", 1024, True), ("mostly zero", 1024, True), ("descending", 1600, True),
     # A bound that too few or nearly all entries pass is not used.
     ("sample is largest", 1024, False), ("sample is smallest", 1024, False), ("constant", 1024, False)],
)  # fmt: skip
def test_the_shortcut_is_taken_where_it_helps(kind: str, k: int, used: bool) -> None:
    """Otherwise the tests above would compare one way of selecting with itself."""
    assert selection._SAMPLE_STRIDE == 61
    candidates = selection._candidates(large(kind), k)
    assert (candidates is not None) == used
    if candidates is not None:
        assert k <= candidates.numel() <= N // 2


@property_test
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(8192, 20_000),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 5, 100, 0]),
    dtype=st.sampled_from(DTYPES),
)
def test_large_selections_are_exact_for_random_sizes(
    seed: int, n: int, share: float, levels: int, dtype: torch.dtype
) -> None:
    magnitude = normal(n, seed=seed).abs()
    magnitude = (magnitude * levels).round().to(dtype) if levels else magnitude.to(dtype)
    k = 1024 + int(share * (n // 8 - 1024))
    assert torch.equal(topk_positions(magnitude, k), stable_order(magnitude, k))


# The rule of the authors' code


@pytest.mark.parametrize("seed", range(10))
def test_the_published_rule_keeps_more_than_it_is_asked_for(seed: int) -> None:
    """Asked for 100 of 4,800 it keeps about 200 of a normal gradient, and all of one below zero."""
    grad = normal(60, 80, seed=seed, dtype=torch.float32)
    kept = topk_signed_threshold_as_published(grad, 100)
    assert 140 <= kept._nnz() <= 260  # 200 and four standard deviations of 14
    assert int((kept.values() > 0).sum()) == 100
    assert topk_signed_threshold_as_published(grad - 3, 100)._nnz() == 4800
    assert topk_magnitude(grad, 100)._nnz() == topk_magnitude(grad - 3, 100)._nnz() == 100


def test_the_published_rule_keeps_twice_as_many_on_average() -> None:
    counts = [topk_signed_threshold_as_published(normal(60, 80, seed=seed), 100)._nnz() for seed in range(100)]
    assert abs(sum(counts) / len(counts) - 200) < 5  # standard error 1.4


def test_the_published_rule_entry_by_entry() -> None:
    grad = torch.tensor([[3.0, -2.0, 1.0], [-4.0, 0.5, 2.0]])
    kept = topk_signed_threshold_as_published(grad, 2)  # the second largest is 2
    assert kept.to_dense().tolist() == [[3.0, -2.0, 0.0], [-4.0, 0.0, 2.0]]
    assert_coalesced_truthfully(kept)
    positive = normal(5, 6).abs()  # where it is the rule of the paper
    same = topk_signed_threshold_as_published(positive, 4)
    assert torch.equal(same.to_dense(), topk_magnitude(positive, 4).to_dense())


# Flat positions


@property_test
@given(st.data(), matrices())
def test_flat_and_coo_are_the_same_entries(data: st.DataObject, grad: Tensor) -> None:
    chosen = data.draw(st.sets(st.integers(0, grad.numel() - 1)))
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    values = grad.reshape(-1)[positions]
    matrix = coo_from_flat(positions, values, (grad.shape[0], grad.shape[1]))
    assert matrix.shape == grad.shape
    assert_coalesced_truthfully(matrix)
    again, same = flat_from_coo(matrix)
    assert again.dtype == torch.int64
    assert torch.equal(again, positions)
    assert torch.equal(same, values)
    kept = torch.zeros(grad.numel(), dtype=torch.bool)
    kept[positions] = True
    assert torch.equal(matrix.to_dense(), torch.where(kept.reshape(grad.shape), grad, 0))


def test_flat_from_coo_sums_repeated_coordinates() -> None:
    index = torch.tensor([[1, 0, 1, 0], [2, 1, 2, 0]])
    matrix = torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 10.0, 4.0]), (2, 3), check_invariants=True)
    positions, values = flat_from_coo(matrix)
    assert positions.tolist() == [0, 1, 5]
    assert values.tolist() == [4.0, 2.0, 11.0]


# Equations (1) and (2)


@st.composite
def sparse_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A (b, c) with many zeros, some of its rows and columns all zero, and B (c, d); any size may be 0."""
    b, c, d = (draw(st.integers(0, 6)) for _ in range(3))
    A = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, -2.0, 0.5]), min_size=b * c, max_size=b * c)), dtype=torch.float64
    ).reshape(b, c)
    A[torch.tensor(draw(st.lists(st.booleans(), min_size=b, max_size=b)), dtype=torch.bool)] = 0
    A[:, torch.tensor(draw(st.lists(st.booleans(), min_size=c, max_size=c)), dtype=torch.bool)] = 0
    return A, normal(c, d, seed=draw(st.integers(0, 99)))


def as_coo(A: Tensor) -> Tensor:
    index = (A != 0).nonzero().T
    return torch.sparse_coo_tensor(index, A[index[0], index[1]], A.shape, check_invariants=True)


@property_test
@given(sparse_pairs())
def test_sparse_dense_product(pair: tuple[Tensor, Tensor]) -> None:
    A, B = pair
    product = sparse_dense_product(A, B)
    torch.testing.assert_close(product.to_dense(), A @ B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product.to_dense(), reference.sparse_dense_product(A, B), rtol=1e-12, atol=1e-12)
    assert product.dtype == torch.float64
    assert_coalesced_truthfully(product)
    rows = [i for i in range(A.shape[0]) if bool((A[i] != 0).any())]
    assert product.indices().T.tolist() == [[i, j] for i in rows for j in range(B.shape[1])]

    same = sparse_dense_product(as_coo(A), B)
    assert torch.equal(same.indices(), product.indices())
    torch.testing.assert_close(same.values(), product.values(), rtol=1e-12, atol=1e-12)
    assert_coalesced_truthfully(same)


@property_test
@given(sparse_pairs())
def test_compressed_product(pair: tuple[Tensor, Tensor]) -> None:
    """The indices of the rows with a nonzero, ascending, and those rows of the product, from dense and from COO."""
    A, B = pair
    expected = (A != 0).any(dim=1).nonzero().squeeze(1)
    for given_A in (A, as_coo(A)):
        rows, C = compressed_product(given_A, B)
        assert torch.equal(rows, expected)
        torch.testing.assert_close(C, (A @ B)[expected], rtol=1e-12, atol=1e-12)


def test_uncoalesced_input() -> None:
    """As in sums of COO gradients: coordinates in any order, some of them twice, some adding up to zero."""
    index = torch.tensor([[3, 1, 3, 1, 0, 0], [0, 2, 0, 1, 1, 1]])
    values = torch.tensor([1.0, 2.0, 10.0, 3.0, 7.0, -7.0], dtype=torch.float64)
    A = torch.sparse_coo_tensor(index, values, (5, 3), check_invariants=True)
    B = normal(3, 4)
    product = sparse_dense_product(A, B)
    torch.testing.assert_close(product.to_dense(), A.to_dense() @ B, rtol=1e-12, atol=1e-12)
    assert_coalesced_truthfully(product)
    assert product.indices()[0].unique().tolist() == [1, 3]
    assert compressed_product(A, B)[0].tolist() == [1, 3]


def test_stored_zeros_are_no_nonzeros() -> None:
    """COO may store zeros, as `topk_magnitude` does if a gradient has fewer than `k` nonzero entries."""
    grad = torch.zeros(4, 3, dtype=torch.float64)
    grad[2, 1] = 5.0
    B = normal(3, 2)
    kept = topk_magnitude(grad, 4)
    assert kept._nnz() == 4
    product = sparse_dense_product(kept, B)
    assert product.indices().tolist() == [[2, 2], [0, 1]]
    assert torch.equal(product.to_dense(), grad @ B)


def test_dense_input_in_which_only_rows_are_zero() -> None:
    """As with padded tokens: the remaining rows are multiplied by `B` itself."""
    A, B = normal(6, 4), normal(4, 3, seed=1)
    A[[0, 3]] = 0
    rows, C = compressed_product(A, B)
    assert rows.tolist() == [1, 2, 4, 5]
    assert torch.equal(C, A[rows] @ B)


@pytest.mark.parametrize(("a", "b"), [((3, 4), (5, 2)), ((4,), (4, 2)), ((3, 4), (4,))])
def test_products_of_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected A \(b, c\) and B \(c, d\), found"):
        bare(compressed_product)(torch.ones(a), torch.ones(b))


# Energy


@pytest.mark.parametrize(
    ("entries", "density", "share"),
    [
        ([[3.0, 4.0]], 0.5, 16 / 25),
        ([[3.0, -4.0]], 0.5, 16 / 25),
        ([[1.0, 1.0], [1.0, 1.0]], 0.25, 0.25),
        ([[1.0, 1.0], [1.0, 1.0]], 0.75, 0.75),
        ([[1.0, 2.0], [-2.0, 4.0]], 0.5, 20 / 25),
        ([[0.0, 0.0, 7.0, 0.0]], 0.25, 1.0),
        ([[1.0, 2.0, 2.0]], 0.01, 4 / 9),  # at least one entry
        ([[1.0, 2.0, 2.0]], 1.0, 1.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.5, 0.0),
    ],
)
def test_energy_share(entries: list[list[float]], density: float, share: float) -> None:
    assert energy_share(torch.tensor(entries), density) == pytest.approx(share, abs=1e-6)


@property_test
@given(matrices(values=of_bfloat16()), st.floats(0.01, 1))
def test_energy_share_is_that_of_the_selection(grad: Tensor, density: float) -> None:
    kept = topk_magnitude(grad, density=density).values()
    total = float(grad.square().sum())
    expected = float(kept.square().sum()) / total if total else 0.0
    assert energy_share(grad, density) == pytest.approx(expected, rel=1e-9)


def test_energy_share_refuses_nan() -> None:
    with pytest.raises(ValueError, match="are NaN"):
        energy_share(torch.tensor([[1.0, math.nan]]), 0.5)


def test_energy_share_in_float16() -> None:
    """The squares of small gradients are zero in float16."""
    grad = torch.full((4, 5), 1e-4)
    assert energy_share(grad.half(), 0.5) == pytest.approx(energy_share(grad, 0.5), rel=1e-3)
