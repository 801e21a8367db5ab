"""Quantized base layers: how PEFT reads and writes their weights, and what cannot be trained through."""

from __future__ import annotations

from typing import Any

from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..method.precision import PLAIN


def quantization_backend(base: nn.Module, options: dict[str, Any]) -> QuantizationBackend | None:
    """Return PEFT's access to the weight of a quantized layer, or None for a plain layer.

    Raises:
        ValueError: torchao quantized the layer without transformers, so that PEFT does not know how.
        TypeError: PEFT does not know this quantization.
    """
    try:
        backend = resolve_quantization_backend(base, get_apply_tensor_subclass=options.get("get_apply_tensor_subclass"))
    except ValueError as error:
        raise ValueError(
            f"{error} Load the base model with quantization_config=TorchAoConfig(...) instead of torchao.quantize_"
        ) from error
    weight = getattr(base, "weight", None)
    if backend is None and isinstance(weight, Tensor) and weight.dtype not in PLAIN:
        raise TypeError(
            f"{type(base).__name__} has a weight of {weight.dtype}, a quantization that PEFT does not know; adapt the "
            "unquantized model"
        )
    return backend


def check_gradient(base: nn.Module, backend: QuantizationBackend, result: Tensor) -> None:
    """Check that a quantized layer's output passes a gradient back to its input.

    Raises:
        RuntimeError: its kernel is for inference, so that all layers before it would silently learn nothing.
    """
    if not result.requires_grad or is_reordered(base):
        raise RuntimeError(
            f"the quantized base layer ({backend.backend_name}) passes no gradient back to its input, so it cannot be "
            "trained through. torchao: quantize weights only, not activations. bitsandbytes on a CPU: after inference, "
            "model.state_dict() restores the order of 4-bit weights that training needs"
        )


def keep_order(model: nn.Module) -> None:
    """Keep bitsandbytes from reordering a model's 4-bit weights at inference, so that it trains after an evaluation.

    On a CPU with AVX512-BF16, `Linear4bit` reorders its weight at the first forward pass in evaluation mode, if its
    attribute `support_avx512bf16_for_cpu` is true (bitsandbytes 0.50, nn/modules.py). The reordered layer has no
    backward pass, and its scales are rounded to bfloat16. A weight that is reordered already gets its order back, but
    not the rounded digits. On other devices this changes nothing.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if is_reordered(module):
                module.state_dict()  # restores the order


def is_reordered(base: nn.Module) -> bool:
    """True if bitsandbytes has reordered a 4-bit weight for inference on a CPU with AVX512-BF16.

    It does so at the first inference (seen with bitsandbytes 0.50). `state_dict()` restores the order.
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
