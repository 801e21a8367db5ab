"""Model surgery: linear layers replaced by SparseGrad layers and put back, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .basis import Basis, HoldsBasis
from .linear import SparseGradLinear
from .literal import LiteralSparseGradLinear
from .plain import as_conv1d

SparseGradLayer = SparseGradLinear | LiteralSparseGradLinear


def replace_linears(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    bases: Mapping[str, Basis],
    make: Callable[..., nn.Module] = SparseGradLinear.from_linear,
    **options: Any,
) -> dict[str, nn.Module]:
    """Replace the layers of each group in place; the layers of a group share its `Basis` module.

    The first layer of a group registers the basis, the others refer to it (`HoldsBasis`): it is saved once.

    Args:
        model: changed in place.
        groups: group name -> layer names, from `group_linears`.
        bases: group name -> basis, from `Calibration.bases`.
        make: makes a layer from (linear, basis, **options): `SparseGradLinear.from_linear` or
            `LiteralSparseGradLinear.from_linear`.
        options: for `make`.

    Returns:
        Layer name -> new layer.

    Raises:
        ValueError: a group has no basis, a layer does not exist, is named twice or is the model itself; nothing has
            been replaced then, nor if `make` fails.
    """
    if set(groups) != set(bases):
        raise ValueError(f"expected a basis for each group, found groups {sorted(groups)} and bases {sorted(bases)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [(name, group) for group, layers in groups.items() for name in layers]
    unknown = [name for name, _ in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no modules named {', '.join(unknown)}")
    chosen = [modules[name] for name, _ in names]
    twice = [name for name, _ in names if chosen.count(modules[name]) > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} stand for one layer in two groups, or twice in one")
    _check_not_root(model, chosen)
    made = {name: make(modules[name], bases[group], **options) for name, group in names}
    registered: set[Basis] = set()
    for layer in made.values():  # the first layer of a group saves its basis, see HoldsBasis
        if isinstance(layer, HoldsBasis):
            layer.hold_basis(layer.basis, register=layer.basis not in registered)
            registered.add(layer.basis)
    _replace(model, {modules[name]: layer for name, layer in made.items()})
    return made


def restore_linears(model: nn.Module) -> int:
    """Replace every SparseGrad layer by a plain one with the trained weight; returns how many there were.

    An `nn.Linear`; a `Conv1D` where it had taken the place of one, so that `save_pretrained` writes what
    GPT-2's classes load again.
    """
    found = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    _check_not_root(model, found)
    _replace(model, {module: _plain(module) for module in found})
    return len(found)


def param_groups(
    model: nn.Module,
    *,
    k: int | None = None,
    density: float | None = None,
    lr: float | None = None,
    rest_lr: float | None = None,
    rest_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for `SparseGradAdamW`: the cores of the model's SparseGrad layers, and the rest of what trains.

    Blocks `S` are selected from in each step (`k` or `density`); packed `values` are trained whole, without weight
    decay; `W_tilde` of literal layers brings its own selection. With neither `k` nor `density`, blocks are trained
    whole as well. A learning rate or weight decay that is None is the optimizer's.

    Raises:
        ValueError: the model has no SparseGrad layer with a trainable core.
    """
    cores: dict[str, list[nn.Parameter]] = {"block": [], "packed": [], "coo": []}
    for module in model.modules():
        for kind, core in getattr(module, "trained_cores", tuple)():  # the layer says what is its own
            cores[kind].append(core)
    blocks, packed, literal = cores.values()
    if k is None and density is None:
        packed, blocks = packed + blocks, []
    own = {id(parameter) for parameter in (*blocks, *packed, *literal)}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    core_options = {} if lr is None else {"lr": lr}
    rest_options = {"lr": rest_lr, "weight_decay": rest_weight_decay}
    candidates: list[dict[str, Any]] = [
        {"params": blocks, "sparse": True, "k": k, "density": density, **core_options},
        {"params": literal, "sparse": True, **core_options},
        {"params": packed, "weight_decay": 0.0, **core_options},
        {"params": rest, **{name: value for name, value in rest_options.items() if value is not None}},
    ]
    for group in candidates:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    if not any(group["params"] for group in candidates[:3]):
        raise ValueError("the model has no SparseGrad layer with a trainable core; call replace_linears first")
    return [group for group in candidates if group["params"]]


def _plain(layer: SparseGradLayer) -> nn.Module:
    linear = layer.to_linear()
    # Conv1D's own forward wants a bias
    return linear if layer.conv1d is None or linear.bias is None else as_conv1d(linear, layer.conv1d)


def _check_not_root(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    if model in layers:
        raise ValueError("the model is itself the layer, nothing holds it; use the layer's from_linear or to_linear")


def leave_fast_path(model: nn.Module, parent: nn.Module) -> None:
    """Make PyTorch's encoder layers call the layers in them. In eval mode they read the weights of `linear1` and
    `linear2` instead, and what was learnt beside the weight would not count.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # an activation that the fast path does not know
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name: a layer may be used in several places."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])
            leave_fast_path(model, model.get_submodule(parent))
