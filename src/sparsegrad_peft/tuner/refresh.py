"""New bases for a PEFT adapter in mid-training: the same update in other coordinates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.calibrate import Calibration, calibrate
from ..method.config import CalibrationConfig
from ..method.processes import broadcast_from_rank0
from ..method.refresh import rotate_moments
from ..method.sizes import Sizes
from .bases import layers_of, on_device, wrapped_groups
from .calibration import check_groups, config_from, frozen
from .config import SparseGradConfig

_COMPLETE = Sizes("full", "full")


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
    """Give an adapter with complete bases new ones, from a few steps of backpropagation at the weights as they are now.

    Bases age (`docs/method.md`): after a hundred steps the gradient has left the directions that it had when they were
    made. What the adapter has learnt stays, `S' = V' Vᵀ S U U'ᵀ`, and the optimizer's moments are turned along (see
    `sparsegrad_peft.refresh`, which does this for the layers of plain PyTorch).

    Under `torch.distributed` each process passes its own batches, and all of them call this. Pass the
    model that DDP wraps.

    Truncated bases are refused: what was learnt lies in the old directions, and the new ones have no room for all of
    it. Freeze the adapter, add and calibrate a second one, and join the two at the end with
    `add_weighted_adapter(..., combination_type="cat")`.

    Args:
        model: with a calibrated adapter in it.
        batches: what the model takes, with labels.
        optimizer: whose moments of the cores are carried over; of Adam's kind. None: none.
        adapter_name: which adapter.
        calibration: ready statistics for the same layers, in place of batches.
        config: how to calibrate; None: as `calibrate_adapter` does, with single fields among the options.
        options: for `sparsegrad_peft.calibrate`.

    Returns:
        The statistics.

    Raises:
        ValueError: there is no such adapter, it has no bases yet or truncated ones, it is merged, or the optimizer is
            not of Adam's kind; and whatever `calibrate` refuses. Nothing has been changed then.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose names of layers are its own
    layers = layers_of(model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no SparseGrad adapter named {adapter_name!r}; make one with get_peft_model")
    peft_config: SparseGradConfig = model.peft_config[adapter_name]  # type: ignore[index, assignment]
    if not peft_config.calibrated:
        raise ValueError(f"adapter {adapter_name!r} has no bases to renew; call calibrate_adapter")
    held = {name: layer.core_and_basis(adapter_name) for name, layer in layers.items()}
    for name, (S, basis) in held.items():
        if not basis.is_complete:
            raise ValueError(truncated(adapter_name))
        if layers[name].merged:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() first")
        state = {} if optimizer is None else optimizer.state.get(S, {})
        if state and not {"exp_avg", "exp_avg_sq"} <= state.keys():
            raise ValueError(
                "expected an optimizer with moments, such as SparseGradAdamW or AdamW; found "
                f"{type(optimizer).__name__}"
            )
    groups = wrapped_groups(model, layers, shared=peft_config.shared)
    if calibration is None:
        config = config_from(config, options)
        with frozen(S for S, _ in held.values()):
            calibration = calibrate(model, batches, groups=groups, sizes=_COMPLETE, config=config, **options)
    else:
        check_groups(calibration, groups)
    dtype = next(side.dtype for _, basis in held.values() for side in (basis.U, basis.V) if side is not None)
    bases = calibration.bases(sizes=_COMPLETE, dtype=dtype, progress=bool(options.get("progress", True)))
    for group, names in groups.items():
        copies: dict[int, tuple[Basis, Basis]] = {}  # a shared basis has one on each device
        for wrapped in names:
            name = wrapped.removesuffix(".base_layer")
            layer, (S, old) = layers[name], held[name]
            new = copies.setdefault(id(old), (old, on_device(S.device, bases[group])))[1]
            _turn(S, old, new, optimizer, (layer.out_features, layer.in_features))
        for old, new in copies.values():
            for side, value in new.named_buffers():
                there = getattr(old, side)
                if there is not None and there.shape == value.shape:
                    there.copy_(value)  # DistributedDataParallel keeps hold of it
                else:
                    setattr(old, side, value)
            old.layers = new.layers
    return calibration


def truncated(adapter_name: str) -> str:
    """What to say of an adapter that cannot have new bases."""
    return (
        f"adapter {adapter_name!r} has truncated bases, and new ones would have no room for all that it has learnt; "
        'make it with c="full" and r="full". Or freeze it, add and calibrate a second adapter, and join the two with '
        'add_weighted_adapter(..., combination_type="cat")'
    )


@torch.no_grad()
def _turn(
    S: nn.Parameter, old: Basis, new: Basis, optimizer: torch.optim.Optimizer | None, shape: tuple[int, int]
) -> None:
    update = old.from_basis(S.to(torch.promote_types(S.dtype, torch.float32)))
    if optimizer is not None:
        rotate_moments(optimizer, S, old, new, shape)
        for name, value in optimizer.state.get(S, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[S][name] = broadcast_from_rank0(value)
    # The bases are equal to the bit on every process; products with them are so only on equal machines.
    S.copy_(broadcast_from_rank0(new.to_basis(update)))
