"""New bases, or new positions, during training: what was learnt stays, and the optimizer's moments come along.

Bases age: after a hundred steps the gradient has left the directions it had at the start. A refresh takes new Gram
statistics, makes new bases (U', V') and moves everything that is written in the old ones:

    R_U = U' Uᵀ (c', c),   R_V = V' Vᵀ (r', r)
    S'        = V' (Vᵀ S U) U'ᵀ = R_V S R_Uᵀ
    exp_avg'  = R_V exp_avg R_Uᵀ                  a sum of gradients, so it turns as they do
    exp_avg_sq' = R_V² exp_avg_sq (R_U²)ᵀ         squares entry by entry: variances of uncorrelated entries, turned

With complete bases `S'` is `S` in other coordinates. With truncated ones a part of `Vᵀ S U` may lie outside the new
directions; that part is added to the frozen weight, so that the layer's output does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .basis import Basis
from .linear import SparseGradLinear, check_positions
from .optim import SparseGradAdamW
from .selection import resolve_k, topk_positions


@torch.no_grad()
def refresh(layers: Sequence[SparseGradLinear], basis: Basis, optimizer: SparseGradAdamW | None = None) -> list[float]:
    """Give layers that share a basis a new one; outputs, and all that was learnt, stay.

    Args:
        layers: SparseGrad layers of one group, not packed; all of it, or a part without its first layer, which saves
            the basis for the others.
        basis: the new basis, for layers of the same shape; its size may differ from the old one's.
        optimizer: whose moments for these layers are carried over. If the core changes its shape, so does the
            parameter, and the moments follow it.

    Returns:
        For each layer, the share of its update (in Frobenius norm) that was outside the new directions and is now part
        of its frozen weight, rounded to the weight's type; 0 for a complete basis.

    Raises:
        ValueError: a layer is packed, the basis does not fit, or the optimizer selects more entries than the new core
            has; nothing has been changed then.
    """
    for layer in layers:
        if layer.S is None:
            raise ValueError(
                "a packed layer keeps its positions in the old basis and cannot be given another; call fold() and "
                "unpack() first, then pack() new positions"
            )
        shape = basis.core_shape(layer.out_features, layer.in_features)
        if optimizer is not None:
            _check_k(optimizer, layer.S, shape)
    if not any(layer.registers_basis for layer in layers):
        layers[0].hold_basis(layers[0].basis, register=True)  # a part of a group: its new basis is saved here
    outside = []
    for layer in layers:
        assert layer.S is not None
        old, S = layer.basis, layer.S
        update = layer.delta_weight()  # (out, in), float32 at least
        S_new = basis.to_basis(update)
        share = 0.0
        if not basis.is_complete and update.any():
            remainder = update - basis.from_basis(S_new)
            share = float(remainder.norm() / update.norm())
            weight = (layer.weight + remainder).to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        outside.append(share)
        if optimizer is not None:
            rotate_moments(optimizer, S, old, basis, update.shape)
        layer.hold_basis(basis, register=layer.registers_basis)
        layer.core_shape = (S_new.shape[0], S_new.shape[1])
        _set_core(S, S_new.to(S.dtype).contiguous())
    return outside


@torch.no_grad()
def refresh_folded(optimizer: SparseGradAdamW, bases: Mapping[nn.Parameter, Basis]) -> None:
    """Give weights in the original space (`SparseGradAdamW(bases=...)`) new bases, moments carried over.

    Raises:
        ValueError: a parameter had no basis in this optimizer, or the new one does not fit.
    """
    for parameter, basis in bases.items():
        if parameter not in optimizer.bases:
            raise ValueError(f"the optimizer has no basis for a parameter of shape {tuple(parameter.shape)}")
        basis.core_shape(parameter.shape[0], parameter.shape[1])
    for parameter, basis in bases.items():
        rotate_moments(optimizer, parameter, optimizer.bases[parameter], basis, parameter.shape)
        optimizer.bases[parameter] = basis


@torch.no_grad()
def rotate_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, old: Basis, new: Basis, shape: Sequence[int]
) -> None:
    """Turn the moments of a core from one basis into another; `shape` is the layer's (out, in).

    In a `sparse` group the rotation spreads the moments of the touched entries over all; as many as there were, those
    of the largest second moment, are kept, and the others start again from zero when they are next selected.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    (r, c), (r_new, c_new) = old.core_shape(*shape), new.core_shape(*shape)
    R_U, R_V = _rotation(old.U, new.U), _rotation(old.V, new.V)
    sparse = "positions" in state

    def rotated(moment: Tensor, squared: bool) -> Tensor:
        if sparse:
            moment = moment.new_zeros(r * c).index_copy_(0, state["positions"].long(), moment).view(r, c)
        for R, side in ((R_V, 0), (R_U, 1)):
            if R is not None:
                R = (R.square() if squared else R).to(moment.dtype)
                moment = R @ moment if side == 0 else moment @ R.T
        return moment

    exp_avg, exp_avg_sq = rotated(state["exp_avg"], False), rotated(state["exp_avg_sq"], True)
    if sparse:
        count = min(state["positions"].numel(), r_new * c_new)
        positions = topk_positions(exp_avg_sq.reshape(-1), count)
        state["positions"] = positions.to(torch.int32)
        exp_avg, exp_avg_sq = exp_avg.reshape(-1)[positions], exp_avg_sq.reshape(-1)[positions]
    state["exp_avg"], state["exp_avg_sq"] = exp_avg, exp_avg_sq


