"""One adapted layer: the frozen base layer, and for each adapter a core `S` (r, c) and its shared `Basis`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.function import Prefer
from ..method.linear import apply_core, is_conv1d, weight_and_bias
from .config import SparseGradConfig


class SparseGradLayer(BaseTunerLayer):
    """What PEFT asks of an adapted layer; the forward pass is in `SparseGradTunerLinear`."""

    adapter_layer_names = ("sparsegrad_S",)  # trained
    other_param_names = ("sparsegrad_basis", "sparsegrad_prefer")  # frozen; deleted with the adapter

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.sparsegrad_S = nn.ParameterDict()  # adapter -> (r, c)
        self.sparsegrad_basis = nn.ModuleDict()  # adapter -> Basis, one module for all layers of a group
        self.sparsegrad_prefer: dict[str, Prefer] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"the size of a {type(self.get_base_layer()).__name__} is not known")
        self.in_features: int = in_features
        self.out_features: int = out_features

    def update_layer(self, adapter_name: str, config: SparseGradConfig, basis: Basis) -> None:
        """Add an adapter, or replace the one of that name."""
        r, c = basis.core_shape(self.out_features, self.in_features)
        S = torch.zeros(r, c)
        if not config.init_weights:
            nn.init.normal_(S, std=(r * c) ** -0.25)  # an update of about the size of an ordinary weight
        self.sparsegrad_basis[adapter_name] = basis
        self.sparsegrad_S[adapter_name] = nn.Parameter(S)
        self.sparsegrad_prefer[adapter_name] = config.prefer
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Give an adapter that has learnt nothing a basis; its core gets the size that goes with it, and is zero."""
        old = self.sparsegrad_S[adapter_name]
        core = torch.zeros(basis.core_shape(self.out_features, self.in_features), dtype=old.dtype, device=old.device)
        self.sparsegrad_basis[adapter_name] = basis.to(old.device)
        self.sparsegrad_S[adapter_name] = nn.Parameter(core, requires_grad=old.requires_grad)

    def trained_cores(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The cores of all adapters, for `param_groups`."""
        for core in self.sparsegrad_S.values():
            yield "block", core

    def core_and_basis(self, adapter: str) -> tuple[nn.Parameter, Basis]:
        """`S` (r, c) of an adapter, and its basis."""
        return self.sparsegrad_S[adapter], cast(Basis, self.sparsegrad_basis[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`Vᵀ S U` in the layout and type of the base layer's weight."""
        S, basis = self.core_and_basis(adapter)
        delta = basis.from_basis(S.to(torch.promote_types(S.dtype, torch.float32)))
        delta = delta.to(S.dtype)
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """`peft.convert_to_lora` works: the update is a matrix of its own."""
        return True


class SparseGradTunerLinear(nn.Module, SparseGradLayer):
    """An adapted `nn.Linear`, `Conv1D`, or quantized linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SparseGradConfig, basis: Basis, **kwargs: Any):
        super().__init__()
        SparseGradLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, basis)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); `adapter_names`, one for each example, mixes adapters in a batch at inference."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.sparsegrad_S]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and self._is_plain():
            return self._fast(x, active[0])
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = result + self._update(x, name).to(result.dtype)
        return result

    def _is_plain(self) -> bool:
        """Whether base layer and update can be one product: a bare linear layer, with no hooks to be called."""
        base = self.base_layer
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return (type(base) is nn.Linear or is_conv1d(base)) and self.quantization_backend is None and not any(hooks)

    def _fast(self, x: Tensor, adapter: str) -> Tensor:
        weight, bias = weight_and_bias(self.base_layer)  # no copies
        S, basis = self.core_and_basis(adapter)
        return apply_core(x, weight, bias, S, None, basis, self.sparsegrad_prefer[adapter])

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """`x Uᵀ Sᵀ V`, by itself: beside a quantized layer, a layer with hooks, or another adapter."""
        S, basis = self.core_and_basis(adapter)
        x = self._cast_input_dtype(x, S.dtype)
        U, V = (None if side is None else side.to(x.dtype) for side in (basis.U, basis.V))
        x_tilde = x if U is None else nn.functional.linear(x, U)
        y_tilde = nn.functional.linear(x_tilde, S)
        return y_tilde if V is None else y_tilde @ V

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):  # also where a model folds examples and positions into one dimension
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in set(adapter_names) & set(self.sparsegrad_S):
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            result[rows] += self._update(x[rows], name).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight; `safe_merge` checks for values that are not finite first."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparsegrad_S:
                continue
            weight = self.get_base_weight()
            merged = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again, to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.sparsegrad_S:
                weight = self.get_base_weight()
                self.set_base_weight(weight - self.get_delta_weight(name).to(weight.dtype))

    def extra_repr(self) -> str:
        """Of the quantization, for `print(model)`."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()
