"""Bases for a PEFT adapter: after `get_peft_model`, before the optimizer is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..method.calibrate import Calibration, CalibrationConfig, calibrate
from ..method.groups import group_linears
from .config import SparseGradConfig
from .layer import SparseGradLayer


def calibrate_adapter(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    adapter_name: str = "default",
    calibration: Calibration | None = None,
    config: CalibrationConfig | None = None,
    **options: Any,
) -> Calibration:
    """Give an adapter that has learnt nothing its bases, from a few steps of backpropagation.

    The core of each layer is then a new parameter of the size that the adapter's `c` and `r` ask for: make the
    optimizer afterwards. What is saved with the adapter is enough to load it; calibration is never needed again.

    Args:
        model: from `get_peft_model`, or any model with a SparseGrad adapter in it.
        batches: what the model takes, with labels: `model(**batch).loss`. See `sparsegrad_peft.calibrate`.
        adapter_name: which adapter.
        calibration: ready statistics, the result of an earlier call for the same layers, in place of batches.
        config: how to calibrate; or single fields of it among the options.
        options: for `sparsegrad_peft.calibrate`: `n_steps`, `step`, `loss_fn`, `progress`, ...

    Returns:
        The statistics, to be used again.

    Raises:
        ValueError: the model has no such adapter, the adapter has already learnt something, the statistics are of other
            layers, and whatever `calibrate` refuses.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer) and adapter_name in module.sparsegrad_S
    }
    if not layers:
        raise ValueError(f"the model has no SparseGrad adapter named {adapter_name!r}; make one with get_peft_model")
    learnt = [name for name, layer in layers.items() if bool(layer.sparsegrad_S[adapter_name].any())]
    if learnt:
        raise ValueError(
            f"adapter {adapter_name!r} has already learnt something ({len(learnt)} of {len(layers)} layers, such as "
            f"{learnt[0]}); calibrate before training, or merge it and add a new adapter"
        )
    peft_config: SparseGradConfig = model.peft_config[adapter_name]  # type: ignore[index, assignment]
    wrapped = {f"{name}.base_layer": name for name in layers}
    groups = group_linears(model, list(wrapped), shared=peft_config.shared)
    if calibration is None:
        calibration = calibrate(model, batches, groups=groups, config=config, **options)
    elif {name: tuple(names) for name, names in groups.items()} != {n: g.layers for n, g in calibration.groups.items()}:
        raise ValueError(f"the statistics are of groups {list(calibration.groups)}, the adapter has {list(groups)}")
    bases = calibration.bases(c=peft_config.c, r=peft_config.r)
    for group, names in groups.items():
        for name in names:
            layer = layers[wrapped[name]]
            layer.set_basis(adapter_name, bases[group])
            r, c = layer.sparsegrad_S[adapter_name].shape
            key = wrapped[name].removeprefix("base_model.model.")
            peft_config.core_shapes[key] = [group, r, c, layer.out_features, layer.in_features]
    return calibration
