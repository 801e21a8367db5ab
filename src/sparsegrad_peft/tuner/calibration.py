"""Calibrated bases for a PEFT adapter: after `get_peft_model`, before training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..method.calibrate import Calibration, calibrate
from ..method.config import CalibrationConfig, resolve_config
from ..method.ddp import exclude_bases_from_ddp
from ..method.processes import gathered, is_distributed
from ..method.sizes import Sizes
from .adapters import all_layers, calibrated_names, config_of, groups_of, layers_of, uncompiled
from .bases import set_bases, warn_of_few_entries
from .config import SparseGradConfig
from .layer import SparseGradLayer, check_unmerged

logger = logging.getLogger(__name__)

LARGE_BASES = 1e9
"""Bytes of a model's bases from which on calibration says how to make them smaller."""


def calibrate_adapter(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    adapter_name: str = "default",
    calibration: Calibration | None = None,
    config: CalibrationConfig | None = None,
    **options: Any,
) -> Calibration:
    """Replace an adapter's data-free bases by bases of the model's gradients, from a few steps of backpropagation.

    The adapter must not have learnt anything yet. Its cores stay zero and stay the same parameters, so an optimizer may
    exist already. The saved adapter includes the bases; calibration is never needed again.

    Under `torch.distributed` every process calls this with its own batches, before DDP wraps the model, and before or
    after `fully_shard` (FSDP2). All get the bases of the whole batches.

    Args:
        model: from `get_peft_model`, or any model with a SparseGrad adapter in it or in a part of it.
        batches: inputs of the model with labels: `model(**batch).loss`. See `sparsegrad_peft.calibrate`.
        adapter_name: which adapter. It must be active: the gradients are those of the model with its active adapters.
        calibration: ready statistics in place of batches: the result of an earlier call for the same layers.
        config: how to calibrate. None: `CalibrationConfig()`, with single fields of it among the options. The paper's
            way is `CalibrationConfig.paper()`.
        options: for `sparsegrad_peft.calibrate`: `n_steps`, `step`, `loss_fn`, `progress`, ...

    Returns:
        The statistics. They can be used again for adapters of this size or smaller (see `sizes` of `calibrate`).

    Raises:
        ValueError: the model has no such adapter, the adapter is not active, trains in the original space or has
            already learnt something, an adapter is merged, the statistics are of other layers or stand beside batches
            or options, and whatever `calibrate` refuses.
        TypeError: the layers are quantized, and no ready statistics were given.
        RuntimeError: not all processes call this.
    """
    model = uncompiled(model)
    peft_config, layers = config_of(model, adapter_name), layers_of(model, adapter_name)
    _check_can_calibrate(adapter_name, peft_config, layers, has_statistics=calibration is not None)
    groups = groups_of(model, layers, shared=peft_config.shared)
    if not peft_config.shared:
        _warn_of_large_bases(layers, groups_of(model, layers, shared=True), peft_config)
    if calibration is None:
        calibration = adapter_statistics(model, batches, adapter_name=adapter_name, config=config, **options)
    else:
        check_ready(calibration, calibrated_names(groups, layers), batches, config, options)
    bases = calibration.bases(
        sizes=peft_config.sizes, exponent=float(peft_config.exponent or 0), dtype=peft_config.dtype_of_bases,
        progress=bool(options.get("progress", True)),
    )  # fmt: skip
    set_bases(model, adapter_name, groups, bases)
    if isinstance(peft_config.narrow, str):  # a share of energy, whose number of directions is known from now on
        warn_of_few_entries(config_of(model, adapter_name))
    if is_distributed():
        exclude_bases_from_ddp(model)
    return calibration


def adapter_statistics(
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    adapter_name: str = "default",
    config: CalibrationConfig | None = None,
    **options: Any,
) -> Calibration:
    """Collect statistics for `calibrate_adapter(calibration=...)`, and leave the adapter as it is.

    The arguments are those of `calibrate_adapter`. The statistics fit the same adapter on a quantized copy of the base.
    """
    model = uncompiled(model)
    peft_config, layers = config_of(model, adapter_name), layers_of(model, adapter_name)
    groups = calibrated_names(groups_of(model, layers, shared=peft_config.shared), layers)
    config = adapter_calibration(config, options, peft_config.sizes)
    check_active(adapter_name, layers.values())
    with _left_out(adapter_name, model):
        return calibrate(model, batches, groups=groups, sizes=peft_config.sizes, config=config, **options)


def adapter_calibration(config: CalibrationConfig | None, options: dict[str, Any], sizes: Sizes) -> CalibrationConfig:
    """Return `config`, or `CalibrationConfig()` with the fields that are taken out of `options`.

    What is left in `options` is for `calibrate`, which has other defaults for the fields.
    """
    single = {name: options.pop(name) for name in [*options] if name not in ("step", "loss_fn", "progress")}
    return resolve_config(config, single, CalibrationConfig()).for_sizes(sizes)


