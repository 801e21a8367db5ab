"""Step 4: forward and backward of `y = x (W + Vᵀ S U)ᵀ + b`, with a gradient for `S` and none for `W`.

    forward     y = x Wᵀ + b + x Uᵀ Sᵀ V                                  x (T, in), y (T, out)
    backward    ∂L/∂S = V δᵀ x Uᵀ,  ∂L/∂x = δ (W + Vᵀ S U),  ∂L/∂b = Σ δ    δ = ∂L/∂y (T, out)

`∂L/∂S` is `G_tilde = V G Uᵀ`. It is computed without the (out, in) gradient `G`. Three choices depend on the shapes
and on the type of `W`, and are made by counting multiply-adds (`costs.py`):

- With many tokens the update `Vᵀ S U` is *formed* and added to `W`, once in forward and once in backward. With few
  tokens, where a side selects features, or if `W` is in half precision, it is applied through its *factors*.
- Backward through the factors uses `δ Vᵀ` (T, r) twice, and computes it once where that is cheaper.
- Backward needs the projected input `x_tilde = x Uᵀ` (T, c) or the input `x` (T, in). The smaller one is saved.

Where the update is formed, `prefer="speed"` saves the formed weight from forward to backward, and the input if that
lowers the multiply-adds. Elsewhere it saves the projected input, which forward has computed.

Rows of `δ` that are exactly zero are left out of backward's products where it is cheap to find them (`live_rows.py`).
These are padding and, in the last block of a classifier, every token that is not read.

`S` stands for the scaled core: entry (i, j) of the trained core times `scale_out[i] · scale_in[j]` (`basis.py`). A
side of the basis may be a matrix, a vector of selected features, or the identity (`sides.py`).

The optimizer's step and the selection are not here. `W` gets a gradient only if it asks for one, as in calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .costs import LayerShape, Prefer, backward_through_factors, forms_update, saves_input
from .live_rows import live_rows
from .precision import HALF_PRECISION, at_least_float32, without_autocast
from .products import add_chain, chain, last_product
from .sides import Scales, Side, cast, is_selected, kept_count, scaled, take


def dense_core(core: Tensor, positions: Tensor | None, shape: tuple[int, int], scales: Scales = (None, None)) -> Tensor:
    """Return `S` (r, c), scaled: the block, or packed values (k) at their flat positions (k, int32) among zeros."""
    if positions is not None:
        core = core.new_zeros(shape[0] * shape[1]).index_copy_(0, positions.long(), core).view(shape)
    return scaled(core, scales)


def form_weight(weight: Tensor, S: Tensor, U: Side, V: Side) -> Tensor:
    """Return `W + Vᵀ S U` (out, in), computed in the wider of the two types and rounded once to the type of `W`.

    `S` (r, c) is the scaled core.
    """
    wide = torch.promote_types(weight.dtype, S.dtype)
    return _add_update_to_weight(weight.to(wide), S.to(wide), cast(U, wide), cast(V, wide)).to(weight.dtype)


def refuse_double_backward() -> None:
    """Raise if backward is to be differentiated again.

    The layers save what the first derivative needs. Without this check the second derivative would be zero in silence.
    `torch.compile` traces backward with gradients on, and refuses double backward itself.

    Raises:
        RuntimeError: backward runs with `create_graph=True`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "SparseGrad layers have no second derivative, found backward with create_graph=True (as in a gradient "
            "penalty); compute the penalty through plain layers: restore_linears(model), or a merged adapter"
        )


