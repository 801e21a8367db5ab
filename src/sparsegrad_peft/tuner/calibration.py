"""Bases for a PEFT adapter: after `get_peft_model`, before the optimizer is made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..method.calibrate import Calibration, calibrate
from ..method.config import CalibrationConfig, Trajectory, sign_step
from .bases import layers_of, set_bases, wrapped_groups
from .config import SparseGradConfig
from .layer import SparseGradLayer

logger = logging.getLogger(__name__)

LARGE_BASES = 1e9
"Bytes of a model's bases above which calibration says how to have smaller ones."

RECOMMENDED = CalibrationConfig(n_steps=30, normalize=True, trajectory=Trajectory(1e-4, sign_step))
"""Gradients along a short training run, which is undone afterwards, each scaled to norm 1: such bases hold more of the
later gradients than the paper's, and need no optimizer state (docs/method.md, "How bases age")."""


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

    An adapter made with `get_peft_model(..., low_cpu_mem_usage=True)` takes no memory before this: worth it for large
    models, where the cores of the original space are as large as the weights.

    Args:
        model: from `get_peft_model`, or any model with a SparseGrad adapter in it.
        batches: what the model takes, with labels: `model(**batch).loss`. See `sparsegrad_peft.calibrate`.
        adapter_name: which adapter.
        calibration: ready statistics, the result of an earlier call for the same layers, in place of batches.
        config: how to calibrate; None: `RECOMMENDED`, with single fields of it among the options. The paper's way is
            `CalibrationConfig()`.
        options: for `sparsegrad_peft.calibrate`: `n_steps`, `step`, `loss_fn`, `progress`, ...

    Returns:
        The statistics, to be used again for adapters of this size or smaller (see `sizes` of `calibrate`).

    Raises:
        ValueError: the model has no such adapter, the adapter trains in the original space or has already learnt
            something, the statistics are of other layers, and whatever `calibrate` refuses.
        TypeError: the layers are quantized, and no ready statistics were given.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose names of layers are its own
    layers = layers_of(model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no SparseGrad adapter named {adapter_name!r}; make one with get_peft_model")
    peft_config: SparseGradConfig = model.peft_config[adapter_name]  # type: ignore[index, assignment]
    if peft_config.original_space:
        raise ValueError(
            f"adapter {adapter_name!r} trains in the original space (original_space=True) and takes no bases; make it "
            "with original_space=False to calibrate it"
        )
    quantized = {n: backend.backend_name for n, layer in layers.items() if (backend := layer.quantization_backend)}
    if quantized and calibration is None:
        name, kind = next(iter(quantized.items()))
        raise TypeError(
            f"{name} is quantized ({kind}), and a quantized weight has no gradient. Calibrate the adapter on the "
            "unquantized model, save it, and load it onto the quantized one; or pass ready statistics, calibration=..."
        )
    cores = {name: layer.sparsegrad_S[adapter_name] for name, layer in layers.items()}
    learnt = [name for name, core in cores.items() if not core.is_meta and bool(core.any())]
    if learnt:
        raise ValueError(
            f"adapter {adapter_name!r} has already learnt something ({len(learnt)} of {len(layers)} layers, such as "
            f"{learnt[0]}); calibrate before training, or merge it and add a new adapter"
        )
    groups = wrapped_groups(model, layers, shared=peft_config.shared)
    if not peft_config.shared:
        _warn_of_large_bases(layers, wrapped_groups(model, layers, shared=True), peft_config)
    if calibration is None:
        config = config_from(config, options)
        with _left_out(adapter_name, layers.values()):
            calibration = calibrate(model, batches, groups=groups, sizes=peft_config.sizes, config=config, **options)
    else:
        check_groups(calibration, groups)
    bases = calibration.bases(
        sizes=peft_config.sizes, dtype=peft_config.dtype_of_bases, progress=bool(options.get("progress", True))
    )
    set_bases(model, adapter_name, groups, bases)
    return calibration


def config_from(config: CalibrationConfig | None, options: dict[str, Any]) -> CalibrationConfig:
    """`config`; where there is none, `RECOMMENDED` with the fields of it that are taken out of `options`."""
    if config is not None:
        return config
    names = {field.name for field in fields(CalibrationConfig)} & set(options)
    return replace(RECOMMENDED, **{name: options.pop(name) for name in names})


def check_groups(calibration: Calibration, groups: Mapping[str, list[str]]) -> None:
    """Raise unless ready statistics are of these groups of layers."""
    if {name: tuple(names) for name, names in groups.items()} != {n: g.layers for n, g in calibration.groups.items()}:
        raise ValueError(f"the statistics are of groups {list(calibration.groups)}, the adapter has {list(groups)}")


def _warn_of_large_bases(
    layers: Mapping[str, SparseGradLayer], shared: Mapping[str, list[str]], config: SparseGradConfig
) -> None:
    """Before the work: for large models a pair of bases for each layer is gigabytes."""

    def size(layer: SparseGradLayer) -> int:
        r, c = config.sizes.counts(layer.out_features, layer.in_features)
        return config.dtype_of_bases.itemsize * ((r or 0) * layer.out_features + (c or 0) * layer.in_features)

    own = sum(map(size, layers.values()))
    together = sum(size(layers[names[0].removesuffix(".base_layer")]) for names in shared.values())
    if own > LARGE_BASES and len(shared) < len(layers):
        logger.warning(
            "the bases of %d layers take %.1f GB; with SparseGradConfig(shared=True) the layers of a role share a pair "
            "of them, and they take %.2f GB", len(layers), own / 1e9, together / 1e9,
        )  # fmt: skip


@contextmanager
def _left_out(adapter_name: str, layers: Iterable[SparseGradLayer]) -> Iterator[None]:
    """Leave an adapter out of the forward pass and freeze its cores. `set_adapter` would change what trains."""
    layers = list(layers)
    try:
        for layer in layers:
            layer.skipped_adapters.add(adapter_name)
        with frozen(layer.sparsegrad_S[adapter_name] for layer in layers):
            yield
    finally:
        for layer in layers:
            layer.skipped_adapters.discard(adapter_name)


@contextmanager
def frozen(cores: Iterable[nn.Parameter]) -> Iterator[None]:
    """A `Trajectory` then neither walks with them nor keeps a copy of them; it walks with the weights themselves."""
    before = [(core, core.requires_grad) for core in cores]
    try:
        for core, _ in before:
            core.requires_grad_(False)
        yield
    finally:
        for core, requires_grad in before:
            core.requires_grad_(requires_grad)
