"""Adapted fused experts: one parameter that holds the weights of all experts of a layer (see `method/experts.py`).

Experts are called as one module, and their parameters are never called. As in PEFT's `target_parameters`, the update is
added to the parameter for the time of the module's forward pass, and a module with several adapted parameters is
wrapped once for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..method.experts import changed_neurons, expert_layout, with_update
from .layer import SparseGradLayer
from .offload import is_offloaded


class SparseGradExperts(nn.Module, SparseGradLayer):
    """A module of fused experts with one adapted parameter."""

    def __init__(self, base_layer: nn.Module, parameter_name: str, adapter_name: str) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self.base_layer = base_layer  # `weight_shape` reads it
        self.layout = expert_layout(self.get_base_layer(), parameter_name)
        SparseGradLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.before_decoding: tuple[str, Any, Tensor] | None = None  # within `generate`: see `fold`

    @property
    def parameter(self) -> nn.Parameter:
        """The adapted parameter."""
        return self.get_base_layer().get_parameter(self.parameter_name)

    def weight_shape(self) -> tuple[int, int]:
        """Return (out, in) of all experts as one matrix."""
        return self.layout.shape

    def size_entry(self) -> list[int]:
        """Return [out, in, number of experts]."""
        return self.layout.entry

    def key(self, name: str) -> str:
        """Return the parameter's name in the model without wrappers."""
        return f"{name.replace('.base_layer', '')}.{self.parameter_name}"

    def calibrated_name(self, name: str) -> str:
        """Return the parameter's name in the model with wrappers."""
        return f"{name}.{self._path_within()}"

    def _path_within(self) -> str:
        """Return the parameter's name within this wrapper."""
        depth, module = 1, self.base_layer
        while isinstance(module, SparseGradLayer):
            depth, module = depth + 1, module.base_layer
        return "base_layer." * depth + self.parameter_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the experts with the updates of the active adapters added to the parameter."""
        active = self._used_adapters()
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.before_decoding is not None:
            if active == [self.before_decoding[0]]:
                return self.base_layer(*args, **kwargs)
            self.unfold()  # another adapter is active now, or none
        if self.merged or not active:
            return self.base_layer(*args, **kwargs)
        if is_offloaded(self.get_base_layer()):
            raise RuntimeError(
                "SparseGrad cannot adapt fused experts that are offloaded to the CPU or to disk; keep them in memory, "
                "merge the adapter before the model is offloaded, or leave them out with target_parameters=[]"
            )
        weight: Tensor = self.parameter
        for name in active:
            self._check_ready(name, weight)
            weight = with_update(weight, self.layout, *self.core_and_basis(name))
        path = self._path_within().removeprefix("base_layer.")
        return functional_call(self.base_layer, {path: weight}, args, kwargs, tie_weights=False)

    @torch.no_grad()
    def fold(self) -> None:
        """Write the update of the one active adapter into the parameter, until `unfold`.

        `before_decoding` is the adapter, and place and numbers of the neurons before.
        """
        active = self._used_adapters()
        if len(active) != 1 or self.merged or self.training or is_offloaded(self.get_base_layer()):
            return
        self._check_ready(active[0], self.parameter)
        place, rows = changed_neurons(self.parameter, self.layout, *self.core_and_basis(active[0]))
        if place is not None:  # else the copy that restores the parameter would be as large as it
            by_neuron = self.layout.by_neuron(self.parameter.data)
            self.before_decoding = active[0], place, by_neuron[place]
            by_neuron[place] = rows

    @torch.no_grad()
    def unfold(self) -> None:
        """Restore the parameter, bit for bit."""
        if self.before_decoding is not None:
            _, place, rows = self.before_decoding
            self.layout.by_neuron(self.parameter.data)[place] = rows
            self.before_decoding = None

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.parameter.device, self.parameter.dtype

    def get_base_weight(self) -> Tensor:
        """Return the parameter's numbers."""
        return self.parameter.data

    def set_base_weight(self, weight: Tensor) -> None:
        """Write the parameter's numbers."""
        self.parameter.data.copy_(weight)

    @torch.no_grad()
    def weight_plus(self, adapter: str, factor: int = 1) -> Tensor:
        """Return the parameter plus `factor` times an adapter's update, rounded once."""
        self.check_numbers(adapter)
        S, basis = self.core_and_basis(adapter)
        return with_update(self.parameter, self.layout, factor * S, basis)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update in the layout of the parameter and the type of the core."""
        self.check_numbers(adapter)
        S, basis = self.core_and_basis(adapter)
        return with_update(torch.zeros_like(self.parameter, dtype=S.dtype), self.layout, S, basis)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts matrices only."""
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts without wrappers, as PEFT's wrapper of parameters does."""
        layer: nn.Module = self
        while merge and isinstance(layer, SparseGradLayer):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        base: nn.Module = self.get_base_layer()
        return base

    def extra_repr(self) -> str:
        """Name the parameter, for `print(model)`."""
        return f"parameter_name={self.parameter_name!r}"

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()
