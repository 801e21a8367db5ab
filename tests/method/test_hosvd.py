"""Eigenvectors of Gram matrices equal the singular vectors of the unfolded gradients (the oracle's and tensorly's)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from tensorly import unfold
from tensorly.decomposition import tucker
from tensorly.tenalg import svd_interface
from torch import Tensor

from helpers import F64, orthogonal
from sparsegrad_peft import GramStatistics
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.hosvd import eigenbasis
from sparsegrad_peft.method.sizes import Rows, check_rows, row_count

SHAPES = [(4, 5, 7), (3, 9, 2), (2, 12, 30), (5, 8, 8), (6, 1, 6), (6, 6, 1), (1, 3, 4)]  # (n, out, in)


def stack(n: int, out: int, in_: int) -> Tensor:
    """Make gradients whose directions have different energies, as real ones have."""
    return torch.randn(n, out, in_, dtype=F64) * torch.linspace(1, 3, out, dtype=F64)[:, None]


def statistics(gradients: Tensor, dtype: torch.dtype = F64, name: str = "mlp") -> GramStatistics:
    _, out, in_ = gradients.shape
    gram_in, gram_out = torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype)
    gram = GramStatistics(name, ("layer.0", "layer.1"), gram_in, gram_out)
    for G in gradients:
        gram.add(G)
    return gram


def largest_angle(A: Tensor, B: Tensor) -> float:
    """Sine of the largest principal angle between the spans of orthonormal rows."""
    return float(torch.linalg.matrix_norm(A - A @ B.T @ B, ord=2))


def with_spectrum(spectrum: Tensor) -> Tensor:
    """Make a Gram matrix with this spectrum, in random directions."""
    n = len(spectrum)
    Q = orthogonal(n)
    gram = (Q * spectrum.to(F64)) @ Q.T
    return (gram + gram.T) / 2


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """Turn off the test run's shape checks, so that the library's own messages are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Against SVDs


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_singular_vectors_of_the_unfoldings(shape: tuple[int, int, int]) -> None:
    """Every leading subspace up to the rank. Beyond the rank any completion is right."""
    gradients = stack(*shape)
    gram = statistics(gradients)
    U, V, energy_in, energy_out = reference.hosvd(gradients)
    for side, left, energies in ((gram.gram_in, U, energy_in), (gram.gram_out, V, energy_out)):
        basis = eigenbasis(side)
        n = side.shape[0]
        rank = min(n, len(energies))
        assert basis.vectors.shape == (n, n)
        assert basis.rank == rank
        for rows in range(1, rank + 1):
            assert largest_angle(basis.vectors[:rows], left[:rows]) < 1e-7
        torch.testing.assert_close(basis.vectors @ basis.vectors.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-12)
        expected = torch.cat([energies, energies.new_zeros(n - rank)])
        torch.testing.assert_close(basis.spectrum, expected, rtol=1e-10, atol=1e-10 * float(energies[0]))
        assert bool((basis.spectrum.diff() <= 0).all())
        assert bool((basis.spectrum >= 0).all())
        assert basis.energy == pytest.approx(float(gradients.square().sum()), rel=1e-12)
        assert basis.captured == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 5, 7), (3, 9, 4), (5, 8, 8)])
def test_factors_are_tensorlys(shape: tuple[int, int, int]) -> None:
    """Tucker factors at full rank, and truncated SVDs of the unfoldings, from the library that the authors used."""
    gradients = stack(*shape)
    n, out, in_ = shape
    factors = tucker(gradients.numpy(), rank=[n, out, in_], init="svd", svd="truncated_svd", n_iter_max=3).factors
    gram = statistics(gradients)
    for mode, side in ((1, gram.gram_out), (2, gram.gram_in)):
        factor = torch.from_numpy(factors[mode].T.copy())
        basis = eigenbasis(side)
        for rows in range(1, shape[mode] + 1):
            assert largest_angle(basis.vectors[:rows], factor[:rows]) < 1e-7
        for rows in (1, 2, shape[mode] - 1):
            left, singular, _ = svd_interface(unfold(gradients.numpy(), mode), n_eigenvecs=rows)
            leading = eigenbasis(side, rows)
            assert largest_angle(leading.vectors, torch.from_numpy(left.T.copy())) < 1e-7
            torch.testing.assert_close(
                leading.spectrum[:rows], torch.from_numpy(singular.copy()) ** 2, rtol=1e-9, atol=0
            )


