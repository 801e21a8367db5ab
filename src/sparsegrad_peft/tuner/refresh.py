"""New bases for a PEFT adapter during training: the same update in other coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.calibrate import Calibration, calibrate
from ..method.config import CalibrationConfig
from ..method.precision import at_least_float32, exact_products
from ..method.processes import broadcast_from_rank0
from ..method.refresh import check_moments, rotate_moments
from ..method.sizes import Sizes
from .adapters import calibrated_names, config_of, configs_of, groups_of, layers_of, uncompiled
from .calibration import adapter_calibration, check_active, check_ready, frozen
from .experts import SparseGradExperts
from .layer import SparseGradLayer, check_unmerged


def refresh_adapter(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    adapter_name: str = "default",
    calibration: Calibration | None = None,
    config: CalibrationConfig | None = None,
    **options: Any,
) -> Calibration:
    """Give an adapter with complete bases new ones, from a few steps of backpropagation at the current weights.

    Bases age: after many steps they may hold less of the gradient (`docs/method.md`). What the adapter has learnt
    stays, `S' = V' Vᵀ S U U'ᵀ`, and the optimizer's moments are rotated with it (see `sparsegrad_peft.refresh` for
    layers of plain PyTorch).

    Under `torch.distributed` each process passes its own batches, and all of them call this. Pass the model that DDP
    wraps.

    Args:
        model: with a calibrated adapter in it.
        batches: inputs of the model with labels.
        optimizer: an Adam-like optimizer whose moments of the cores are rotated. None: there is none.
        adapter_name: which adapter. It must be active.
        calibration: ready statistics for the same layers, in place of batches.
        config: how to calibrate. None: as `calibrate_adapter` does, with single fields among the options.
        options: for `sparsegrad_peft.calibrate`.

    Returns:
        The statistics.

    Raises:
        ValueError: there is no such adapter, it is not active, not calibrated or merged, its bases are truncated, or
            the optimizer is not Adam-like or uses amsgrad; and whatever `calibrate` refuses. Nothing has changed then.
    """
    model = uncompiled(model)
    peft_config, layers = config_of(model, adapter_name), layers_of(model, adapter_name)
    if not all(config.calibrated for config in configs_of(model, adapter_name).values()):
        raise ValueError(f"adapter {adapter_name!r} is not calibrated; call calibrate_adapter")
    held = {name: layer.core_and_basis(adapter_name) for name, layer in layers.items()}
    _check_can_refresh(adapter_name, layers, held, optimizer)
    groups = groups_of(model, layers, shared=peft_config.shared)
    weights = calibrated_names(groups, layers)
    sizes = Sizes("full", "full", neurons=bool(peft_config.neurons))
    if calibration is None:
        config = adapter_calibration(config, options, peft_config.sizes)
        check_active(adapter_name, layers.values())
        with frozen(S for S, _ in held.values()):
            calibration = calibrate(model, batches, groups=weights, sizes=sizes, config=config, **options)
    else:
        check_ready(calibration, weights, batches, config, options)
    sides = (side for _, basis in held.values() for side in (basis.U, basis.V) if side is not None)
    dtype = next((side.dtype for side in sides if side.is_floating_point()), torch.float32)
    bases = calibration.bases(
        sizes=sizes, exponent=float(peft_config.exponent or 0), dtype=dtype,
        progress=bool(options.get("progress", True)),
    )  # fmt: skip
    _change_bases(groups, layers, held, bases, optimizer)
    return calibration


def _check_can_refresh(
    adapter_name: str,
    layers: Mapping[str, SparseGradLayer],
    held: Mapping[str, tuple[nn.Parameter, Basis]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    for name, (S, basis) in held.items():
        layers[name].check_numbers(adapter_name)
        if isinstance(layers[name], SparseGradExperts):
            raise ValueError(
                f"adapter {adapter_name!r} adapts fused experts ({name}), whose bases cannot be replaced during "
                "training; adapt them in an adapter of their own, or leave them out with target_parameters=[]"
            )
        if not basis.is_complete:
            raise ValueError(truncated(adapter_name))
        check_unmerged([layers[name]])
        if optimizer is not None:
            check_moments(optimizer, S)


def truncated(adapter_name: str) -> str:
    """Return the error message for an adapter whose bases are truncated."""
    return (
        f"adapter {adapter_name!r} has truncated bases, and new ones would have no room for all that it has learnt. "
        'Make it with c="full" and r="full"; or freeze it, add and calibrate a second adapter, and join the two with '
        'add_weighted_adapter(..., combination_type="cat")'
    )


@torch.no_grad()
def _change_bases(
    groups: Mapping[str, list[str]],
    layers: Mapping[str, SparseGradLayer],
    held: Mapping[str, tuple[nn.Parameter, Basis]],
    bases: Mapping[str, Basis],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Rotate the cores of each group, and their moments, into its new basis; then write the new basis over the old."""
    for group, names in groups.items():
        copies: dict[int, tuple[Basis, Basis]] = {}  # a shared basis has one on each device
        for name in names:
            layer, (S, old) = layers[name], held[name]
            if id(old) not in copies:
                copies[id(old)] = old, bases[group].on_device(S.device)
            new = copies[id(old)][1]
            with exact_products(S.device):
                core = new.coordinates(old.from_basis(S.to(at_least_float32(S.dtype))))
                if optimizer is not None:
                    rotate_moments(optimizer, S, old, new, (layer.out_features, layer.in_features))
            # All processes have the same bases; products with them are equal to the bit on equal machines only.
            state = {} if optimizer is None else optimizer.state.get(S, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = broadcast_from_rank0(value)
            S.copy_(broadcast_from_rank0(core))
        for old, new in copies.values():
            for side, value in new.named_buffers():
                there = getattr(old, side)
                if there is not None and there.shape == value.shape:
                    there.copy_(value)  # DistributedDataParallel keeps hold of it
                else:
                    setattr(old, side, value)
            old.layers = new.layers
