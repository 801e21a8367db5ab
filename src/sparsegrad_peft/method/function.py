"""Step 4: forward and backward of `y = x (W + Vᵀ S U)ᵀ + b`, with a gradient for `S` and none for `W`.

    forward     y = x Wᵀ + b + x Uᵀ Sᵀ V                                  x (T, in), y (T, out)
    backward    ∂L/∂S = V δᵀ x Uᵀ,  ∂L/∂x = δ (W + Vᵀ S U),  ∂L/∂b = Σ δ    δ = ∂L/∂y (T, out)

`∂L/∂S` is `G_tilde = V G Uᵀ`, formed without the (out, in) gradient `G`. Three choices are left, and they are made
from shapes by counting multiply-adds or bytes:

- the update `Vᵀ S U` is *formed* and added to `W`, once in forward and once in backward, where there are many tokens,
  and applied through its *factors* where there are few;
- through the factors, backward needs `δ Vᵀ` (T, r) in two places, and makes it once where that is cheaper;
- backward needs the projected input `x_tilde = x Uᵀ` (T, c) or the input `x` (T, in). The smaller is saved.

`prefer="speed"` saves the input and the formed weight wherever that lowers the multiply-adds, at the price of holding
both from forward to backward.

Rows of `δ` that are exactly zero (padding, and in the last block of a classifier every token that is not read) are left
out of backward's products, where looking for them is cheap: see `live_rows.py`.

No step of the optimizer, no selection, and no gradient of `W` (unless `W` itself asks for one, as calibration does) is
in here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .live_rows import live_rows
from .products import add_chain, chain, chain_cost

Prefer = Literal["memory", "speed"]


def dense_core(core: Tensor, positions: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`S` (r, c): the block itself, or packed values (k) put at their flat positions (k, int32)."""
    if positions is None:
        return core
    return core.new_zeros(shape[0] * shape[1]).index_copy_(0, positions.long(), core).view(shape)


