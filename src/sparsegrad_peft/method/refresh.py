"""New bases, or new positions, during training: what was learnt and the optimizer's moments are carried over.

Bases of gradients at the starting point age: after a hundred steps they hold much less of the gradient. A refresh takes
new Gram statistics, makes new bases (U', V'), and moves everything that is written in the old ones:

    R_U = U' Uᵀ (c', c),   R_V = V' Vᵀ (r', r)
    S'          = V' (Vᵀ S U) U'ᵀ = R_V S R_Uᵀ
    exp_avg'    = R_V exp_avg R_Uᵀ                a sum of gradients, which rotates as they do
    exp_avg_sq' = R_V² exp_avg_sq (R_U²)ᵀ         entry by entry squared: variances of uncorrelated entries, rotated

With complete bases `S'` is `S` in other coordinates. With truncated bases a part of `Vᵀ S U` may lie outside the new
directions. That part is added to the frozen weight, so the layer's output does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .basis import Basis, keep_saved
from .function import dense_core
from .linear import SparseGradLinear, check_positions, set_core
from .optim import SparseGradAdamW
from .precision import at_least_float32, exact_products
from .selection import resolve_k, topk_positions
from .sides import Side, as_matrix, cast, scaled, take


@torch.no_grad()
def refresh(layers: Sequence[SparseGradLinear], basis: Basis, optimizer: SparseGradAdamW | None = None) -> list[float]:
    """Give layers that share a basis a new one. Their output and what they learnt stay.

    Args:
        layers: SparseGrad layers of one group, not packed. If some of the group are left out, they keep the old basis.
        basis: the new basis, for layers of the same shape; its size may differ from the old one's. Layers on another
            device share a copy of it.
        optimizer: its moments for these layers are carried over. If the core changes its shape, so does the parameter,
            and the moments follow.

    Returns:
        For each layer, the share of its update (in Frobenius norm) that was outside the new directions and is now part
        of its frozen weight, rounded to the weight's type; 0 for a complete basis.

    Raises:
        ValueError: a layer is packed or its weight trains, the basis does not fit, the optimizer selects more entries
            than the new core has, or it holds moments that do not rotate. Nothing has changed then.
    """
    for layer in layers:
        if layer.S is None:
            raise ValueError(
                "a packed layer keeps its positions in the old basis and cannot be given another; call fold() and "
                "unpack() first, then pack() new positions, and make a new optimizer: the core is a new parameter"
            )
        layer.check_frozen()
        shape = basis.core_shape(layer.out_features, layer.in_features)
        if optimizer is not None:
            check_moments(optimizer, layer.S)
            _check_k(optimizer, layer.S, shape)
    old_bases = {layer.basis for layer in layers}
    outside, on_device = [], cache(Basis.on_device)
    for layer in layers:
        assert layer.S is not None
        old, S, new = layer.basis, layer.S, on_device(basis, layer.weight.device)
        with exact_products(layer.weight.device):
            update = layer.delta_weight()  # (out, in), float32 at least
            S_new = new.coordinates(update)
            share = 0.0
            if not new.is_complete and update.any():
                remainder = update - new.from_basis(S_new)
                share = float(remainder.norm() / update.norm())
                layer.set_weight(layer.weight + remainder)
            outside.append(share)
            if optimizer is not None:
                rotate_moments(optimizer, S, old, new, update.shape)
        saved = any(holder.registers_basis for holder in new.holders if holder is not layer)
        layer.hold_basis(new, register=not saved)
        layer.core_shape = (S_new.shape[0], S_new.shape[1])
        set_core(S, S_new.to(S.dtype).contiguous())
    for old in old_bases:
        keep_saved(old)
    return outside


_MOMENTS = {"step", "positions", "exp_avg", "exp_avg_sq"}


def check_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Raise unless the parameter's state is Adam's, or empty.

    Raises:
        ValueError: it holds something that does not rotate with a basis, such as amsgrad's `max_exp_avg_sq`, or no
            moments.
    """
    names = {name for name, value in optimizer.state.get(parameter, {}).items() if value is not None}
    if names and (names - _MOMENTS or not {"exp_avg", "exp_avg_sq"} <= names):
        raise ValueError(
            f"a refresh carries over the state of Adam (exp_avg, exp_avg_sq), found {', '.join(sorted(names))} in "
            f"{type(optimizer).__name__}; use SparseGradAdamW, or AdamW with amsgrad=False"
        )