def _check_k(optimizer: SparseGradAdamW, S: nn.Parameter, shape: tuple[int, int]) -> None:
    for group in optimizer.param_groups:
        if group["k"] is not None and any(parameter is S for parameter in group["params"]):
            resolve_k(shape[0] * shape[1], group["k"])


def _rotation(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new oldᵀ`, with None for the identity on either side."""
    if old is None or new is None:
        return new if old is None else old.T
    wide = torch.promote_types(old.dtype, new.dtype)
    return new.to(wide) @ old.to(wide).T


def _set_core(core: nn.Parameter, value: Tensor) -> None:
    """Write a value of any shape into a core; the parameter itself stays, for whoever holds it."""
    core.grad = None
    if value.shape != core.shape:
        # A graph that is still alive, as that of the last loss is, keeps autograd's record of the old shape, by which
        # the next gradient would be refused. Autograd drops the record when the data type changes.
        core.data = core.new_empty(0, dtype=torch.float32 if core.dtype == torch.float64 else torch.float64)
    core.data = value


@torch.no_grad()
def renew_positions(
    layer: SparseGradLinear, positions: Tensor, optimizer: SparseGradAdamW | None = None, *, fold: bool = True
) -> int:
    """Move a packed layer to other positions; entries that stay keep their values and moments.

    Args:
        layer: packed; `positions` may differ in number only without an optimizer.
        positions: (k,) flat row-major positions in (r, c).
        optimizer: whose moments are carried over; entries that are new start from zero moments.
        fold: True adds what was learnt at positions that are left to the frozen weight, so the output stays and the
            adapter alone is no longer the whole difference from the original; False drops it.

    Returns:
        How many positions are new.

    Raises:
        ValueError: the layer is not packed; the positions are out of range or repeated.
    """
    if layer.values is None or layer.positions is None:
        raise ValueError("expected a packed layer, found a block; call pack(positions)")
    r, c = layer.core_shape
    positions = check_positions(positions, r * c).to(layer.positions.device)
    if optimizer is not None and positions.numel() != layer.positions.numel():
        raise ValueError(
            f"with an optimizer the number of positions stays, found {positions.numel()} "
            f"in place of {layer.positions.numel()}"
        )
    old = layer.positions.long()
    stays = torch.isin(layer.positions, positions)
    if fold and layer.values[~stays].any():
        leaving = layer.values.new_zeros(r * c).index_copy_(0, old[~stays], layer.values[~stays].detach()).view(r, c)
        leaving = leaving.to(torch.promote_types(leaving.dtype, torch.float32))
        weight = (layer.weight + layer.basis.from_basis(leaving)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)

    def moved(per_entry: Tensor) -> Tensor:
        dense = per_entry.new_zeros(r * c).index_copy_(0, old[stays], per_entry[stays])
        return dense[positions.long()]

    if optimizer is not None:
        state = optimizer.state.get(layer.values, {})
        if "positions" in state:  # of a `sparse` group: moments of some of the values, at their places in `values`
            slots = state["positions"].long()
            kept = stays[slots]
            state["positions"] = torch.searchsorted(positions, layer.positions[slots[kept]]).to(torch.int32)
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"][kept], state["exp_avg_sq"][kept]
        elif state:
            state["exp_avg"], state["exp_avg_sq"] = moved(state["exp_avg"]), moved(state["exp_avg_sq"])
    _set_core(layer.values, moved(layer.values.detach()))
    new = int((~torch.isin(positions, layer.positions)).sum())
    layer.positions = positions
    return new
