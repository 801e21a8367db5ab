"""Chains of matrices: the product is right, and computed in the cheapest order."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from helpers import all_chain_costs, multiply_adds_done
from sparsegrad_peft.method.costs import chain_cost
from sparsegrad_peft.method.products import add_chain, chain


def matrices(*dims: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(d * 31**i for i, d in enumerate(dims)))
    return [torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in pairwise(dims)]


def naive(factors: list[Tensor]) -> Tensor:
    return reduce(torch.matmul, factors)


# One list for each place where the optimum cuts: the outer sizes small or large against the inner ones.
CHAINS = [
    (3, 5, 7),
    (2, 30, 4, 25),
    (25, 4, 30, 2),
    (30, 2, 25, 4),
    (6, 50, 3, 40, 5),
    (40, 3, 50, 6, 30),
    (1, 20, 20, 20, 1),
    (9, 9, 9, 9, 9),
    (20, 1, 20, 1, 20),
]


@pytest.mark.parametrize("dims", CHAINS)
def test_chain_is_the_product(dims: tuple[int, ...]) -> None:
    factors = matrices(*dims)
    torch.testing.assert_close(chain(*factors), naive(factors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", CHAINS)
def test_chain_does_no_more_than_the_cheapest_multiply_adds_done(dims: tuple[int, ...]) -> None:
    """The order counted is the order computed."""
    factors = matrices(*dims)
    assert multiply_adds_done(chain, *factors) == chain_cost(*dims) == min(all_chain_costs(dims))
    out = torch.zeros(dims[0], dims[-1], dtype=torch.float64)
    assert multiply_adds_done(add_chain, out, *factors) == chain_cost(*dims)
    assert multiply_adds_done(add_chain, out, *factors, in_place=True) == chain_cost(*dims)


@pytest.mark.parametrize("present", list(product([True, False], repeat=4))[:-1])
def test_none_is_the_identity(present: tuple[bool, ...]) -> None:
    """At every place of a chain of four, alone or with others."""
    generator = torch.Generator().manual_seed(0)
    squares = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in present]
    written = [m if there else torch.eye(4, dtype=torch.float64) for m, there in zip(squares, present, strict=True)]
    given = [m if there else None for m, there in zip(squares, present, strict=True)]
    expected = naive(written)
    torch.testing.assert_close(chain(*given), expected, rtol=1e-12, atol=1e-12)
    start = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(add_chain(start, *given), start + expected, rtol=1e-12, atol=1e-12)


def test_none_costs_nothing() -> None:
    """A product with an identity in its middle does the work of the two real matrices."""
    left, right = matrices(5, 8, 3)
    assert multiply_adds_done(chain, None, left, None, right, None) == 5 * 8 * 3
    assert multiply_adds_done(chain, None, left, None) == 0


def test_chain_of_one_is_that_matrix() -> None:
    (only,) = matrices(3, 4)
    assert chain(None, only) is only
    assert chain(only, None, None) is only


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dims", [(3, 4), *CHAINS])
def test_add_chain(dims: tuple[int, ...], in_place: bool) -> None:
    factors = matrices(*dims)
    before = torch.full((dims[0], dims[-1]), 0.25, dtype=torch.float64)
    out = before.clone()
    result = add_chain(out, *factors, in_place=in_place)
    torch.testing.assert_close(result, before + naive(factors), rtol=1e-12, atol=1e-12)
    assert (result is out) == in_place
    assert torch.equal(out, before) != in_place  # left alone unless asked


@pytest.mark.parametrize("in_place", [False, True])
def test_add_chain_of_one_leaves_the_factor_alone(in_place: bool) -> None:
    (only,) = matrices(3, 3)
    kept, out = only.clone(), torch.ones(3, 3, dtype=torch.float64)
    result = add_chain(out, None, only, None, in_place=in_place)
    assert torch.equal(result, 1 + kept)
    assert torch.equal(only, kept)
    assert (result is out) == in_place


def test_chain_is_differentiable() -> None:
    factors = [m.requires_grad_() for m in matrices(2, 5, 3, 4)]
    assert torch.autograd.gradcheck(lambda *given: chain(*given), factors)
