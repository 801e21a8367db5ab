"""The weighted sum of adapters as a new one, `Σ wᵢ Vᵀ Sᵢ U = Vᵀ (Σ wᵢ Sᵢ) U`: exact where they have the same bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..method.basis import Basis
from .bases import layers_of
from .layer import SparseGradLayer

_REMEDY = (
    "a weighted sum is exact for adapters of the same layers and bases only (one calibration for both: "
    "calibrate_adapter(..., calibration=...)). Merge one after the other into the model, or convert them with "
    "peft.convert_to_lora and add those"
)


@torch.no_grad()
def add_weighted_sum(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """See `SparseGradModel.add_weighted_adapter`."""
    if adapter_name in tuner.peft_config:
        raise ValueError(f"there is an adapter named {adapter_name!r} already")
    if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"expected adapters and as many finite weights, found {list(adapters)} and {list(weights)}")
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"no adapter named {', '.join(unknown)}; there are {', '.join(tuner.peft_config)}")
    layers = [layers_of(tuner, name) for name in adapters]
    first = layers[0]
    for name, others in zip(adapters, layers, strict=True):
        different = set(first) ^ set(others)
        if different:
            raise ValueError(f"{adapters[0]!r} and {name!r} adapt other layers, such as {min(different)}; {_REMEDY}")
    for layer_name, layer in first.items():
        for name in adapters:
            if not _same(layer.core_and_basis(adapters[0])[1], layer.core_and_basis(name)[1]):
                raise ValueError(f"{adapters[0]!r} and {name!r} have other bases in {layer_name}; {_REMEDY}")
    _check_nothing_else(tuner, adapters)

    config = deepcopy(tuner.peft_config[adapters[0]])
    config.init_weights = True
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    copies: dict[int, Basis] = {}  # of its own: loading weights into the one adapter must not change the other
    for layer in first.values():
        basis = layer.core_and_basis(adapters[0])[1]
        layer.sparsegrad_basis[adapter_name] = copies.setdefault(id(basis), deepcopy(basis))
        core = _weighted(layer, adapters, weights)
        layer.sparsegrad_S[adapter_name] = nn.Parameter(core, requires_grad=False)  # not active yet


def _same(one: Basis, other: Basis) -> bool:
    """Whether two bases hold the same numbers."""
    pairs = ((one.U, other.U), (one.V, other.V))
    return one is other or all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def _weighted(layer: SparseGradLayer, adapters: Sequence[str], weights: Sequence[float]) -> Tensor:
    parts = [weight * layer.core_and_basis(name)[0] for name, weight in zip(adapters, weights, strict=True)]
    return torch.stack(parts).sum(0)


def _check_nothing_else(tuner: BaseTuner, adapters: Sequence[str]) -> None:
    for name in adapters:
        config = tuner.peft_config[name]
        if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
            wrapped = [key for key, module in tuner.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
            raise ValueError(
                f"{name!r} holds modules trained whole ({', '.join(wrapped)}), which cannot be summed; make the "
                "adapters without modules_to_save, trainable_token_indices and task_type, or merge one after the other"
            )