def check_active(adapter_name: str, layers: Iterable[SparseGradLayer]) -> None:
    """Raise `ValueError` if only other adapters are active, whose updates and heads would form the gradients."""
    active = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    if active and adapter_name not in active:
        raise ValueError(
            f"adapter {adapter_name!r} is not active, and {', '.join(map(repr, active))} would take part in the "
            f"forward pass; call model.set_adapter({adapter_name!r}) first"
        )


def check_ready(
    calibration: Calibration, groups: Mapping[str, list[str]], batches: Any, config: Any, options: Mapping[str, Any]
) -> None:
    """Raise `ValueError` unless ready statistics are of these groups of layers, and nothing else says how to get some.

    Of the options of `calibrate`, `progress` alone still has an effect.
    """
    given = {"batches": batches, "config": config, **options, "progress": None}
    ignored = [name for name, value in given.items() if value is not None]
    if ignored:
        raise ValueError(f"pass ready statistics (calibration) or {', '.join(ignored)}, found both")
    known = {name: tuple(group.layers) for name, group in calibration.groups.items()}
    own = {name: tuple(names) for name, names in groups.items()}
    different = [name for name in (*known, *own) if known.get(name) != own.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"the statistics are of other layers than the adapter's: in group {name!r} they are of "
            f"{', '.join(known.get(name, ())) or 'none'}, and the adapter has {', '.join(own.get(name, ())) or 'none'}"
        )


def _check_can_calibrate(
    adapter_name: str, config: SparseGradConfig, layers: Mapping[str, SparseGradLayer], *, has_statistics: bool
) -> None:
    if config.original_space:
        raise ValueError(
            f"adapter {adapter_name!r} trains in the original space (original_space=True) and takes no bases; make it "
            "with original_space=False to calibrate it"
        )
    check_unmerged(layers.values())  # also of others: what is merged leaves the active adapters out
    quantized = {n: backend.backend_name for n, layer in layers.items() if (backend := layer.quantization_backend)}
    if quantized and not has_statistics:
        name, kind = next(iter(quantized.items()))
        raise TypeError(
            f"{name} is quantized ({kind}), and a quantized weight has no gradient. Calibrate the adapter on the "
            "unquantized model, save it, and load it onto the quantized one; or pass ready statistics, calibration=..."
        )
    cores = {name: layer.sparsegrad_S[adapter_name] for name, layer in layers.items()}
    learnt = [name for name, core in cores.items() if not core.is_meta and bool(gathered(core.detach()).any())]
    if learnt:
        layers[learnt[0]].check_numbers(adapter_name)  # not learnt, but not loaded
        raise ValueError(
            f"adapter {adapter_name!r} has already learnt something ({len(learnt)} of {len(layers)} layers, such as "
            f"{learnt[0]}), and new bases would change that. Train it further without calibration, with "
            "transformers.Trainer; or merge it, then add and calibrate a new adapter"
        )


def _warn_of_large_bases(
    layers: Mapping[str, SparseGradLayer], shared: Mapping[str, list[str]], config: SparseGradConfig
) -> None:
    """Warn before the work starts if a pair of bases for each layer takes gigabytes, and say what is smaller."""

    def size(layer: SparseGradLayer, sizes: Sizes) -> int:
        return sizes.basis_bytes(layer.out_features, layer.in_features, config.dtype_of_bases.itemsize)

    own = sum(size(layer, config.sizes) for layer in layers.values())
    rotated = replace(config.sizes, neurons=False)  # shared bases select no neurons
    together = sum(size(layers[names[0]], rotated) for names in shared.values())
    if own > LARGE_BASES and len(shared) < len(layers):
        advice = "Half of `narrow` about halves them."
        if together < own:
            advice = (
                "With SparseGradConfig(shared=True) all layers of a role share one pair, and the bases take "
                f"{together / 1e9:.2f} GB."
            )
        logger.warning("the bases of %d layers take %.1f GB. %s", len(layers), own / 1e9, advice)


@contextmanager
def _left_out(adapter_name: str, model: nn.Module) -> Iterator[None]:
    """Leave an adapter out of the forward pass and freeze its cores. `set_adapter` would change what trains.

    The layers that do not have it are told as well, since they do not warn of others' calibration meanwhile.
    """
    layers = all_layers(model)
    try:
        for layer in layers:
            layer.skipped_adapters.add(adapter_name)
        with frozen(layer.sparsegrad_S[adapter_name] for layer in layers_of(model, adapter_name).values()):
            yield
    finally:
        for layer in layers:
            layer.skipped_adapters.discard(adapter_name)


@contextmanager
def frozen(cores: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze cores, so that a `Trajectory` moves the weights themselves and keeps no copy of the cores."""
    before = [(core, core.requires_grad) for core in cores]
    try:
        for core, _ in before:
            core.requires_grad_(False)
        yield
    finally:
        for core, requires_grad in before:
            core.requires_grad_(requires_grad)