class SparseGradFunction(torch.autograd.Function):
    """Forward and backward as in the module's docstring. Matrices are 2-D; `T` is batch times sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, in), in the type to compute in
        weight: Tensor,  # (out, in), frozen, its own type
        bias: Tensor | None,  # (out,), in the type to compute in
        core: Tensor,  # S (r, c), or packed values (k)
        positions: Tensor | None,  # (k,) int32, flat positions in (r, c); None: core is S
        U: Side,  # (c, in); (c,) int32: selected; None: identity
        V: Side,  # (r, out); (r,) int32: selected; None: identity
        scale_out: Tensor | None,  # (r,), scales the rows of S
        scale_in: Tensor | None,  # (c,), scales the columns of S
        prefer: Prefer,
    ) -> Tensor:  # (T, out)
        y, x_tilde, W_formed = output(x, weight, bias, core, positions, U, V, scale_out, scale_in, prefer)
        layer = _layer_shape(weight, U, V)
        train_weight, train_core = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        save_input = train_weight or saves_input(x.shape[0], layer, prefer, formed=W_formed is not None)
        save_projected = train_core and not save_input
        if save_projected and x_tilde is None:
            x_tilde = take(x, cast(U, x.dtype))
        ctx.save_for_backward(
            x if save_input and (train_core or train_weight) else None,  # (T, in), original space
            x_tilde if save_projected else None,  # (T, c), basis
            weight,  # (out, in), original space; the parameter itself, no copy
            W_formed if prefer == "speed" and ctx.needs_input_grad[0] else None,  # (out, in), original space
            core,  # (r, c) or (k,), basis; the parameter itself
            positions,
            U,
            V,
            scale_out,
            scale_in,
        )
        ctx.layer, ctx.formed = layer, W_formed is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (delta,) = grads  # δ (T, out)
        with without_autocast(delta.device):  # backward may be called inside an autocast that forward was not in
            x, x_tilde, weight, W_formed, core, positions, U, V, *scales = ctx.saved_tensors
            layer, tokens = ctx.layer, delta.shape[0]
            live = live_rows(delta)
            if live is not None:
                delta = delta[live]
                x, x_tilde = (None if saved is None else saved[live] for saved in (x, x_tilde))
            U_c, V_c = cast(U, delta.dtype), cast(V, delta.dtype)
            grad_x = grad_weight = grad_bias = grad_core = None
            delta_tilde = update = None  # δ Vᵀ (T, r), basis; the update's part of ∂L/∂x
            if ctx.needs_input_grad[0]:
                S = dense_core(core, positions, (layer.r, layer.c), tuple(scales))
                if W_formed is None and ctx.formed:
                    W_formed = _form(weight, S, U, V, delta.dtype)
                if W_formed is None:
                    if ctx.needs_input_grad[3] and _shares_delta_tilde(layer, delta, x_tilde):
                        delta_tilde = take(delta, V_c)
                    update = _update(_through(delta, delta_tilde, V_c), S.to(delta.dtype), U_c)
            if ctx.needs_input_grad[3]:
                left = (factor.T for factor in reversed(_through(delta, delta_tilde, V_c)))
                G_tilde = chain(*left, *_through(x, x_tilde, U_c)).to(at_least_float32(core.dtype))
                grad_core = scaled(G_tilde, tuple(scales)).to(core.dtype)
                if positions is not None:
                    grad_core = grad_core.reshape(-1)[positions.long()]
            del delta_tilde  # free it before ∂L/∂x (T, in) is made
            if ctx.needs_input_grad[0]:
                if update is None:
                    grad_x = delta @ W_formed
                else:
                    grad_x = _add_update(delta @ weight.to(delta.dtype), update, U_c)
                if live is not None:
                    grad_x = grad_x.new_zeros(tokens, grad_x.shape[1]).index_copy_(0, live, grad_x)
            if ctx.needs_input_grad[1]:
                grad_weight = (delta.T @ x).to(weight.dtype)  # G
            if ctx.needs_input_grad[2]:
                grad_bias = delta.sum(0)  # of δ, not of δ_tilde
        return grad_x, grad_weight, grad_bias, grad_core, *[None] * 6


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    positions: Tensor | None,
    U: Side,
    V: Side,
    scale_out: Tensor | None,
    scale_in: Tensor | None,
    prefer: Prefer,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `y` (T, out) and save nothing. Arguments as in `SparseGradFunction.forward`.

    Returns:
        `y`, and either `x_tilde` (T, c) or `W + Vᵀ S U` (out, in), in the type of `x`.
    """
    layer = _layer_shape(weight, U, V)
    S = dense_core(core, positions, (layer.r, layer.c), (scale_out, scale_in))
    if _forms(x.shape[0], layer, weight, prefer):
        W_formed = _form(weight, S, U, V, x.dtype)
        return functional.linear(x, W_formed, bias), None, W_formed
    x_tilde = take(x, cast(U, x.dtype))
    y = functional.linear(x, weight.to(x.dtype), bias)
    V = cast(V, x.dtype)
    return _add_update(y, _update((x_tilde,), S.T.to(x.dtype), V), V), x_tilde, None


