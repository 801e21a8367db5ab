"""Which linear layers a model has, their shapes, and which of them share a basis."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from .linear import SparseGradLinear
from .plain import is_conv1d, is_linear


def linear_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return (out, in) of a linear layer, in whichever layout it stores its weight.

    Raises:
        TypeError: the module is not a linear layer that SparseGrad knows.
    """
    if isinstance(module, nn.Linear | SparseGradLinear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[1], weight.shape[0]
    raise TypeError(f"{name}: expected a torch.nn.Linear or a Conv1D, found {type(module).__name__}")


def matches_target(name: str, target_modules: Iterable[str] | str | None) -> bool:
    """True if a layer's name is one of `target_modules`, by PEFT's rule.

    A string is a regular expression for the whole name. A list holds names or their endings after a dot: `"fc1"`
    matches `mlp.fc1` and not `mlp.xfc1`. None matches every name.
    """
    if target_modules is None:
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in target_modules)


def group_linears(
    model: nn.Module, target_modules: Iterable[str] | str | None = None, *, shared: bool = True
) -> dict[str, list[str]]:
    """Group the names of the model's linear layers by role and shape.

    Two layers have the same role if their names differ only in block numbers: `layer.0.output.dense` and
    `layer.5.output.dense` form the group `layer.*.output.dense`. The last part of a name counts as a block number only
    in a `ModuleList`: the layers `mlp.0` and `mlp.2` of a `Sequential` have different roles.

    Args:
        model: where to look.
        target_modules: which linear layers, see `matches_target`; None takes them all, without those whose weight is
            also another module's, such as an output layer tied to the embeddings. The `out_proj` of an
            `nn.MultiheadAttention` is never taken, since that module reads its weight and does not call it.
        shared: True gives the layers of a group one basis (the paper), False makes each layer its own group.

    Returns:
        Group name -> layer names, both in the model's order.

    Raises:
        ValueError: nothing matches; the message lists some of the model's linear layers.
    """
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    never_called = {f"{name}.out_proj".lstrip(".") for name in attention}
    linears = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, SparseGradLinear) or is_linear(module)) and name not in never_called
    }
    if isinstance(target_modules, Iterator):  # the first name would use it up
        target_modules = list(target_modules)
    tied = tied_weights(model) if target_modules is None else {}
    chosen = [
        name for name, module in linears.items()
        if matches_target(name, target_modules) and id(getattr(module, "weight", None)) not in tied
    ]  # fmt: skip
    if not chosen:
        some = ", ".join(list(linears)[:8]) or "none at all"
        raise ValueError(f"target_modules={target_modules!r} matches no linear layer; the model has: {some}")
    by_role: dict[str, list[str]] = {}
    for name in chosen:
        by_role.setdefault(role_of(model, name) if shared else name, []).append(name)
    groups: dict[str, list[str]] = {}
    for role, names in by_role.items():
        shapes = {name: linear_shape(linears[name], name) for name in names}
        for name, (out_features, in_features) in shapes.items():
            key = role if len(set(shapes.values())) == 1 else f"{role} ({out_features}x{in_features})"
            groups.setdefault(key, []).append(name)
    return groups


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the ids of the parameters that belong to several modules, with the names of these modules."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for value in module._parameters.values():
            if value is not None:
                owners.setdefault(id(value), []).append(name)
    return {number: names for number, names in owners.items() if len(names) > 1}


def check_same_groups(groups: Mapping[str, object], bases: Mapping[str, object]) -> None:
    """Raise ValueError unless there is one basis for each group."""
    if set(groups) != set(bases):
        raise ValueError(f"expected a basis for each group, found groups {sorted(groups)} and bases {sorted(bases)}")


def role_of(model: nn.Module, name: str) -> str:
    """Return a layer's name with `*` in place of block numbers."""
    parent, _, last = name.rpartition(".")
    blocks = re.sub(r"(?<![^.])\d+(?![^.])", "*", parent)
    numbered = last.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList)
    return f"{blocks}{'.' if parent else ''}{'*' if numbered else last}"
