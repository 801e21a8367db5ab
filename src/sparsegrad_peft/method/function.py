"""Step 4: forward and backward of `y = x (W + Vᵀ S U)ᵀ + b`, with a gradient for `S` and none for `W`.

    forward     y = x Wᵀ + b + x Uᵀ Sᵀ V                                  x (T, in), y (T, out)
    backward    ∂L/∂S = V δᵀ x Uᵀ,  ∂L/∂x = δ (W + Vᵀ S U),  ∂L/∂b = Σ δ    δ = ∂L/∂y (T, out)

`∂L/∂S` is `G_tilde = V G Uᵀ`. It is computed without the (out, in) gradient `G`. Three choices depend on the shapes
alone, and are made by counting multiply-adds (`costs.py`):

- With many tokens the update `Vᵀ S U` is *formed* and added to `W`, once in forward and once in backward. With few
  tokens it is applied through its *factors*.
- Backward through the factors uses `δ Vᵀ` (T, r) twice, and computes it once where that is cheaper.
- Backward needs the projected input `x_tilde = x Uᵀ` (T, c) or the input `x` (T, in). The smaller one is saved.

`prefer="speed"` saves the input and the formed weight from forward to backward wherever that lowers the multiply-adds.

Rows of `δ` that are exactly zero are left out of backward's products where it is cheap to find them (`live_rows.py`).
These are padding and, in the last block of a classifier, every token that is not read.

The optimizer's step and the selection are not here. `W` gets a gradient only if it asks for one, as in calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .costs import Prefer, backward_through_factors, forms_update, saves_input
from .live_rows import live_rows
from .precision import HALF_PRECISION, without_autocast
from .products import add_chain, chain


def dense_core(core: Tensor, positions: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return `S` (r, c): the block itself, or packed values (k) at their flat positions (k, int32) among zeros."""
    if positions is None:
        return core
    return core.new_zeros(shape[0] * shape[1]).index_copy_(0, positions.long(), core).view(shape)


def form_weight(weight: Tensor, S: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """Return `W + Vᵀ S U` (out, in), computed in the wider of the two types and rounded once to the type of `W`."""
    wide = torch.promote_types(weight.dtype, S.dtype)
    U, V = _cast(U, wide), _cast(V, wide)
    return add_chain(weight.to(wide), _transposed(V), S.to(wide), U).to(weight.dtype)


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
        U: Tensor | None,  # (c, in); None: identity
        V: Tensor | None,  # (r, out); None: identity
        core_shape: tuple[int, int],  # (r, c)
        prefer: Prefer,
    ) -> Tensor:  # (T, out)
        S = dense_core(core, positions, core_shape)
        train_weight, train_core = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        formed = _forms(x.shape[0], core_shape, weight, prefer)
        y, x_tilde, W_formed = _output(x, weight, bias, S, U, V, formed)

        save_input = train_weight or saves_input(x.shape[0], core_shape, _shape(weight), prefer)
        save_projected = train_core and not save_input
        if save_projected and x_tilde is None:
            x_tilde = _project(x, U)
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (delta,) = grads  # δ (T, out)
        with without_autocast(delta.device):  # backward may be called inside an autocast that forward was not in
            x, x_tilde, weight, W_formed, core, positions, U, V = ctx.saved_tensors
            tokens = delta.shape[0]
            live = live_rows(delta)
            if live is not None:
                delta = delta[live]
                x, x_tilde = (None if saved is None else saved[live] for saved in (x, x_tilde))
            U_c, V_c = _cast(U, delta.dtype), _cast(V, delta.dtype)
            grad_x = grad_weight = grad_bias = grad_core = None
            delta_tilde = None  # δ Vᵀ (T, r), basis
            if ctx.needs_input_grad[0]:
                S = dense_core(core, positions, ctx.core_shape)
                if W_formed is None and ctx.formed:
                    W_formed = _form(weight, S, U, V, delta.dtype)
                if W_formed is not None:
                    grad_x = delta @ W_formed
                else:
                    if ctx.needs_input_grad[3] and _shares_delta_tilde(ctx, delta, weight, x_tilde):
                        delta_tilde = _project(delta, V)
                    in_basis = (delta, _transposed(V_c)) if delta_tilde is None else (delta_tilde,)
                    plain = delta @ weight.to(delta.dtype)
                    grad_x = add_chain(plain, *in_basis, S.to(delta.dtype), U_c, in_place=True)
                if live is not None:
                    grad_x = grad_x.new_zeros(tokens, grad_x.shape[1]).index_copy_(0, live, grad_x)
            if ctx.needs_input_grad[1]:
                grad_weight = (delta.T @ x).to(weight.dtype)  # G
            if ctx.needs_input_grad[2]:
                grad_bias = delta.sum(0)  # of δ, not of δ_tilde
            if ctx.needs_input_grad[3]:
                left = (V_c, delta.T) if delta_tilde is None else (delta_tilde.T,)
                right = (x, _transposed(U_c)) if x_tilde is None else (x_tilde,)
                grad_core = chain(*left, *right).to(core.dtype)  # G_tilde
                if positions is not None:
                    grad_core = grad_core.reshape(-1)[positions.long()]
        return grad_x, grad_weight, grad_bias, grad_core, None, None, None, None, None


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
    """Return the output (T, out) and save nothing. Arguments as in `SparseGradFunction.forward`."""
    formed = _forms(x.shape[0], core_shape, weight, prefer)
    return _output(x, weight, bias, dense_core(core, positions, core_shape), U, V, formed)[0]


def _forms(tokens: int, core_shape: tuple[int, int], weight: Tensor, prefer: Prefer) -> bool:
    """True if `W + Vᵀ S U` is formed. It does not depend on gradient mode, so the output has the same bits in both."""
    if weight.dtype in HALF_PRECISION:
        # A sum with `W` would round the update away. (Under autocast `W` is float32, and the sum is rounded only after
        # the update has been added, as in any mixed-precision training.)
        return False
    return forms_update(tokens, core_shape, _shape(weight), prefer)


def _form(weight: Tensor, S: Tensor, U: Tensor | None, V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `W + Vᵀ S U` (out, in) in the type to compute in.

    If that type is narrower than `W` (autocast), the products are computed in it and the sum is not: `W` rounded on its
    own would swallow a small update.
    """
    if dtype == weight.dtype:
        return form_weight(weight, S, U, V)
    update = chain(_transposed(_cast(V, dtype)), S.to(dtype), _cast(U, dtype))
    return (weight + update).to(dtype)


def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    formed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return `y` (T, out), and either `x_tilde` (T, c) or `W + Vᵀ S U` (out, in), in the type of `x`."""
    if formed:
        W_formed = _form(weight, S, U, V, x.dtype)
        return functional.linear(x, W_formed, bias), None, W_formed
    x_tilde = _project(x, U)
    y = functional.linear(x, weight.to(x.dtype), bias)
    return add_chain(y, x_tilde, S.T.to(x.dtype), _cast(V, x.dtype), in_place=True), x_tilde, None


def _shares_delta_tilde(ctx: Any, delta: Tensor, weight: Tensor, x_tilde: Tensor | None) -> bool:
    return backward_through_factors(len(delta), ctx.core_shape, _shape(weight), from_input=x_tilde is None)[1]


def _project(x: Tensor, side: Tensor | None) -> Tensor:
    """Return `x Uᵀ`, or `x` itself if the side is the identity."""
    return x if side is None else x @ side.T.to(x.dtype)


def _cast(side: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if side is None else side.to(dtype)


def _transposed(side: Tensor | None) -> Tensor | None:
    return None if side is None else side.T


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
