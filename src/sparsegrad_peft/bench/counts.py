"""Multiply-adds of the MLP's linear layers in one step, counted from shapes; what a measured time stands beside."""

from __future__ import annotations

from ..method.products import chain_cost
from ..method.sizes import Sizes


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
        "sparsegrad-speed": _speed,
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
    r, c, forming, factors = _parts(out, in_, tokens, live, sizes)
    plain = (tokens + live) * out * in_
    return plain + min(2 * forming, factors) + tokens * in_ * c + chain_cost(r, out, live, c)


def _speed(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> int:
    r, c, forming, factors = _parts(out, in_, tokens, live, sizes)
    plain = (tokens + live) * out * in_
    projected = min(tokens * in_ * c + chain_cost(r, out, live, c), chain_cost(r, out, live, in_, c))
    return plain + min(forming, factors) + projected


def _parts(out: int, in_: int, tokens: int, live: int, sizes: Sizes) -> tuple[int, int, int, int]:
    r, c = sizes.counts(out, in_)
    assert r is not None
    assert c is not None
    factors = chain_cost(tokens, c, r, out) + chain_cost(live, out, r, c, in_)
    return r, c, chain_cost(out, r, c, in_), factors
