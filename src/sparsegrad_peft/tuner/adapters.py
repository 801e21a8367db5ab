"""Finding an adapter: the module that holds it, its layers, and their names in the model and in files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..method.groups import group_linears
from .config import SparseGradConfig, uncompiled_name
from .experts import SparseGradExperts
from .layer import SparseGradLayer
from .peft_private import PREFIX

ROOT = "base_model.model."
"""What PEFT puts before the names of a model's layers, in a `PeftModel` and in files."""

BASIS, CORE = f".{PREFIX}basis.", f".{PREFIX}S"
"""How the names of bases' and cores' tensors go on after the layer's name, in files."""


def configs_of(model: nn.Module, adapter_name: str) -> dict[str, SparseGradConfig]:
    """Return the configurations of an adapter, by the names of the parts of the model that hold it.

    Usually the only part is the model itself, under the name "". A wrapper such as a `SentenceTransformer` holds its
    `PeftModel` as a part, and a dual encoder may hold two.

    Raises:
        ValueError: there is no such adapter.
    """
    configs: dict[str, SparseGradConfig] = {}
    for part in dict.fromkeys(holder_of(model, name) for name in layers_of(model, adapter_name)):
        held: Any = {} if part is None else model.get_submodule(part).peft_config
        if part is not None and adapter_name in held:
            configs[part] = held[adapter_name]
    if not configs:
        known = ", ".join(dict.fromkeys(name for layer in all_layers(model) for name in layer.sparsegrad_S))
        raise ValueError(
            f"the model has no SparseGrad adapter named {adapter_name!r}; "
            + (f"name one that it has, {known}, as adapter_name" if known else "make one with get_peft_model")
        )
    return configs


def config_of(model: nn.Module, adapter_name: str) -> SparseGradConfig:
    """Return the configuration of a SparseGrad adapter of the model, or of a part of it.

    If several parts hold the adapter, it is the first one's; they differ only in the layers that they are for.

    Raises:
        ValueError: there is no such adapter, or it has different forms in different parts.
    """
    configs = configs_of(model, adapter_name)
    (first, config), *others = configs.items()
    for name, other in others:
        if other.form != config.form:
            raise ValueError(
                f"the adapters {adapter_name!r} of {first} and {name} have different forms: {config.form} and "
                f"{other.form}. Make both with the same settings; or calibrate each part alone, with a loss_fn of it"
            )
    return config


def holder_of(model: nn.Module, name: str) -> str | None:
    """Return the name of the outermost part of the model around a layer that holds SparseGrad adapters.

    None if there is none: adapters that are being made are not yet in a `PeftModel`.
    """
    parts = name.split(".")
    for number in range(len(parts) + 1):
        part = ".".join(parts[:number])
        module = model.get_submodule(part)
        if "_orig_mod" in module._modules:  # of torch.compile, which passes on the attributes of what it wraps
            continue
        held = getattr(module, "peft_config", None) or {}
        if any(isinstance(config, SparseGradConfig) for config in held.values()):
            return part
    return None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return what `torch.compile`, or accelerate's `compile_regions`, made a compiled model of; others as they are."""
    # Not getattr: a `PeftModel` passes on the attributes of what it wraps.
    found: nn.Module = {**vars(model), **model._modules}.get("_orig_mod", model)
    return found


def all_layers(model: nn.Module) -> list[SparseGradLayer]:
    """Return the layers of all adapters."""
    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseGradLayer]:
    """Return the layers of an adapter, by their names in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_S
    }


def layer_key(model: nn.Module, name: str) -> str:
    """Return the name of an adapted weight in files and configurations, from the name of its layer in the model.

    It has no prefixes of wrappers, PEFT and FSDP, and nothing of `torch.compile`. For fused experts it is the
    parameter's name.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, SparseGradLayer)
    return layer.key(uncompiled_name(_path_in_adapted(model, name)))


def _path_in_adapted(model: nn.Module, name: str) -> str:
    holder = holder_of(model, name)
    if holder:
        return _path_in_adapted(model.get_submodule(holder), name.removeprefix(f"{holder}."))
    name = name.removeprefix("_fsdp_wrapped_module.")
    return name.removeprefix("model." if isinstance(model, BaseTuner) else ROOT)


def paths_and_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return path -> key of the layers whose name in PEFT's state dict is not their key: of experts, or compiled."""
    names = layers_of(model, adapter_name)
    paths = {_path_in_adapted(model, name): layer_key(model, name) for name in names}
    return {path: key for path, key in paths.items() if path != key}


def groups_of(model: nn.Module, layers: Mapping[str, SparseGradLayer], *, shared: bool) -> dict[str, list[str]]:
    """Return group -> names of the layers that share a basis. The experts of a parameter are a group of their own."""
    experts = [name for name, layer in layers.items() if isinstance(layer, SparseGradExperts)]
    linears = {layer.calibrated_name(name): name for name, layer in layers.items() if name not in experts}
    exactly = "|".join(map(re.escape, linears))  # a list would match endings, and so other adapters' layers
    found = group_linears(model, exactly, shared=shared) if linears else {}
    groups = {group: [linears[wrapped] for wrapped in names] for group, names in found.items()}
    return groups | {layer_key(model, name): [name] for name in experts}


def calibrated_names(groups: Mapping[str, list[str]], layers: Mapping[str, SparseGradLayer]) -> dict[str, list[str]]:
    """Return group -> names of the weights within its layers whose gradients `calibrate` takes."""
    return {group: [layers[name].calibrated_name(name) for name in names] for group, names in groups.items()}


def active_configs(model: nn.Module) -> dict[str, list[SparseGradConfig]]:
    """Return the configurations of the active SparseGrad adapters, by name; one of each part that holds the adapter."""
    layers = all_layers(model)
    active = dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in layer.sparsegrad_S)
    return {name: list(configs_of(model, name).values()) for name in active}


def calibrated(model: nn.Module) -> list[str]:
    """Return the names of the active SparseGrad adapters that are calibrated."""
    return [name for name, parts in active_configs(model).items() if all(config.calibrated for config in parts)]


def uncalibrated(model: nn.Module) -> list[str]:
    """Return the names of the active SparseGrad adapters that are still to be calibrated, as a whole or in part."""
    configs = active_configs(model).items()
    return [
        name for name, parts in configs if any(not config.calibrated and not config.original_space for config in parts)
    ]


def widen_cores(model: nn.Module) -> None:
    """Give cores that a trainer has cast to half precision float32 again, unless half precision was asked for."""
    for layer in all_layers(model):
        layer.widen_cores()


def adapter_parameters(model: nn.Module) -> tuple[set[int], bool]:
    """Return the ids of an adapter's parameters, and whether they are SparseGrad cores.

    Modules that are trained whole beside the adapter, such as a head, are not included.
    """
    cores = {id(core) for module in model.modules() for _, core in getattr(module, "trained_cores", tuple)()}
    if cores:
        return cores, True
    prompts = getattr(model, "prompt_encoder", None)  # prefix tuning and other prompt-learning methods
    if isinstance(prompts, nn.Module):
        return {id(parameter) for parameter in prompts.parameters()}, False
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    names = {name for layer in layers for name in layer.adapter_layer_names}
    children = [getattr(layer, name, None) for layer in layers for name in names]
    modules = [child for child in children if isinstance(child, nn.Module)]
    return {id(parameter) for child in modules for parameter in child.parameters()}, False