@torch.no_grad()
def rotate_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, old: Basis, new: Basis, shape: Sequence[int]
) -> None:
    """Rotate the moments of a core from one basis into another; `shape` is the layer's (out, in).

    In a `sparse` group the rotation spreads the moments of the touched entries over all entries. As many as before are
    kept, those with the largest second moment. The others start again from zero when they are next selected.

    Raises:
        ValueError: see `check_moments`.
    """
    check_moments(optimizer, parameter)
    state = optimizer.state.get(parameter)
    if not state:
        return
    (r, c), (r_new, c_new) = old.core_shape(*shape), new.core_shape(*shape)
    R_U = _rotation(old.U, new.U, shape[1])
    R_V = _rotation(old.V, new.V, shape[0])
    sparse = "positions" in state

    def rotated(moment: Tensor, squared: bool) -> Tensor:
        if sparse:
            moment = moment.new_zeros(r * c).index_copy_(0, state["positions"].long(), moment).view(r, c)
        moment = _scale_moment(moment, old, squared, inverse=True)
        for R, side in ((R_V, 0), (R_U, 1)):
            if R is not None:
                R = (R.square() if squared else R).to(moment.dtype)
                moment = R @ moment if side == 0 else moment @ R.T
        return _scale_moment(moment, new, squared)

    exp_avg, exp_avg_sq = rotated(state["exp_avg"], False), rotated(state["exp_avg_sq"], True)
    if sparse:
        count = min(state["positions"].numel(), r_new * c_new)
        positions = topk_positions(exp_avg_sq.reshape(-1), count)
        state["positions"] = positions.to(torch.int32)
        exp_avg, exp_avg_sq = exp_avg.reshape(-1)[positions], exp_avg_sq.reshape(-1)[positions]
    state["exp_avg"], state["exp_avg_sq"] = exp_avg, exp_avg_sq


@torch.no_grad()
def renew_positions(
    layer: SparseGradLinear, positions: Tensor, optimizer: SparseGradAdamW | None = None, *, fold: bool = True
) -> int:
    """Move a packed layer to other positions. Entries that stay keep their values and moments.

    Args:
        layer: packed; the number of `positions` may change only without an optimizer.
        positions: (k,) flat row-major positions in (r, c).
        optimizer: its moments are carried over; new entries start from zero moments.
        fold: True adds what was learnt at dropped positions to the frozen weight, rounded to its type. The output then
            stays, and the adapter alone is no longer the whole difference from the original. False drops it.

    Returns:
        How many positions are new.

    Raises:
        ValueError: the layer is not packed, the positions are out of range or repeated, or the optimizer holds moments
            that cannot be carried over. Nothing has changed then.
    """
    if layer.values is None or layer.positions is None:
        raise ValueError("expected a packed layer, found a block; call pack(positions)")
    if fold:
        layer.check_frozen()
    r, c = layer.core_shape
    positions = check_positions(positions, r * c).to(layer.positions.device)
    if optimizer is not None:
        if positions.numel() != layer.positions.numel():
            raise ValueError(
                f"with an optimizer the number of positions stays, found {positions.numel()} "
                f"in place of {layer.positions.numel()}"
            )
        check_moments(optimizer, layer.values)
    stays = torch.isin(layer.positions, positions)
    slots = torch.searchsorted(positions, layer.positions)  # of each old position among the new ones, if it stays

    def moved(per_value: Tensor) -> Tensor:
        return per_value.new_zeros(positions.numel()).index_copy_(0, slots[stays], per_value[stays])

    values = layer.values.detach()
    if fold and values[~stays].any():
        dropped = dense_core(torch.where(stays, 0, values), layer.positions, layer.core_shape)
        update = layer.basis.from_basis(dropped.to(at_least_float32(dropped.dtype)))
        layer.set_weight(layer.weight + update)
    state = {} if optimizer is None else optimizer.state.get(layer.values, {})
    if "positions" in state:  # of a `sparse` group: moments of some of the values, at their places in `values`
        touched = state["positions"].long()
        kept = stays[touched]
        state["positions"] = slots[touched[kept]].to(torch.int32)
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"][kept], state["exp_avg_sq"][kept]
    elif state:
        state["exp_avg"], state["exp_avg_sq"] = moved(state["exp_avg"]), moved(state["exp_avg_sq"])
    set_core(layer.values, moved(values))
    layer.positions = positions
    return int(positions.numel() - stays.sum())


def _check_k(optimizer: SparseGradAdamW, S: nn.Parameter, shape: tuple[int, int]) -> None:
    for group in optimizer.param_groups:
        if group.get("k") is not None and any(parameter is S for parameter in group["params"]):
            resolve_k(shape[0] * shape[1], group["k"])


def _rotation(old: Side, new: Side, features: int) -> Tensor | None:
    """`new oldᵀ` (k', k), with None for the identity."""
    if old is None and new is None:
        return None
    dtype = torch.float32
    for side in (old, new):
        dtype = torch.promote_types(dtype, side.dtype) if side is not None and side.is_floating_point() else dtype
    return take(as_matrix(new, features, dtype, None if old is None else old.device), cast(old, dtype))


def _scale_moment(moment: Tensor, basis: Basis, squared: bool, *, inverse: bool = False) -> Tensor:
    """Take a moment of the scaled gradient of a core from (`inverse`) or to one of `V G Uᵀ`."""
    power = (2 if squared else 1) * (-1 if inverse else 1)
    scale_out, scale_in = (None if scale is None else scale**power for scale in basis.scales)
    return scaled(moment, (scale_out, scale_in))