def test_input_side_is_u_and_output_side_is_v() -> None:
    """Gradients with one input direction and one output direction: these are the first rows of `U` and `V`."""
    x, y = torch.randn(6, dtype=F64), torch.randn(9, dtype=F64)
    basis = statistics(torch.stack([torch.outer(y, x), -2 * torch.outer(y, x)])).basis(c=1, r=1, dtype=F64)
    assert basis.U.shape == (1, 6)
    assert basis.V.shape == (1, 9)
    assert abs(float(basis.U[0] @ x)) == pytest.approx(float(x.norm()), rel=1e-12)
    assert abs(float(basis.V[0] @ y)) == pytest.approx(float(y.norm()), rel=1e-12)


# Signs


@pytest.mark.parametrize("n", [5, 1100])
def test_signs(n: int) -> None:
    """The largest entry of each row is positive with both decompositions, also for negated gradients."""
    gradients = torch.randn(3, 2, n, dtype=F64)
    gram, turned = statistics(gradients), statistics(-gradients)
    rows: Rows = "full" if n == 5 else 8
    basis = eigenbasis(gram.gram_in, rows)
    largest = basis.vectors.gather(1, basis.vectors.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((basis.vectors < 0).any())
    assert torch.equal(basis.vectors, eigenbasis(turned.gram_in, rows).vectors)


def test_sign_of_equal_entries() -> None:
    """(1, -1)/√2 has two largest entries; the first is made positive."""
    vectors = eigenbasis(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64), 1).vectors
    torch.testing.assert_close(vectors, torch.tensor([[1.0, -1.0]], dtype=F64) / math.sqrt(2))


# How many rows


@pytest.mark.parametrize(
    ("rows", "n", "count"),
    [
        ("full", 5, 5),
        (7, 9, 7),
        (9, 9, 9),
        (1.0, 9, 9),
        (0.5, 9, 4),  # below 16: down
        (0.01, 64, 1),  # never none
        (0.2, 64, 12),
        (0.1, 768, 80),  # 76.8, to the nearest multiple of 8
        (0.1, 3072, 304),  # 307.2
        (0.25, 64, 16),
        (0.5, 768, 384),
        (0.95, 23, 23),  # 21.85: the nearest multiple is 24
        (0.99, 768, 760),
        (1.0, 770, 770),  # all is all
        (3 / 47, 47, 3),  # 2.9999999999999996 in floats
        (16 / 94, 94, 16),
        ("energy:0.9", 9, None),
    ],
)
def test_row_count(rows: Rows, n: int, count: int | None) -> None:
    assert row_count(rows, n) == count