def _layer_shape(weight: Tensor, U: Side, V: Side) -> LayerShape:
    out, in_ = weight.shape
    rotates_out, rotates_in = (side is not None and not is_selected(side) for side in (V, U))
    return LayerShape(out, in_, kept_count(V, out), kept_count(U, in_), rotates_out, rotates_in)


def _forms(tokens: int, layer: LayerShape, weight: Tensor, prefer: Prefer) -> bool:
    """True if `W + Vᵀ S U` is formed. It does not depend on gradient mode, so the output has the same bits in both."""
    # A sum with `W` in half precision would round the update away. (Under autocast `W` is float32, and the sum is
    # rounded only after the update has been added, as in any mixed-precision training.)
    return forms_update(tokens, layer, prefer, weight.dtype not in HALF_PRECISION)


def _form(weight: Tensor, S: Tensor, U: Side, V: Side, dtype: torch.dtype) -> Tensor:
    """Return `W + Vᵀ S U` (out, in) in the type to compute in.

    If that type is narrower than `W` (autocast), the products are computed in it and the sum is not: `W` rounded on its
    own would swallow a small update.
    """
    if dtype == weight.dtype:
        return form_weight(weight, S, U, V)
    return _add_update_to_weight(weight, S.to(dtype), cast(U, dtype), cast(V, dtype)).to(dtype)


def _add_update_to_weight(weight: Tensor, S: Tensor, U: Side, V: Side) -> Tensor:
    """Return `W + Vᵀ S U` in the type of `weight`; the products are computed in the type of `S`."""
    if not is_selected(U) and not is_selected(V):
        if S.dtype == weight.dtype:
            return add_chain(weight, None if V is None else V.T, S, U)
        return weight + chain(None if V is None else V.T, S, U)
    rows = chain(None if V is None or is_selected(V) else V.T, S, None if is_selected(U) else U).to(weight.dtype)
    formed = weight.clone(memory_format=torch.contiguous_format)
    if is_selected(U) and is_selected(V):
        return formed.index_put_((V.long()[:, None], U.long()), rows, accumulate=True)  # (r, c)
    if is_selected(U):
        return formed.index_add_(1, U, rows)  # (out, c)
    assert V is not None
    return formed.index_add_(0, V, rows)  # (r, in)


def _update(factors: tuple[Tensor, ...], S: Tensor, side: Side) -> tuple[Tensor, Tensor | None]:
    """The last product of `factors S side` (T, n), not yet computed. Along a selected side: its columns (T, k) only."""
    return (chain(*factors, S), None) if is_selected(side) else last_product(*factors, S, side)


def _add_update(y: Tensor, update: tuple[Tensor, Tensor | None], side: Side) -> Tensor:
    """Add what `_update` returns to `y` (T, n) in place."""
    left, right = update
    if is_selected(side):
        return y.scatter_add_(1, side.long().expand(left.shape), left)
    return add_chain(y, left, right, in_place=True)


def _through(z: Tensor, z_tilde: Tensor | None, side: Side) -> tuple[Tensor, ...]:
    """The factors of `z sideᵀ`: (z_tilde,) if it is there or costs no product, else (z, sideᵀ)."""
    if z_tilde is not None:
        return (z_tilde,)
    if side is None or is_selected(side):
        return (take(z, side),)
    return (z, side.T)


def _shares_delta_tilde(layer: LayerShape, delta: Tensor, x_tilde: Tensor | None) -> bool:
    return backward_through_factors(len(delta), layer, from_input=x_tilde is None)[1]
