"""Batches in which each example has an adapter of its own, by name: `model(..., adapter_names=["one", "__base__"])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .adapters import all_layers
from .experts import SparseGradExperts
from .layer import SparseGradLayer


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], num_beams: Any = None) -> Iterator[None]:
    """Pass the names to the adapted layers and the modules to save.

    Args:
        model: with adapters.
        adapter_names: one for each example; `__base__` stands for none.
        num_beams: beams of `generate`, each of which is a row of the batch in the decoder.

    Raises:
        TypeError: one name in place of a list.
        ValueError: there is no such adapter, or the model has adapted fused experts.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a list with a name for each row of the batch, found {adapter_names!r}")
    layers = all_layers(model)
    if any(isinstance(layer, SparseGradExperts) for layer in layers):
        raise ValueError(
            "adapter_names: found adapted fused experts, which cannot mix adapters in a batch; call set_adapter(name) "
            "and run a batch for each adapter"
        )
    known = {name for layer in layers for name in layer.sparsegrad_S}
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def with_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
        return args, {**kwargs, "adapter_names": names}

    repeated = [name for name in adapter_names for _ in range(num_beams if isinstance(num_beams, int) else 1)]
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = model if get_encoder is None else get_encoder()
    once = set(encoder.modules()) if encoder is not model else set()  # sees each example once, not each beam
    handles = [
        module.register_forward_pre_hook(
            partial(with_names, names=list(adapter_names) if module in once else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (SparseGradLayer, AuxiliaryTrainingWrapper))  # the latter: modules_to_save
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
