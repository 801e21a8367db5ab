"""How many numbers a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsegrad_peft.tuner.adapters import adapter_parameters


def trained_entries(model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """How many numbers are trained: by the adapter, or in the layers `targets` that would have one; in all; and how
    many of the adapter's are not zero by now.

    The cores of SparseGrad start at zero, so that this is what selection has ever touched.
    """
    own, has_cores = adapter_parameters(model)
    if not has_cores and not hasattr(model, "peft_config"):  # the layers' own weights
        own = {id(p) for name in targets for p in model.get_submodule(name).parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "adapter": sum(p.numel() for p in trainable if id(p) in own),
        "touched": sum(int(p.count_nonzero()) for p in trainable if id(p) in own),
        "all": sum(p.numel() for p in trainable),
        "model": sum(p.numel() for p in model.parameters()),
    }
