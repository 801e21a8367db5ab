"""Plain linear layers, `torch.nn.Linear` and GPT-2's `Conv1D`, read and made in one layout: weight (out, in)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's `Conv1D`, a linear layer with its weight as (in, out). Does not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear`, its subclasses, and `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    """Return the weight as (out, in) and the bias of a plain linear layer; views, no copies.

    Raises:
        TypeError: another kind of module, or a weight that is not floating point.
    """
    if not is_linear(linear):
        raise TypeError(f"expected a torch.nn.Linear or a Conv1D, found {type(linear).__name__}")
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"expected a floating point weight (out, in), found {weight.dtype} of shape {tuple(weight.shape)}"
        )
    return (weight.T if is_conv1d(linear) else weight), bias  # type: ignore[return-value]


def check_replaceable(linear: nn.Module) -> None:
    """Raise if a layer does more than `x Wᵀ + b`, which a SparseGrad layer in its place would drop.

    Raises:
        TypeError: not a linear layer; a subclass or wrapper with a forward of its own; a computed weight or bias.
    """
    weight_and_bias(linear)
    kind = type(linear).__name__
    own_forward = "forward" in vars(linear)  # as accelerate's hooks for offloading have it
    if own_forward or (isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward):
        raise TypeError(
            f"expected a plain linear layer, found a {kind} with a forward of its own, which a SparseGrad layer would "
            "drop; leave this layer out, or unwrap it first"
        )
    for name, value in (("weight", linear.weight), ("bias", linear.bias)):
        if value is not None and not isinstance(value, nn.Parameter):
            raise TypeError(
                f"expected a {kind} with a {name} of its own, found one that is computed (by a parametrization, weight "
                "norm or pruning); remove that first"
            )
    if any(vars(linear).get(name) for name in _STATE_DICT_HOOKS):
        raise TypeError(f"expected a {kind} without hooks on its state dict, whose keys change; remove them first")


_CALL_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip
_STATE_DICT_HOOKS = (
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


def share_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Call a module's forward and backward hooks on another too. The handles that remove them keep working."""
    for name in _CALL_HOOKS:
        vars(target)[name] = vars(source)[name]


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Make an `nn.Linear` with a weight (out, in) and a copy of a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def as_conv1d(linear: nn.Linear, conv1d: type[nn.Module]) -> nn.Module:
    """Make the same layer with its weight as (in, out), as GPT-2's classes and their checkpoints have it."""
    with torch.device("meta"):
        layer = conv1d(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    layer.bias = linear.bias
    return layer.train(linear.training)
