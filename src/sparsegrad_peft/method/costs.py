"""Multiply-adds of a SparseGrad layer, counted from shapes. `function.py` makes its choices by these counts.

A layer computes with `W + Vᵀ S U`, where `W` is (out, in), `S` (r, c), `U` (c, in) and `V` (r, out). For `T` tokens the
update can be applied in two ways:

- *formed*: `W + Vᵀ S U` is computed once in forward and once in backward. This pays off with many tokens, where both
  sides are rotations or the identity.
- *factored*: the input goes through `x Uᵀ Sᵀ V`. This pays off with few tokens.

The file needs no torch, so that the command line and the benchmarks can count without it.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer and its basis, and which sides of the basis are rotations.

    Taking coordinates along a selected side or the identity multiplies nothing (see `sides.py`).
    """

    out: int
    in_: int
    r: int
    c: int
    rotates_out: bool = True
    "V is a matrix (r, out)"
    rotates_in: bool = True
    "U is a matrix (c, in)"

    @property
    def dims_out(self) -> tuple[int, ...]:
        """Sizes along a chain that passes through `Vᵀ`."""
        return (self.out, self.r) if self.rotates_out else (self.r,)

    @property
    def dims_in(self) -> tuple[int, ...]:
        """Sizes along a chain that passes through `U`."""
        return (self.c, self.in_) if self.rotates_in else (self.c,)

    @property
    def selects(self) -> bool:
        """True if a side takes a part of the coordinates."""
        return (not self.rotates_out and self.r < self.out) or (not self.rotates_in and self.c < self.in_)


def saves_input(tokens: int, layer: LayerShape, prefer: Prefer, *, formed: bool) -> bool:
    """True if backward gets the input `x` (T, in), False if it gets the projected input `x Uᵀ` (T, c).

    Where the update is not `formed`, forward has computed the projected input.
    """
    if prefer == "speed" and layer.rotates_in and not formed:
        return False
    if layer.c == layer.in_:  # the projected input is no smaller, and `x` may be kept for another layer anyway
        return True
    if prefer == "memory" or not layer.rotates_in:
        return False
    project = chain_cost(tokens, *layer.dims_in[::-1])
    from_input = chain_cost(*layer.dims_out[::-1], tokens, *layer.dims_in[::-1])
    return from_input < project + chain_cost(*layer.dims_out[::-1], tokens, layer.c)


def backward_through_factors(tokens: int, layer: LayerShape, *, from_input: bool = False) -> tuple[int, bool]:
    """Multiply-adds of the products `δ Vᵀ S U` and `V δᵀ x̃` in backward.

    Both need `δ Vᵀ` (T, r). The second value is True if it is cheapest to compute `δ Vᵀ` once for both.

    Args:
        tokens: rows of `δ`.
        layer: shape of the layer.
        from_input: `x̃ = x Uᵀ` still has to be computed from the input `x`.
    """
    x_tilde = layer.dims_in[::-1] if from_input else (layer.c,)
    apart = chain_cost(tokens, *layer.dims_out, *layer.dims_in) + chain_cost(*layer.dims_out[::-1], tokens, *x_tilde)
    project = chain_cost(tokens, *layer.dims_out)
    together = project + chain_cost(tokens, layer.r, *layer.dims_in) + chain_cost(layer.r, tokens, *x_tilde)
    return min(apart, together), together < apart or not layer.rotates_out


def forms_update(tokens: int, layer: LayerShape, prefer: Prefer, may_form: bool = True) -> bool:
    """True if forming `W + Vᵀ S U` needs fewer multiply-adds, forward and backward, than applying its factors.

    Never where a side selects features: a copy of `W`, with additions to some of its rows or columns, takes longer than
    the multiply-adds that it saves. And not where it may not be formed: weights in half precision would round it away.
    """
    if layer.selects or not may_form:
        return False
    return _update_cost(True, tokens, tokens, layer, prefer) < _update_cost(False, tokens, tokens, layer, prefer)


def step_cost(
    layer: LayerShape,
    tokens: int,
    live_tokens: int | None = None,
    prefer: Prefer = "memory",
    *,
    may_form: bool = True,
) -> int:
    """Multiply-adds of one layer in one step: forward, gradient of the input, gradient of `S`.

    Args:
        layer: shape of the layer.
        tokens: tokens in the batch, padding included.
        live_tokens: tokens with a gradient; backward leaves the others out. None: all of them.
        prefer: see `Prefer`.
        may_form: False for a weight in half precision, see `forms_update`.
    """
    live = tokens if live_tokens is None else live_tokens
    formed = forms_update(tokens, layer, prefer, may_form)
    return (tokens + live) * layer.out * layer.in_ + _update_cost(formed, tokens, live, layer, prefer)


def _update_cost(formed: bool, tokens: int, live: int, layer: LayerShape, prefer: Prefer) -> int:
    """Multiply-adds of one step that a frozen linear layer would not have."""
    from_input = saves_input(tokens, layer, prefer, formed=formed)
    project = chain_cost(tokens, *layer.dims_in[::-1])
    if formed:
        forming = chain_cost(*layer.dims_out, *layer.dims_in)
        if prefer == "memory":  # formed again in backward
            forming *= 2
        if from_input:
            return forming + chain_cost(*layer.dims_out[::-1], live, *layer.dims_in[::-1])
        return forming + project + chain_cost(*layer.dims_out[::-1], live, layer.c)
    forward = project + chain_cost(tokens, layer.c, *layer.dims_out[::-1])
    return forward + backward_through_factors(live, layer, from_input=from_input)[0]
