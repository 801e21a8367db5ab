"""Which linear layers there are, how large they are, and which of them share a basis."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from .linear import SparseGradLinear, is_conv1d


def linear_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a linear layer, however it stores its weight.

    Raises:
        TypeError: the module is no linear layer that SparseGrad knows.
    """
    if isinstance(module, nn.Linear | SparseGradLinear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[1], weight.shape[0]
    raise TypeError(f"{name}: expected a torch.nn.Linear or a Conv1D, found {type(module).__name__}")


def group_linears(
    model: nn.Module, target_modules: Iterable[str] | str | None = None, *, shared: bool = True
) -> dict[str, list[str]]:
    """Names of the model's linear layers, grouped by role and shape.

    Two layers have the same role when their names differ in the numbers of blocks only: `layer.0.output.dense` and
    `layer.5.output.dense` form the group `layer.*.output.dense`. The last part of a name is a block's number in a
    `ModuleList` alone: the layers `mlp.0` and `mlp.2` of a `Sequential` have roles of their own.

    Args:
        model: where to look.
        target_modules: which linear layers, in PEFT's manner: a list of name endings (`["fc1", "mlp.fc2"]`), a regular
            expression for the whole name, or None for every linear layer. `nn.MultiheadAttention`'s `out_proj` is
            none of them.
        shared: True gives the layers of a group one basis (the paper); False makes each layer its own group.

    Returns:
        Group name -> layer names, both in the order of the model.

    Raises:
        ValueError: nothing matches; the message lists linear layers that there are.
    """
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    unused = {f"{name}.out_proj".lstrip(".") for name in attention}  # its weight is read, and it is never called
    linears = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | SparseGradLinear) or is_conv1d(module)) and name not in unused
    }
    chosen = [name for name in linears if _matches(name, target_modules)]
    if not chosen:
        some = ", ".join(list(linears)[:8]) or "none at all"
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer; the model has: {some}")
    groups: dict[str, list[str]] = {}
    for name in chosen:
        role = _role(model, name) if shared else name
        groups.setdefault(role, []).append(name)
    split: dict[str, list[str]] = {}
    for role, names in groups.items():
        shapes = {linear_shape(linears[name], name) for name in names}
        for name in names:
            out_features, in_features = linear_shape(linears[name], name)
            key = role if len(shapes) == 1 else f"{role} ({out_features}x{in_features})"
            split.setdefault(key, []).append(name)
    return split


def _role(model: nn.Module, name: str) -> str:
    parent, _, last = name.rpartition(".")
    blocks = re.sub(r"(?<![^.])\d+(?![^.])", "*", parent)
    numbered = last.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList)
    return f"{blocks}{'.' if parent else ''}{'*' if numbered else last}"


def _matches(name: str, target_modules: Iterable[str] | str | None) -> bool:
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in target_modules)
