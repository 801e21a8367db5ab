"""Counted multiply-adds are those that PyTorch counts in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from helpers import bench_runner
from sparsegrad_lab.bench.counts import multiply_adds
from sparsegrad_peft.method.sizes import Sizes


def counted() -> FlopCounterMode:
    """PyTorch's FLOP counter, with the product that is added in place, which it does not know."""

    def in_place(self: Any, a: tuple[int, int], b: tuple[int, int], **options: Any) -> int:
        return addmm_flop(self, a, b)

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


@pytest.mark.parametrize("tokens", [4, 96, 400, 1500])
@pytest.mark.parametrize("method", ["floor", "sparsegrad", "sparsegrad-complete", "literal", "full"])
def test_counted_is_computed(method: str, tokens: int) -> None:
    """With few tokens, where the update is applied in factors, and with many, where it is formed."""
    found = bench_runner(method, tokens=tokens)
    with counted() as counter:
        found.step()
    shapes = [(64, 32), (32, 64)]
    assert counter.get_total_flops() == 2 * multiply_adds(
        method, shapes, tokens, tokens, Sizes(narrow=8, wide=4, neurons=True)
    )


def test_counted_is_computed_with_selection_in_the_basis() -> None:
    """The published method on plain weights. Neither side counts products with a sparse matrix."""
    found = bench_runner("sparsegrad-paper")
    with counted() as counter:
        found.step()
    assert counter.get_total_flops() == 2 * multiply_adds(
        "sparsegrad-paper", [(64, 32), (32, 64)], 96, 96, Sizes(narrow=8, wide=4)
    )