def form_weight(weight: Tensor, S: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """`W + Vᵀ S U` (out, in), computed in the wider of the two types and rounded once to the type of `W`."""
    wide = torch.promote_types(weight.dtype, S.dtype)
    U, V = None if U is None else U.to(wide), None if V is None else V.to(wide)
    return add_chain(weight.to(wide), None if V is None else V.T, S.to(wide), U).to(weight.dtype)


def _formed(weight: Tensor, S: Tensor, U: Tensor | None, V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`W + Vᵀ S U` (out, in) in the type to compute in.

    Where that is narrower (autocast), the products are made in it, as all others are. The sum is not: `W` rounded by
    itself would swallow a small update.
    """
    if dtype == weight.dtype:
        return form_weight(weight, S, U, V)
    update = chain(None if V is None else V.T.to(dtype), S.to(dtype), None if U is None else U.to(dtype))
    return (weight + update).to(dtype)


def _forms(tokens: int, core_shape: tuple[int, int], weight: Tensor, prefer: Prefer) -> bool:
    """Whether forming `W + Vᵀ S U` takes fewer multiply-adds, forward and backward, than going through its factors.

    The same answer with and without gradients, so that both give the same bits.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        # `W` in half precision has no room for a small update: 2⁻⁹ of an entry would be rounded away. (Under
        # autocast `W` is float32 and the rounding of the sum is unbiased, as in any mixed-precision training.)
        return False
    (r, c), (out, in_) = core_shape, weight.shape
    formings = 1 if prefer == "speed" else 2
    formed = formings * chain_cost(out, r, c, in_) + chain_cost(r, out, tokens, c)
    return formed < chain_cost(tokens, c, r, out) + backward_through_factors(tokens, core_shape, weight.shape)[0]


def backward_through_factors(tokens: int, core_shape: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, bool]:
    """Multiply-adds of backward's `δ Vᵀ S U` and `V δᵀ x_tilde`; whether they are fewest with `δ Vᵀ` made for both."""
    (r, c), (out, in_) = core_shape, shape
    apart = chain_cost(tokens, out, r, c, in_) + chain_cost(r, out, tokens, c)
    together = tokens * out * r + chain_cost(tokens, r, c, in_) + r * tokens * c
    return min(apart, together), together < apart


def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    formed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`y` (T, out), and what was made on the way: `x_tilde` (T, c) or `W + Vᵀ S U` (out, in), in the type of `x`."""
    if formed:
        W_formed = _formed(weight, S, U, V, x.dtype)
        return functional.linear(x, W_formed, bias), None, W_formed
    x_tilde = x if U is None else x @ U.T.to(x.dtype)
    y = functional.linear(x, weight.to(x.dtype), bias)
    return (
        add_chain(y, x_tilde, S.T.to(x.dtype), None if V is None else V.to(x.dtype), in_place=True),
        x_tilde,
        None,
    )


def output_without_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    positions: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    core_shape: tuple[int, int],
    prefer: Prefer,
) -> Tensor:
    """The forward pass where nothing is saved for backward. Arguments as in `SparseGradFunction.forward`."""
    formed = _forms(x.shape[0], core_shape, weight, prefer)
    return _output(x, weight, bias, dense_core(core, positions, core_shape), U, V, formed)[0]


class SparseGradFunction(torch.autograd.Function):
    """See the module's text. All matrices are 2-D; `T` counts tokens, batch and sequence flattened."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, in), in the type to compute in
        weight: Tensor,  # (out, in), frozen, its own type
        bias: Tensor | None,  # (out,), in the type to compute in
        core: Tensor,  # S (r, c), or packed values (k)
        positions: Tensor | None,  # (k,) int32, flat positions in (r, c); None: core is S
        U: Tensor | None,  # (c, in); None: identity
        V: Tensor | None,  # (r, out); None: identity
        core_shape: tuple[int, int],  # (r, c)
        prefer: Prefer,
    ) -> Tensor:  # (T, out)
        S = dense_core(core, positions, core_shape)
        train_weight, train_core = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        formed = _forms(x.shape[0], core_shape, weight, prefer)
        y, x_tilde, W_formed = _output(x, weight, bias, S, U, V, formed)

        save_input = train_weight or _saves_input(x.shape[0], core_shape, weight, prefer)
        save_projected = train_core and not save_input
        if save_projected and x_tilde is None:
            x_tilde = x if U is None else x @ U.T.to(x.dtype)
        ctx.save_for_backward(
            x if save_input and (train_core or train_weight) else None,  # (T, in), original space
            x_tilde if save_projected else None,  # (T, c), basis
            weight,  # (out, in), original space; the parameter itself, no copy
            W_formed if prefer == "speed" and ctx.needs_input_grad[0] else None,  # (out, in), original space
            core,  # (r, c) or (k,), basis; the parameter itself
            positions,
            U,
            V,
        )
        ctx.core_shape, ctx.formed = core_shape, formed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (delta,) = grads  # δ (T, out)
        x, x_tilde, weight, W_formed, core, positions, U, V = ctx.saved_tensors
        tokens = delta.shape[0]
        live = live_rows(delta)
        if live is not None:
            delta = delta[live]
            x, x_tilde = (None if saved is None else saved[live] for saved in (x, x_tilde))
        V_c = None if V is None else V.to(delta.dtype)
        U_c = None if U is None else U.to(delta.dtype)
        grad_x = grad_weight = grad_bias = grad_core = None
        delta_tilde = None  # δ Vᵀ (T, r), basis
        if ctx.needs_input_grad[0]:
            if W_formed is None and ctx.formed:
                W_formed = _formed(weight, dense_core(core, positions, ctx.core_shape), U, V, delta.dtype)
            if W_formed is not None:
                grad_x = delta @ W_formed
            else:
                S = dense_core(core, positions, ctx.core_shape).to(delta.dtype)
                if ctx.needs_input_grad[3] and backward_through_factors(len(delta), ctx.core_shape, weight.shape)[1]:
                    delta_tilde = delta if V_c is None else delta @ V_c.T
                in_basis = (delta, None if V_c is None else V_c.T) if delta_tilde is None else (delta_tilde,)
                grad_x = add_chain(delta @ weight.to(delta.dtype), *in_basis, S, U_c, in_place=True)
            if live is not None:
                grad_x = grad_x.new_zeros(tokens, grad_x.shape[1]).index_copy_(0, live, grad_x)
        if ctx.needs_input_grad[1]:
            grad_weight = (delta.T @ x).to(weight.dtype)  # G
        if ctx.needs_input_grad[2]:
            grad_bias = delta.sum(0)  # of δ, not of δ_tilde
        if ctx.needs_input_grad[3]:
            left = (V_c, delta.T) if delta_tilde is None else (delta_tilde.T,)
            right = (x, None if U_c is None else U_c.T) if x_tilde is None else (x_tilde,)
            G_tilde = chain(*left, *right)
            grad_core = G_tilde.to(core.dtype)
            if positions is not None:
                grad_core = grad_core.reshape(-1)[positions.long()]
        return grad_x, grad_weight, grad_bias, grad_core, None, None, None, None, None


def _saves_input(tokens: int, core_shape: tuple[int, int], weight: Tensor, prefer: Prefer) -> bool:
    """Whether backward gets `x` (T, in) or `x Uᵀ` (T, c)."""
    (r, c), (out, in_) = core_shape, weight.shape
    if c == in_:  # no smaller; and `x` may be kept for another layer anyway
        return True
    if prefer == "memory":
        return False
    return chain_cost(r, out, tokens, in_, c) < tokens * in_ * c + chain_cost(r, out, tokens, c)
