"""Multiply-adds of the MLP's linear layers in one step, counted from shapes; what a measured time stands beside."""

from __future__ import annotations

from sparsegrad_peft.method.costs import LayerShape, Prefer, chain_cost, step_cost
from sparsegrad_peft.method.sizes import Sizes


def multiply_adds(method: str, shapes: list[tuple[int, int]], tokens: int, live: int, sizes: Sizes) -> int | None:
    """Of all layers together, forward, backward and the change of basis; None where they are not counted.

    Args:
        method: name in `METHODS`.
        shapes: (out, in) of each layer.
        tokens: in the batch, padding included.
        live: of these, how many have a gradient; the methods that leave the others out of backward are ours.
        sizes: of the bases.
    """
    counter = {
        "floor": _floor, "full": _full, "literal": _literal, "sparsegrad-paper": _paper, "sparsegrad": _memory,
        "sparsegrad-speed": _speed, "sparsegrad-complete": _complete,
    }.get(method)  # fmt: skip
    if counter is None:
        return None
    return sum(counter(out, in_, tokens, live, sizes) for out, in_ in shapes)


def _floor(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return 2 * tokens * out * in_


def _full(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return 3 * tokens * out * in_


def _literal(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return tokens * (2 * (in_**2 + out**2 + in_ * out) + in_ * out)


def _paper(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return 3 * tokens * out * in_ + chain_cost(out, out, in_, in_) + out * in_ * min(out, in_)


def _memory(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return _core(out, in_, tokens, live, sizes, "memory")


def _speed(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return _core(out, in_, tokens, live, sizes, "speed")


def _complete(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    return _core(out, in_, tokens, live, Sizes("full", "full"), "speed")


def _core(out: int, in_: int, tokens: int, live: int, sizes: Sizes, prefer: Prefer) -> int:
    r, c = sizes.counts(out, in_)
    assert r is not None
    assert c is not None
    return step_cost(LayerShape(out, in_, r, c), tokens, live, prefer)
