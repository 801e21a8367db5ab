"""Multiply-adds of the MLP layers in one training step, counted from shapes."""

from __future__ import annotations

from sparsegrad_peft.method.costs import LayerShape, chain_cost, step_cost
from sparsegrad_peft.method.sizes import Sizes

COMPLETE = Sizes("full", "full")


def multiply_adds(method: str, shapes: list[tuple[int, int]], tokens: int, live: int, sizes: Sizes) -> int | None:
    """Return the multiply-adds of all layers: forward, backward and change of basis. None if they are not counted.

    Args:
        method: name in `bench.methods.METHODS`.
        shapes: (out, in) of each layer.
        tokens: tokens in the batch, padding included.
        live: tokens with a gradient. SparseGrad's layers leave the others out of backward.
        sizes: rows of the bases.
    """
    counts = [_layer(method, out, in_, tokens, live, sizes) for out, in_ in shapes]
    return None if None in counts else sum(count or 0 for count in counts)


def _layer(method: str, out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int | None:
    product = tokens * out * in_
    if method == "floor":
        return 2 * product
    if method == "full":
        return 3 * product
    if method == "literal":
        return 3 * product + 2 * tokens * (in_**2 + out**2)
    if method == "sparsegrad-paper":  # rotates the gradient, and the update back
        return 3 * product + chain_cost(out, out, in_, in_) + out * in_ * min(out, in_)
    if method not in ("sparsegrad", "sparsegrad-complete"):
        return None
    if method == "sparsegrad-complete":
        sizes = COMPLETE
    (r, c), (select_out, select_in) = sizes.counts(out, in_), sizes.selected(out, in_)
    assert r is not None
    assert c is not None
    return step_cost(
        LayerShape(out, in_, r, c, not select_out, not select_in),
        tokens,
        live,
        "memory" if method == "sparsegrad" else "speed",
    )
