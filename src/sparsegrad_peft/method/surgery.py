"""Model surgery: replace linear layers by SparseGrad layers and back, and make the optimizer's groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from .basis import Basis, HoldsBasis, keep_saved
from .groups import check_same_groups
from .linear import SparseGradLinear
from .literal import LiteralSparseGradLinear
from .plain import as_conv1d, is_conv1d, share_call_hooks
from .precision import HALF_PRECISION

logger = logging.getLogger(__name__)

SparseGradLayer = SparseGradLinear | LiteralSparseGradLinear


def replace_linears(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    bases: Mapping[str, Basis],
    make: Callable[..., nn.Module] = SparseGradLinear.from_linear,
    **options: Any,
) -> dict[str, nn.Module]:
    """Replace the layers of each group in place. The layers of a group share its `Basis` module.

    The first layer of a group registers the basis and saves it, the others refer to it (`HoldsBasis`). Forward and
    backward hooks of a replaced layer stay.

    Args:
        model: changed in place.
        groups: group name -> layer names, from `group_linears`.
        bases: group name -> basis, from `Calibration.bases`.
        make: makes a layer from (linear, basis, **options): `SparseGradLinear.from_linear` or
            `LiteralSparseGradLinear.from_linear`.
        options: passed to `make`.

    Returns:
        Layer name -> new layer.

    Raises:
        ValueError: a group has no basis, or a layer does not exist, is named twice, or is the model itself.
        TypeError: a layer cannot be replaced (see `plain.check_replaceable`).
            In both cases, and whenever `make` fails, the model has not changed.
    """
    check_same_groups(groups, bases)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [name for layers in groups.values() for name in layers]:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise TypeError(f"{name}: torch.nn.MultiheadAttention reads its weight and never calls it; leave it out")
    names = [(name, group) for group, layers in groups.items() for name in layers]
    unknown = [name for name, _ in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no modules named {', '.join(unknown)}")
    chosen = [modules[name] for name, _ in names]
    twice = [name for name, _ in names if chosen.count(modules[name]) > 1]
    if twice:
        raise ValueError(f"expected each layer once in the groups, found it several times: {', '.join(twice)}")
    _check_not_root(model, chosen)
    on_device = cache(Basis.on_device)  # layers of a group on several devices have a copy on each
    new = {}
    for name, group in names:
        weight = getattr(modules[name], "weight", None)  # none: `make` says that it is no linear layer
        device = torch.device("cpu") if weight is None else weight.device
        new[name] = _made(name, partial(make, modules[name], on_device(bases[group], device), **options))
    registered = {one.basis for one in modules.values() if isinstance(one, HoldsBasis) and one.registers_basis}
    for name, layer in new.items():
        if isinstance(layer, HoldsBasis):
            layer.weight_trained = bool(modules[name].weight.requires_grad)
            layer.hold_basis(layer.basis, register=layer.basis not in registered)
            registered.add(layer.basis)
    _replace(model, {modules[name]: layer for name, layer in new.items()})
    return new


def restore_linears(model: nn.Module) -> int:
    """Replace every SparseGrad layer by a plain one with the trained weight, and return how many there were.

    The plain layer is an `nn.Linear`, or a `Conv1D` if the original was one, so that `save_pretrained` writes what
    GPT-2's classes load again. Its weight has the `requires_grad` of the weight that was replaced. An
    `nn.TransformerEncoderLayer` goes on without PyTorch's fast path; build a new one and load the state into it.

    Raises:
        ValueError: the model is itself the layer.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    _check_not_root(model, layers)
    for layer in layers:  # one by one: all plain weights at once would be a second copy
        _replace(model, {layer: _plain(layer)})
        layer.basis.holders.pop(layer, None)
        keep_saved(layer.basis)
    return len(layers)


