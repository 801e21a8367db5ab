"""Counted multiply-adds: the minimum for a chain, and the number that a layer computes in a step."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from helpers import F64, all_chain_costs, multiply_adds_done, orthogonal
from sparsegrad_peft import Basis, SparseGradLinear
from sparsegrad_peft.method import function
from sparsegrad_peft.method.costs import LayerShape, Prefer, chain_cost, forms_update, saves_input, step_cost

SIZES = (1, 2, 3, 7, 40)
SHAPES = [(12, 5), (5, 12), (8, 8)]


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_chain_cost_is_the_least_over_all_parenthesizations(length: int) -> None:
    """All chains of up to three matrices over five sizes, and of four matrices over three sizes."""
    sizes = SIZES if length < 5 else (1, 3, 40)
    for dims in product(sizes, repeat=length):
        costs = all_chain_costs(dims)
        left_to_right = sum(dims[0] * dims[i] * dims[i + 1] for i in range(1, len(dims) - 1))
        assert chain_cost(*dims) == min(costs), dims
        assert chain_cost(*dims) <= left_to_right, dims


def test_chain_cost_is_not_left_to_right() -> None:
    """The example in `products.py`: `V (δᵀ x̃)` takes 0.6 billion multiply-adds, `(V δᵀ) x̃` 2.0 billion."""
    r, out, tokens, c = 307, 3072, 2048, 77
    left_to_right = r * out * tokens + r * tokens * c
    assert round(left_to_right / 1e9, 1) == 2.0
    assert round(chain_cost(r, out, tokens, c) / 1e9, 1) == 0.6
    assert chain_cost(r, out, tokens, c) == out * tokens * c + r * out * c


def test_chain_cost_agrees_with_dynamic_programming_on_longer_chains() -> None:
    """Checked by the textbook's recursion over (first, last) pairs, which the library does not use."""
    dims = (30, 35, 15, 5, 10, 20, 25)  # Cormen et al., section 15.2: 15,125

    @cache
    def least(first: int, last: int) -> int:
        if last - first == 1:
            return 0
        return min(
            least(first, s) + least(s, last) + dims[first] * dims[s] * dims[last] for s in range(first + 1, last)
        )

    assert chain_cost(*dims) == least(0, len(dims) - 1) == 15125


def one_step(layer: SparseGradLinear, tokens: int, live: int, dtype: torch.dtype = F64) -> None:
    """Run forward and backward on a batch whose last rows have no gradient."""
    x = torch.randn(tokens, layer.in_features, dtype=dtype, requires_grad=True)
    delta = torch.randn(tokens, layer.out_features, dtype=dtype)
    delta[live:] = 0
    layer(x).backward(delta)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("core", [(2, 3), (5, 1), (1, 5), (5, 5), "complete"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize(("tokens", "live"), [(1, 1), (3, 3), (9, 9), (40, 40), (40, 10), (200, 100)])
def test_the_layer_computes_what_is_counted(
    out: int, in_: int, core: tuple[int, int] | str, tokens: int, live: int, prefer: Prefer
) -> None:
    r, c = (out, in_) if isinstance(core, str) else core
    layer = SparseGradLinear.from_linear(
        nn.Linear(in_, out, dtype=F64), Basis(orthogonal(in_, c), orthogonal(out, r)), prefer=prefer
    )
    assert multiply_adds_done(one_step, layer, tokens, live) == step_cost(
        LayerShape(out, in_, r, c), tokens, live, prefer
    )


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_cheaper_way_is_taken(out: int, in_: int, prefer: Prefer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step forced to form the update, or to apply its factors, never computes less than the layer's choice."""
    taken = set()
    for (r, c), tokens in product([(2, 3), (5, 5), (1, 1)], (1, 3, 9, 40, 200)):
        basis = Basis(orthogonal(in_, c), orthogonal(out, r))
        layer = SparseGradLinear.from_linear(nn.Linear(in_, out, dtype=F64), basis, prefer=prefer)
        chosen = multiply_adds_done(one_step, layer, tokens, tokens)
        taken.add(forms_update(tokens, LayerShape(out, in_, r, c), prefer))
        forced = []
        for way in (True, False):
            monkeypatch.setattr(function, "forms_update", lambda *_, way=way: way)
            forced.append(multiply_adds_done(one_step, layer, tokens, tokens))
        monkeypatch.undo()
        assert chosen == min(forced), (r, c, tokens, forced)
    assert taken == {True, False}


def test_the_smaller_of_input_and_projection_is_saved() -> None:
    for formed in (False, True):
        assert not saves_input(10, LayerShape(7, 5, 3, 2), "memory", formed=formed)
        assert saves_input(10, LayerShape(7, 5, 3, 5), "memory", formed=formed)  # the projection is no smaller


@pytest.mark.parametrize("core", [(2, 3), (5, 4), (1, 5), "complete"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_speed_is_no_slower_where_the_update_is_not_formed(
    tokens: int, out: int, in_: int, core: tuple[int, int] | str
) -> None:
    """For weights in half precision. The input was saved, and projected again in backward."""
    r, c = (out, in_) if isinstance(core, str) else core
    counts = {}
    for prefer in ("memory", "speed"):
        layer = SparseGradLinear.from_linear(
            nn.Linear(in_, out, dtype=torch.bfloat16), Basis(orthogonal(in_, c), orthogonal(out, r)), prefer=prefer
        )
        counts[prefer] = multiply_adds_done(one_step, layer, tokens, tokens, torch.bfloat16)
        assert counts[prefer] == step_cost(LayerShape(out, in_, r, c), tokens, None, prefer, may_form=False)
    assert counts["speed"] <= counts["memory"]
    assert not saves_input(tokens, LayerShape(out, in_, r, c), "speed", formed=False)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_no_weight_is_formed_where_a_side_selects(out: int, in_: int, prefer: Prefer) -> None:
    """However many tokens there are; and what the layer computes is still what is counted."""
    r, c = 3, 2
    V, U = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32)
    for selects_out, tokens in product((True, False), (1, 9, 200)):
        basis = (
            Basis(orthogonal(in_, c), V, out_features=out)
            if selects_out
            else Basis(U, orthogonal(out, r), in_features=in_)
        )
        layer = SparseGradLinear.from_linear(nn.Linear(in_, out, dtype=F64), basis, prefer=prefer)
        shape = LayerShape(out, in_, r, c, not selects_out, selects_out)
        assert shape.selects
        assert not forms_update(tokens, shape, prefer)
        assert multiply_adds_done(one_step, layer, tokens, tokens) == step_cost(shape, tokens, prefer=prefer)
    assert not LayerShape(out, in_, out, in_, False, False).selects  # the identity
