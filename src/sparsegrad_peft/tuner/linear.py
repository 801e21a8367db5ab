"""The adapted linear layer: `y = base(x) + Σ x Uᵀ Sᵀ V` over the active adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from ..method.linear import apply_core
from ..method.plain import is_conv1d, weight_and_bias
from ..method.precision import autocast_kind
from ..method.sides import cast, put, scaled, take
from .decoding import Folded, fold
from .layer import SparseGradLayer
from .offload import fetched, is_offloaded
from .quantized import check_gradient, is_reordered


class SparseGradTunerLinear(nn.Module, SparseGradLayer):
    """An adapted `nn.Linear`, `Conv1D`, or quantized linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        SparseGradLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.folded: Folded | None = None  # within `generate`

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out). `adapter_names`, one for each example, mixes adapters in a batch at inference."""
        if is_offloaded(self.sparsegrad_S):
            with fetched([self.sparsegrad_S, *self.sparsegrad_basis.values()]):
                return self._adapted(x, adapter_names, *args, **kwargs)
        return self._adapted(x, adapter_names, *args, **kwargs)

    def _adapted(self, x: Tensor, adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        active = self._used_adapters()
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        for name in active:
            self._check_ready(name, x)
        if len(active) == 1 and self._is_plain():
            weight, bias = weight_and_bias(self.base_layer)  # no copies
            if self.folded is not None and self.folded.adapter == active[0] and self.folded.fits(x):
                return self.folded.apply(x, weight, bias)
            core, basis = self.core_and_basis(active[0])
            return apply_core(x, weight, bias, core, None, basis, self.sparsegrad_status[active[0]].prefer)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            if self.training and x.requires_grad and torch.is_grad_enabled():
                check_gradient(self.get_base_layer(), self.quantization_backend, result)
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = result + self._update(x, name).to(result.dtype)
        return result

    def fold(self) -> None:
        """Prepare the update for decoding, if one adapter is active; `unfold` drops it."""
        active = self._used_adapters()
        if len(active) == 1 and not self.merged and not self.training and self._is_plain():
            weight, _ = weight_and_bias(self.base_layer)
            if not torch.is_autocast_enabled(autocast_kind(weight.device)):
                self.check_numbers(active[0])
                self.folded = fold(active[0], *self.core_and_basis(active[0]), weight.dtype)

    def unfold(self) -> None:
        """Drop what `fold` prepared."""
        self.folded = None

    def _is_plain(self) -> bool:
        """True if base layer and update can be one product: a bare linear layer without hooks."""
        base = self.base_layer
        if is_offloaded(base):  # calling it fetches its weight
            return False
        if "forward" in vars(base):  # replaced on the layer itself
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return (type(base) is nn.Linear or is_conv1d(base)) and self.quantization_backend is None and not any(hooks)

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """`x Uᵀ Sᵀ V` by itself: beside a quantized layer, a layer with hooks, or another adapter."""
        S, basis = self.core_and_basis(adapter)
        x = self._cast_input_dtype(x, S.dtype)
        y_tilde = nn.functional.linear(take(x, cast(basis.U, x.dtype)), scaled(S, basis.scales))
        return put(y_tilde, cast(basis.V, x.dtype), self.out_features)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):  # also where a model folds examples and positions into one dimension
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in set(adapter_names) & set(self.sparsegrad_S):
            self._check_ready(name, x)
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            result[rows] += self._update(x[rows], name).to(result.dtype)
        return result

    def get_base_weight(self) -> Tensor:
        """Return the base weight as plain numbers, as in PEFT; a copy if it is quantized."""
        if is_reordered(self.get_base_layer()):
            self.get_base_layer().state_dict()  # restores the order, which PEFT takes for granted
        return super().get_base_weight()

    def extra_repr(self) -> str:
        """Describe the quantization, for `print(model)`."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()
