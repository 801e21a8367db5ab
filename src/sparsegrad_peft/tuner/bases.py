"""Which layers of an adapter share a basis, and how an adapter without bases gets them: from calibration or a file."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.groups import group_linears
from .config import SparseGradConfig
from .layer import SparseGradLayer
from .peft_private import PREFIX

ROOT = "base_model.model."
"""What PEFT puts before the names of a model's layers, in a `PeftModel` and in files."""

BASIS, CORE = f".{PREFIX}basis.", f".{PREFIX}S"


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseGradLayer]:
    """The layers that an adapter adapts, by their names in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_S
    }


def layer_key(model: nn.Module, name: str) -> str:
    """The name of a layer in the model that was adapted, without what PEFT and FSDP put before it."""
    name = name.removeprefix("_fsdp_wrapped_module.")
    return name.removeprefix("model." if isinstance(model, BaseTuner) else ROOT)


def wrapped_groups(model: nn.Module, layers: Mapping[str, SparseGradLayer], *, shared: bool) -> dict[str, list[str]]:
    """Group -> names of the layers within the adapted ones, whose weights calibration looks at."""
    return group_linears(model, [f"{name}.base_layer" for name in layers], shared=shared)


def set_bases(model: nn.Module, adapter_name: str, groups: Mapping[str, list[str]], bases: Mapping[str, Basis]) -> None:
    """Give the layers of each group (see `wrapped_groups`) its basis, and write the shapes into the configuration.

    The cores are new parameters: an optimizer that was made before holds the old ones. Where the layers of a group are
    on several devices (`device_map`), each device gets one copy of the basis.
    """
    # A copy: PEFT keeps the object that the user made, and may make another adapter with.
    config: SparseGradConfig = copy(model.peft_config[adapter_name])  # type: ignore[index, assignment]
    config.core_shapes = {}
    model.peft_config[adapter_name] = config  # type: ignore[index, operator]
    layers = layers_of(model, adapter_name)
    for group, names in groups.items():
        copies: dict[torch.device, Basis] = {}
        for wrapped in names:
            name = wrapped.removesuffix(".base_layer")
            layer = layers[name]
            device = layer.device_of(adapter_name)
            if device not in copies:
                copies[device] = on_device(device, bases[group])
            layer.set_basis(adapter_name, copies[device])
            r, c = layer.sparsegrad_S[adapter_name].shape
            config.core_shapes[layer_key(model, name)] = [group, r, c, layer.out_features, layer.in_features]


def on_device(device: torch.device, basis: Basis) -> Basis:
    """The basis itself if it is there, else a copy: `.to` would move it away from under the other layers."""
    return basis if all(buffer.device == device for buffer in basis.buffers()) else deepcopy(basis).to(device)


def make_room(model: nn.Module, config: SparseGradConfig, adapter_name: str, entries: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not belong to the adapter; give an adapter that has no bases those of the weights' sizes.

    The latter is what resuming needs: `Trainer` loads the checkpoint into the adapter that the script has just made.

    Args:
        model: with the adapter in it.
        config: of the adapter.
        adapter_name: which adapter.
        entries: what a file of an adapter holds, see `SparseGradModel`.

    Raises:
        ValueError: the weights are of another model; of an adapter that was not calibrated, for one that was; or with
            bases, for one that is to have none or shares them otherwise. Nothing has been changed then.
    """
    cores = {key.removesuffix(CORE).removeprefix(ROOT): value for key, value in entries.items() if key.endswith(CORE)}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in entries.items():
        if BASIS in key:
            holder, _, side = key.removeprefix(ROOT).partition(BASIS)
            sides.setdefault(holder, {})[side] = value
    if not cores:  # modules to save, or a part of an adapter
        return
    layers = layers_of(model, adapter_name)
    _check_layers(cores, {layer_key(model, name) for name in layers}, complete=bool(sides) and not config.calibrated)
    if config.calibrated and not sides:
        raise ValueError(
            f"adapter {adapter_name!r} is calibrated, the weights are of one that is not: whole layers, without bases. "
            "Load them under another name (load_adapter), or into an adapter that was not calibrated"
        )
    if not sides:
        return
    if config.original_space:
        raise ValueError(
            f"adapter {adapter_name!r} trains in the original space (original_space=True), the weights come with "
            "bases; make the adapter with original_space=False to load them"
        )
    if config.calibrated:  # the bases have their place; loading into it says itself if a shape differs
        for group in {shape[0] for shape in config.core_shapes.values()}:
            keys = [key for key, shape in config.core_shapes.items() if shape[0] == group]
            given = _basis_of(keys, sides, config)
            for name, layer in layers.items():  # not to be rounded to the type that the room was made in
                if layer_key(model, name) in keys:
                    room = layer.core_and_basis(adapter_name)[1]
                    for side, value in given.items():
                        setattr(room, side, getattr(room, side).to(value.dtype))
        return
    groups = wrapped_groups(model, layers, shared=config.shared)
    bases = {}
    for group, wrapped in groups.items():
        members = {layer_key(model, name := w.removesuffix(".base_layer")): layers[name] for w in wrapped}
        basis = _basis_of(list(members), sides, config)
        bases[group] = _room(basis["U"], basis["V"], members)
    set_bases(model, adapter_name, groups, bases)


def _basis_of(
    members: list[str], sides: Mapping[str, dict[str, Tensor]], config: SparseGradConfig
) -> dict[str, Tensor]:
    """The one basis among the weights that belongs to a group of layers."""
    holders = [sides[key] for key in members if key in sides]
    if len(holders) != 1:
        raise ValueError(
            f"the weights hold {len(holders) or 'no'} bases for the layers {', '.join(members[:3])}, and the adapter "
            f"has shared={config.shared}: make it with shared={not config.shared} to load them"
        )
    return holders[0]


def _room(U: Tensor, V: Tensor, members: Mapping[str, SparseGradLayer]) -> Basis:
    found = (V.shape[1], U.shape[1])
    for key, layer in members.items():
        if found != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the adapter belongs to another model: {key} has (out, in) = {found} there and "
                f"({layer.out_features}, {layer.in_features}) here"
            )
    return Basis.allocate(r=len(V), c=len(U), out_features=found[0], in_features=found[1], dtype=U.dtype)


def _check_layers(found: Mapping[str, Tensor], here: set[str], *, complete: bool) -> None:
    """Raise where the weights have layers that the adapter has not; or, if they must be complete, lack some."""
    for what, which in (("has no", set(found) - here), ("also has", here - set(found) if complete else set())):
        if which:
            one = next((name for name in found if name in which), min(which))
            shape = f" (its core there: {tuple(found[one].shape)})" if one in found else ""
            raise ValueError(
                f"the adapter belongs to another model: it was made for {len(found)} layers, such as "
                f"{next(iter(found))}, and this one with {len(here)} adapted layers {what} {one}{shape}"
            )
