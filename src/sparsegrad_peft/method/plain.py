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


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Make an `nn.Linear` from copies of a weight (out, in) and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
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