def test_fractions_give_the_nearest_multiple_of_8() -> None:
    for n in (16, 23, 64, 100, 257, 768):
        for percent in range(1, 100):
            count = row_count(percent / 100, n)
            assert count is not None
            exact = percent * n / 100
            assert 1 <= count <= n
            if exact >= 16:
                assert count % 8 == 0 or count == n
                assert abs(count - exact) <= 4
            else:
                assert count == max(1, percent * n // 100)


@pytest.mark.parametrize(("rows", "count"), [("full", 40), (1, 1), (3, 3), (40, 40), (0.1, 4), (0.6, 24), (1.0, 40)])
def test_rows_are_the_leading_ones(rows: Rows, count: int) -> None:
    gram = statistics(stack(3, 50, 40)).gram_in
    every, some = eigenbasis(gram), eigenbasis(gram, rows)
    assert torch.equal(some.vectors, every.vectors[:count])
    assert torch.equal(some.spectrum, every.spectrum)  # known whole, so that sizes can be chosen by it
    assert some.captured == pytest.approx(float(every.spectrum[:count].sum() / every.spectrum.sum()), rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("shape", [(3, 50, 40), (2, 3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_share_of_energy(share: float, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The smallest number of rows that holds the share."""
    gram = statistics(stack(*shape), dtype).gram_in
    some = eigenbasis(gram, f"energy:{share}")
    rows = some.vectors.shape[0]
    rounding = 10 * torch.finfo(dtype).eps
    assert some.captured >= share - rounding
    assert float(some.spectrum[: rows - 1].double().sum()) / some.energy < share + rounding
    assert torch.equal(some.vectors, eigenbasis(gram, rows).vectors)


def test_all_of_the_energy() -> None:
    """ "energy:1" keeps the directions that the gradients reach, without rows that only complete the basis."""
    gram = with_spectrum(torch.tensor([5.0, 3.0, 1.0, 0.5, 0.0, 0.0, 0.0]))
    rows = eigenbasis(gram, "energy:1").vectors.shape[0]
    exact = torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.5, 0.0, 0.0, 0.0]))
    assert eigenbasis(exact, "energy:1").vectors.shape[0] == 4
    assert 4 <= rows <= 7  # rounding leaves some energy everywhere
    assert eigenbasis(exact, "energy:0.52").vectors.shape[0] == 1  # 5/9.5 = 0.526
    assert eigenbasis(exact, "energy:0.53").vectors.shape[0] == 2


# The leading rows of a large matrix


@pytest.mark.parametrize(
    "decay",
    [
        lambda i: 1 / (i + 1),
        lambda i: torch.exp(-i / 60),
        lambda i: (i + 1) ** -0.5,
        lambda i: torch.where(i < 20, 1.0, 0.01),
    ],
    ids=["inverse", "exponential", "inverse root", "step"],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_leading_rows_by_iteration(decay: Any, dtype: torch.dtype) -> None:
    """From 1024 directions on, few rows are found without a full decomposition, with the same energy."""
    n, count = 1024, 104
    spectrum = decay(torch.arange(n, dtype=F64))
    gram = with_spectrum(spectrum).to(dtype)
    found = eigenbasis(gram, 0.1)
    assert found.vectors.shape == (count, n)
    assert found.spectrum.shape == (count,)  # the iteration's: the other way knows all n
    vectors = found.vectors.double()
    energies = ((vectors @ gram.double()) * vectors).sum(1)
    exact = float(spectrum[:count].sum())
    assert float(energies.sum()) >= 0.999 * exact
    rounding = {torch.float32: 1e-5, F64: 1e-12}[dtype]
    assert float((vectors @ vectors.T - torch.eye(count)).abs().max()) < rounding
    torch.testing.assert_close(found.spectrum.double(), energies, rtol=10 * rounding, atol=rounding)
    assert bool((found.spectrum.diff() <= 0).all())
    assert found.captured == pytest.approx(float(energies.sum() / spectrum.sum()), rel=1e-4)
    again = eigenbasis(gram.clone(), count)
    assert torch.equal(again.vectors, found.vectors)
    assert torch.equal(again.spectrum, found.spectrum)


def test_iteration_only_where_it_pays() -> None:
    """Below 1024 directions, or for more than 0.15 of them, the full decomposition gives the whole spectrum."""
    gram = with_spectrum(1 / (torch.arange(1024) + 1.0)).float()
    assert len(eigenbasis(gram, 160).spectrum) == 1024
    assert len(eigenbasis(gram, 153).spectrum) == 153
    assert len(eigenbasis(gram[:1000, :1000], 10).spectrum) == 1000
    assert len(eigenbasis(gram, "energy:0.5").spectrum) == 1024


def test_iteration_takes_no_random_numbers_and_no_autocast() -> None:
    gram = with_spectrum(torch.exp(-torch.arange(1024) / 60.0)).float()
    expected = eigenbasis(gram, 32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = eigenbasis(gram, 32)
    assert torch.equal(found.vectors, expected.vectors)
    assert torch.equal(torch.get_rng_state(), state)


def test_iteration_on_few_gradients() -> None:
    """More rows than the gradients have directions: real directions come first, the others complete the basis."""
    gradients = torch.randn(4, 5, 1024, dtype=F64)  # 20 directions
    found = eigenbasis(statistics(gradients).gram_in, 64)
    assert found.rank == 20
    assert found.captured == pytest.approx(1, rel=1e-10)
    assert float((found.vectors @ found.vectors.T - torch.eye(64)).abs().max()) < 1e-12
    outside = gradients.reshape(20, 1024) - gradients.reshape(20, 1024) @ found.vectors[:20].T @ found.vectors[:20]
    assert float(outside.abs().max()) < 1e-8


# Too few directions


def test_rank_by_the_type_of_the_sums() -> None:
    """Squares of a direction 10⁻⁵ as strong as another are lost in float32 sums, and kept in float64 sums."""
    gradients = torch.diag(torch.tensor([1.0, 0.1, 1e-5], dtype=F64))[None]
    assert eigenbasis(statistics(gradients, F64).gram_in).rank == 3
    assert eigenbasis(statistics(gradients, torch.float32).gram_in).rank == 2


# What is refused, and in which words


@pytest.mark.usefixtures("_shapes_unchecked")
@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 3), ()])
def test_not_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the Gram matrix: expected a square Gram matrix, found \("):
        eigenbasis(torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    gram = torch.eye(4)
    gram[1, 2] = gram[2, 1] = value
    with pytest.raises(
        ValueError, match="side A holds 2 entries that are not finite: a calibration gradient or its square"
    ):
        eigenbasis(gram, name="side A")


def test_no_energy() -> None:
    with pytest.raises(ValueError, match="side A has energy 0: no gradient reached these layers"):
        eigenbasis(torch.zeros(3, 3), name="side A")
    with pytest.raises(ValueError, match="side A has energy -3: no gradient reached these layers"):
        eigenbasis(-torch.eye(3), name="side A")


def test_not_symmetric() -> None:
    gram = torch.eye(3)
    gram[0, 1] = 0.01
    with pytest.raises(ValueError, match=r"side A: expected a symmetric matrix, .* differ from their mirror by 0\.01"):
        eigenbasis(gram, name="side A")
    gram[0, 1] = 1e-6  # rounding
    assert eigenbasis(gram).rank == 3


@pytest.mark.parametrize("rows", [True, False, None, [1], (0.5,), torch.tensor(2)])
def test_rows_of_a_wrong_type(rows: Any) -> None:
    """A bool is an int in Python, but `c=True` has no meaning here."""
    with pytest.raises(
        TypeError, match=r'side A: expected "full", a count from 1 to 4, a fraction in \(0, 1\], or "en'
    ):
        check_rows(rows, 4, "side A")
    with pytest.raises(TypeError, match='expected "full", a count from 1 to 4'):
        eigenbasis(torch.eye(4), rows)


@pytest.mark.parametrize(
    "rows",
    [
        *(0, -1, 5, 0.0, -0.5, 1.5, float("nan"), float("inf")),
        *("energy:2", "energy:0", "energy:-0.5", "energy:nan", "energy:", "energy", "half", "Full", "", "0.5", "4"),
    ],
)
def test_rows_out_of_range(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"side A: expected .* with a share in \(0, 1\]; found ") as error:
        eigenbasis(torch.eye(4), rows, name="side A")
    assert str(error.value).endswith(f"found {rows!r}")


@pytest.mark.parametrize("rows", [1, 4, 0.01, 1.0, "full", "energy:0.001", "energy:1"])
def test_rows_in_range(rows: Rows) -> None:
    check_rows(rows, 4, "side A")
    assert 1 <= eigenbasis(torch.eye(4), rows).vectors.shape[0] <= 4
