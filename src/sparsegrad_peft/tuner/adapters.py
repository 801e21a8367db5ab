"""Finding an adapter: the module that holds it, its layers, and their names in the model and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..method.groups import group_linears
from .config import SparseGradConfig
from .experts import SparseGradExperts
from .layer import SparseGradLayer
from .peft_private import PREFIX

ROOT = "base_model.model."
"""What PEFT puts before the names of a model's layers, in a `PeftModel` and in files."""

BASIS, CORE = f".{PREFIX}basis.", f".{PREFIX}S"
"""How the names of bases' and cores' tensors go on after the layer's name, in files."""


def holder_of(model: nn.Module) -> tuple[str, Any] | None:
    """Return name and module of the first part of a model that holds PEFT adapters, such as a `PeftModel`.

    This is the model itself, or a part of a wrapper such as a `SentenceTransformer`. None if there is none.
    """
    for name, module in model.named_modules():
        if getattr(module, "peft_config", None):
            return name, module
    return None


def config_of(model: nn.Module, adapter_name: str) -> SparseGradConfig:
    """Return the configuration of a SparseGrad adapter of the model, or of a part of it.

    Raises:
        ValueError: there is no such adapter.
    """
    holder = holder_of(model)
    configs = holder[1].peft_config if holder else {}
    if not isinstance(configs.get(adapter_name), SparseGradConfig):
        known = ", ".join(name for name, config in configs.items() if isinstance(config, SparseGradConfig))
        raise ValueError(
            f"the model has no SparseGrad adapter named {adapter_name!r}; "
            + (f"name one that it has, {known}, as adapter_name" if known else "make one with get_peft_model")
        )
    config: SparseGradConfig = configs[adapter_name]
    return config


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseGradLayer]:
    """Return the layers of an adapter, by their names in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_S
    }


def layer_key(model: nn.Module, name: str) -> str:
    """Return the name of an adapted weight in files and configurations, from the name of its layer in the model.

    It has no prefixes of wrappers, PEFT and FSDP. For fused experts it is the parameter's name.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, SparseGradLayer)
    return layer.key(_path_in_adapted(model, name))


def _path_in_adapted(model: nn.Module, name: str) -> str:
    holder = holder_of(model)
    if holder is not None and holder[0]:
        return _path_in_adapted(holder[1], name.removeprefix(f"{holder[0]}."))
    name = name.removeprefix("_fsdp_wrapped_module.")
    return name.removeprefix("model." if isinstance(model, BaseTuner) else ROOT)


def paths_and_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return path -> key of the layers whose name in PEFT's state dict is not their key: those of fused experts."""
    names = layers_of(model, adapter_name)
    paths = {_path_in_adapted(model, name): layer_key(model, name) for name in names}
    return {path: key for path, key in paths.items() if path != key}


def groups_of(model: nn.Module, layers: Mapping[str, SparseGradLayer], *, shared: bool) -> dict[str, list[str]]:
    """Return group -> names of the layers that share a basis. The experts of a parameter are a group of their own."""
    experts = [name for name, layer in layers.items() if isinstance(layer, SparseGradExperts)]
    linears = {layer.calibrated_name(name): name for name, layer in layers.items() if name not in experts}
    found = group_linears(model, list(linears), shared=shared) if linears else {}
    groups = {group: [linears[wrapped] for wrapped in names] for group, names in found.items()}
    return groups | {layer_key(model, name): [name] for name in experts}


def calibrated_names(groups: Mapping[str, list[str]], layers: Mapping[str, SparseGradLayer]) -> dict[str, list[str]]:
    """Return group -> names of the weights within its layers whose gradients `calibrate` takes."""
    return {group: [layers[name].calibrated_name(name) for name in names] for group, names in groups.items()}


def active_configs(model: nn.Module) -> dict[str, SparseGradConfig]:
    """Return the configurations of the active SparseGrad adapters, by name."""
    layers = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    active = dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in layer.sparsegrad_S)
    return {name: config_of(model, name) for name in active}


def calibrated(model: nn.Module) -> list[str]:
    """Return the names of the active SparseGrad adapters that are calibrated."""
    return [name for name, config in active_configs(model).items() if config.calibrated]


def uncalibrated(model: nn.Module) -> list[str]:
    """Return the names of the active SparseGrad adapters that are still to be calibrated."""
    configs = active_configs(model).items()
    return [name for name, config in configs if not config.calibrated and not config.original_space]


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
