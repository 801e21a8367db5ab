"""Multiply-adds of a SparseGrad layer, counted from shapes. `function.py` makes its choices by these counts.

A layer computes with `W + Vᵀ S U`, where `W` is (out, in), `S` (r, c), `U` (c, in) and `V` (r, out). For `T` tokens the
update can be applied in two ways:

- *formed*: `W + Vᵀ S U` is computed once in forward and once in backward. This pays off with many tokens.
- *factored*: the input goes through `x Uᵀ Sᵀ V`. This pays off with few tokens.

The file needs no torch, so that the command line and the benchmarks can count without it.
"""

from __future__ import annotations

from typing import Literal

Prefer = Literal["memory", "speed"]
"""What a layer saves for backward: the least memory, or whatever needs the fewest multiply-adds."""


def chain_cost(*dims: int) -> int:
    """Multiply-adds of a chain of matrix products in its cheapest order.

    `dims` are the sizes along the chain: a (2, 3) by (3, 5) by (5, 7) product is `chain_cost(2, 3, 5, 7)`.
    """
    return cheapest_cut(dims)[0]


def cheapest_cut(dims: tuple[int, ...]) -> tuple[int, int]:
    """Return (multiply-adds, where to cut the chain in two). Plain recursion: a chain has at most four matrices."""
    if len(dims) <= 2:
        return 0, 0
    best, cut = -1, 0
    for s in range(1, len(dims) - 1):
        left, right = cheapest_cut(dims[: s + 1])[0], cheapest_cut(dims[s:])[0]
        cost = left + right + dims[0] * dims[s] * dims[-1]
        if best < 0 or cost < best:
            best, cut = cost, s
    return best, cut


def saves_input(tokens: int, core_shape: tuple[int, int], shape: tuple[int, int], prefer: Prefer) -> bool:
    """True if backward gets the input `x` (T, in), False if it gets the projected input `x Uᵀ` (T, c)."""
    (r, c), (out, in_) = core_shape, shape
    if c == in_:  # the projected input is no smaller, and `x` may be kept for another layer anyway
        return True
    if prefer == "memory":
        return False
    return chain_cost(r, out, tokens, in_, c) < tokens * in_ * c + chain_cost(r, out, tokens, c)


def backward_through_factors(
    tokens: int, core_shape: tuple[int, int], shape: tuple[int, int], *, from_input: bool = False
) -> tuple[int, bool]:
    """Multiply-adds of the products `δ Vᵀ S U` and `V δᵀ x̃` in backward.

    Both need `δ Vᵀ` (T, r). The second value is True if it is cheapest to compute `δ Vᵀ` once for both.

    Args:
        tokens: rows of `δ`.
        core_shape: (r, c).
        shape: (out, in).
        from_input: `x̃ = x Uᵀ` still has to be computed from the input `x`.
    """
    (r, c), (out, in_) = core_shape, shape
    x_tilde = (in_, c) if from_input else (c,)
    apart = chain_cost(tokens, out, r, c, in_) + chain_cost(r, out, tokens, *x_tilde)
    together = tokens * out * r + chain_cost(tokens, r, c, in_) + chain_cost(r, tokens, *x_tilde)
    return min(apart, together), together < apart


def forms_update(tokens: int, core_shape: tuple[int, int], shape: tuple[int, int], prefer: Prefer) -> bool:
    """True if forming `W + Vᵀ S U` needs fewer multiply-adds, forward and backward, than applying its factors."""
    costs = [_update_cost(formed, tokens, tokens, core_shape, shape, prefer) for formed in (True, False)]
    return costs[0] < costs[1]


def step_cost(
    out: int, in_: int, r: int, c: int, tokens: int, live_tokens: int | None = None, prefer: Prefer = "memory"
) -> int:
    """Multiply-adds of one layer in one step: forward, gradient of the input, gradient of `S`.

    Args:
        out: output features.
        in_: input features.
        r: rows of `V`.
        c: rows of `U`.
        tokens: tokens in the batch, padding included.
        live_tokens: tokens with a gradient; backward leaves the others out. None: all of them.
        prefer: see `Prefer`.
    """
    live, core_shape, shape = tokens if live_tokens is None else live_tokens, (r, c), (out, in_)
    formed = forms_update(tokens, core_shape, shape, prefer)
    return (tokens + live) * out * in_ + _update_cost(formed, tokens, live, core_shape, shape, prefer)


def _update_cost(
    formed: bool, tokens: int, live: int, core_shape: tuple[int, int], shape: tuple[int, int], prefer: Prefer
) -> int:
    """Multiply-adds of one step that a frozen linear layer would not have."""
    (r, c), (out, in_) = core_shape, shape
    from_input = saves_input(tokens, core_shape, shape, prefer)
    project = tokens * in_ * c
    if formed:
        forming = chain_cost(out, r, c, in_) * (1 if prefer == "speed" else 2)  # "speed" keeps it for backward
        return forming + (chain_cost(r, out, live, in_, c) if from_input else project + chain_cost(r, out, live, c))
    forward = project + chain_cost(tokens, c, r, out)
    return forward + backward_through_factors(live, core_shape, shape, from_input=from_input)[0]
