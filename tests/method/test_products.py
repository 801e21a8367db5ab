from collections.abc import Callable
from functools import cache, reduce
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsegrad_peft.method.products import add_chain, chain, chain_cost

SIZES = (1, 2, 3, 7, 40)


def matrices(*dims: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(d * 31**i for i, d in enumerate(dims)))
    return [torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in pairwise(dims)]


def naive(factors: list[Tensor]) -> Tensor:
    return reduce(torch.matmul, factors)


def all_costs(dims: tuple[int, ...]) -> list[int]:
    """Multiply-adds of every parenthesization."""
    if len(dims) == 2:
        return [0]
    return [
        left + right + dims[0] * dims[s] * dims[-1]
        for s in range(1, len(dims) - 1)
        for left in all_costs(dims[: s + 1])
        for right in all_costs(dims[s:])
    ]


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products as they are dispatched; no other products are expected."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not {"bmm", "matmul", "einsum", "linear", "mv", "dot"} & {name}, name
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def work(call: Callable[..., Tensor], *args: Tensor | None, **kwargs: bool) -> int:
    """Multiply-adds that a call really does."""
    with MultiplyAdds() as counter:
        call(*args, **kwargs)
    return counter.total


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
def test_chain_does_no_more_than_the_cheapest_work(dims: tuple[int, ...]) -> None:
    """The order counted is the order done."""
    factors = matrices(*dims)
    assert work(chain, *factors) == chain_cost(*dims) == min(all_costs(dims))
    out = torch.zeros(dims[0], dims[-1], dtype=torch.float64)
    assert work(add_chain, out, *factors) == chain_cost(*dims)
    assert work(add_chain, out, *factors, in_place=True) == chain_cost(*dims)


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
    assert work(chain, None, left, None, right, None) == 5 * 8 * 3
    assert work(chain, None, left, None) == 0


def test_chain_of_one_is_that_matrix() -> None:
    (only,) = matrices(3, 4)
    assert chain(None, only) is only
    assert chain(only, None, None) is only


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_chain_cost_is_the_least_over_all_parenthesizations(length: int) -> None:
    """All chains of up to three matrices over five sizes; of four, over three sizes."""
    sizes = SIZES if length < 5 else (1, 3, 40)
    for dims in product(sizes, repeat=length):
        costs = all_costs(dims)
        left_to_right = sum(dims[0] * dims[i] * dims[i + 1] for i in range(1, len(dims) - 1))
        assert chain_cost(*dims) == min(costs), dims
        assert chain_cost(*dims) <= left_to_right, dims


def test_chain_cost_is_not_left_to_right() -> None:
    """The example of the module's text: `V (δᵀ x̃)` takes 0.6 billion multiply-adds, `(V δᵀ) x̃` 2.0 billion."""
    r, out, tokens, c = 307, 3072, 2048, 77
    left_to_right = r * out * tokens + r * tokens * c
    assert round(left_to_right / 1e9, 1) == 2.0
    assert round(chain_cost(r, out, tokens, c) / 1e9, 1) == 0.6
    assert chain_cost(r, out, tokens, c) == out * tokens * c + r * out * c


def test_chain_cost_agrees_with_dynamic_programming_on_longer_chains() -> None:
    """By the textbook's recursion over (first, last) pairs, which no part of the library uses."""
    dims = (30, 35, 15, 5, 10, 20, 25)  # Cormen et al., section 15.2: 15,125

    @cache
    def least(first: int, last: int) -> int:
        if last - first == 1:
            return 0
        return min(
            least(first, s) + least(s, last) + dims[first] * dims[s] * dims[last] for s in range(first + 1, last)
        )

    assert chain_cost(*dims) == least(0, len(dims) - 1) == 15125


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