def param_groups(
    model: nn.Module,
    *,
    k: int | None = None,
    density: float | None = None,
    lr: float | None = None,
    rest_lr: float | None = None,
    rest_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Make groups for `SparseGradAdamW`: the cores of the model's SparseGrad layers, and every other trained parameter.

    With `k` or `density`, each step selects entries of the blocks `S`; without them, blocks are trained whole. Packed
    `values` are trained whole. Literal layers select in their own backward. Selected entries have no weight decay.
    Cores that are trained whole, and every setting left at None, use the optimizer's value.

    Args:
        model: with SparseGrad layers, or with a PEFT adapter.
        k: entries of each block `S` that a step updates. None, and no density: all.
        density: the same as a share of `r c`.
        lr: learning rate of the cores.
        rest_lr: learning rate of the other trained parameters.
        rest_weight_decay: their weight decay.

    Returns:
        Groups for `SparseGradAdamW`, without empty ones.

    Raises:
        ValueError: the model has no SparseGrad layer with a trainable core.
    """
    cores: dict[str, list[nn.Parameter]] = {"block": [], "packed": [], "coo": []}
    for module in model.modules():
        for kind, core in getattr(module, "trained_cores", tuple)():  # each layer names its own
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
        {"params": packed, **core_options},
        {"params": rest, **{name: value for name, value in rest_options.items() if value is not None}},
    ]
    for group in candidates:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    _check_trains([core for group in candidates[:3] for core in group["params"]], len(own))
    return [group for group in candidates if group["params"]]


def _check_trains(cores: Sequence[nn.Parameter], count: int) -> None:
    """Raise if none of the model's `count` cores trains, and warn if those that train are in half precision."""
    if not count:
        raise ValueError(
            "the model has no SparseGrad layers; call replace_linears or, for a PEFT adapter, get_peft_model first"
        )
    if not cores:
        raise ValueError(
            f"all {count} cores of the model's SparseGrad layers are frozen; load a PEFT adapter with "
            "is_trainable=True, or activate it with set_adapter"
        )
    half = {core.dtype for core in cores} & {*HALF_PRECISION}
    if half:
        logger.warning(
            "the cores are %s, in which small steps change nothing; keep them in float32: cast the model before its "
            "layers are replaced, and leave autocast_adapter_dtype on", half.pop(),
        )  # fmt: skip


def weight_bases(
    model: nn.Module, groups: Mapping[str, Sequence[str]], bases: Mapping[str, Basis]
) -> dict[nn.Parameter, Basis]:
    """Return the basis of each layer's weight, for `SparseGradAdamW(bases=...)`, which trains the weights themselves.

    Each is on the device of its weight. A `Conv1D` stores its weight as (in, out), so its basis has the two sides
    exchanged.

    Args:
        model: with plain linear layers.
        groups: group name -> layer names, from `group_linears`.
        bases: group name -> basis, from `Calibration.bases`.

    Raises:
        ValueError: a group has no basis.
    """
    check_same_groups(groups, bases)
    on_device, exchange = cache(Basis.on_device), cache(_exchanged)
    found = {}
    for group, names in groups.items():
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            basis = on_device(bases[group], weight.device)
            found[weight] = exchange(basis) if is_conv1d(model.get_submodule(name)) else basis
    return found


def _exchanged(basis: Basis) -> Basis:
    # The optimizer refuses selected features and scales, so there is nothing else to exchange.
    return Basis(basis.V, basis.U) if basis.is_rotation else basis


def leave_fast_path(model: nn.Module, parent: nn.Module) -> None:
    """Make PyTorch's encoder layers call the layers inside them.

    In eval mode they read the weights of `linear1` and `linear2` instead, and would miss what was learnt beside the
    weight.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # an activation that the fast path does not know
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _made(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Call `make`, and name the layer if it is refused."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error


def _plain(layer: SparseGradLayer) -> nn.Module:
    linear = layer.to_linear()
    linear.weight.requires_grad_(layer.weight_trained)
    # Conv1D needs a bias.
    return linear if layer.conv1d is None or linear.bias is None else as_conv1d(linear, layer.conv1d)


def _check_not_root(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    if model in layers:
        raise ValueError(
            "the model is itself the layer, so it cannot be replaced in place; use the layer's from_linear or to_linear"
        )


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others under every name, since a layer may be used in several places."""
    for old, module in new.items():
        share_call_hooks(old, module)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])
            leave_fast_path(model, model.get_submodule(parent))
