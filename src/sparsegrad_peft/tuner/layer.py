"""One adapted layer: the frozen base layer, and for each adapter a core `S` (r, c) and its shared `Basis`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.costs import Prefer
from ..method.linear import apply_core
from ..method.plain import is_conv1d, weight_and_bias
from ..method.precision import autocast_kind
from .config import SparseGradConfig
from .decoding import Folded, apply_folded, few_tokens, folded
from .offload import REMEDY, fetched, is_offloaded
from .peft_private import in_out_features

_PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Identities that a warning was given for: all layers of an uncalibrated adapter share one, so each adapter warns once.
_WARNED: WeakSet[Basis] = WeakSet()
_FILLED: WeakSet[Basis] = WeakSet()  # bases that were seen to hold numbers


class Cores(nn.ParameterDict):
    """The cores of a layer. One on the meta device, not calibrated yet, stays there when the model is moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        def apply(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except NotImplementedError:  # nothing to copy: `set_basis` makes the core beside the weight
                if tensor.is_meta:
                    return tensor
                raise

        return super()._apply(apply, recurse)


class SparseGradLayer(BaseTunerLayer):
    """What PEFT asks of an adapted layer; the forward pass is in `SparseGradTunerLinear`."""

    adapter_layer_names = ("sparsegrad_S",)  # trained
    # Frozen; deleted with the adapter.
    other_param_names: tuple[str, ...] = ("sparsegrad_basis", "sparsegrad_prefer", "sparsegrad_original_space")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.sparsegrad_S = Cores()  # adapter -> (r, c)
        self.sparsegrad_basis = nn.ModuleDict()  # adapter -> Basis, one module for all layers of a group
        self.sparsegrad_prefer: dict[str, Prefer] = {}
        self.sparsegrad_original_space: dict[str, bool] = {}  # adapter -> trains without bases on purpose
        self.quantization_backend = _quantization_backend(self.get_base_layer(), kwargs)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.skipped_adapters: set[str] = set()  # active, but left out of the forward pass
        in_features, out_features = in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"the size of a {type(self.get_base_layer()).__name__} is not known")
        self.in_features: int = in_features
        self.out_features: int = out_features

    def update_layer(self, adapter_name: str, config: SparseGradConfig, basis: Basis) -> None:
        """Add an adapter, or replace the one of that name."""
        r, c = basis.core_shape(self.out_features, self.in_features)
        self.sparsegrad_basis[adapter_name] = basis
        # Filled when it is in its place: with low_cpu_mem_usage that is on the meta device, and nothing is allocated.
        self.sparsegrad_S[adapter_name] = nn.Parameter(torch.empty(r, c))
        if config.init_weights:
            nn.init.zeros_(self.sparsegrad_S[adapter_name])
        else:  # an update of about the size of an ordinary weight
            nn.init.normal_(self.sparsegrad_S[adapter_name], std=(r * c) ** -0.25)
        self.sparsegrad_prefer[adapter_name] = config.prefer
        self.sparsegrad_original_space[adapter_name] = config.original_space
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def device_of(self, adapter_name: str) -> torch.device:
        """Where an adapter's core is, or is to be: beside the weight."""
        core = self.sparsegrad_S[adapter_name]
        return (self._base_device_and_dtype()[0] if core.is_meta else None) or core.device

    @torch.no_grad()
    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Give an adapter a basis, which is on its device; its core gets the size that goes with it, and is zero."""
        old = self.sparsegrad_S[adapter_name]
        shape, device = basis.core_shape(self.out_features, self.in_features), self.device_of(adapter_name)
        core = torch.zeros(shape, dtype=old.dtype, device=device)
        self.sparsegrad_basis[adapter_name] = basis
        self.sparsegrad_S[adapter_name] = nn.Parameter(core, requires_grad=old.requires_grad)

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in PEFT, which leaves cores on the meta device alone: give those the type of the base layer too.

        PEFT widens half precision afterwards, or not; so the type tells `set_basis` what is wanted. And where the base
        layer's weight is on disk, and a meta tensor here, the basis stays: accelerate fetches parameters, not buffers.
        """
        basis = cast(Basis, self.sparsegrad_basis[adapter_name])
        kept = {name: buffer for name, buffer in basis.named_buffers() if not buffer.is_meta}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        lost = [name for name, buffer in basis.named_buffers() if buffer.is_meta]
        basis._buffers.update({name: kept[name] for name in lost if name in kept})
        core, dtype = self.sparsegrad_S[adapter_name], self._base_device_and_dtype()[1]
        if core.is_meta and dtype is not None and dtype.is_floating_point:
            self.sparsegrad_S[adapter_name] = nn.Parameter(core.detach().to(dtype), requires_grad=core.requires_grad)

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

    other_param_names = (*SparseGradLayer.other_param_names, "_folded")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SparseGradConfig, basis: Basis, **kwargs: Any):
        super().__init__()
        SparseGradLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._folded: dict[str, Folded] = {}  # adapter -> its update as decoding wants it
        self.update_layer(adapter_name, config, basis)
        self.train(base_layer.training)  # a layer put into a model in eval mode does not train

    def train(self, mode: bool = True) -> SparseGradTunerLinear:
        """As in PyTorch; what was kept for decoding is dropped."""
        self._folded.clear()
        super().train(mode)
        return self

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); `adapter_names`, one for each example, mixes adapters in a batch at inference."""
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
            self._check_mixed_batch(x, adapter_names)
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        wanted = set(self.sparsegrad_S) - self.skipped_adapters
        active = [name for name in self.active_adapters if name in wanted]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        for name in active:
            self._check_basis(name, x)
        if len(active) == 1 and self._is_plain():
            return self._fast(x, active[0])
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            self._check_gradient(x, result)
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = result + self._update(x, name).to(result.dtype)
        return result

    def _check_basis(self, adapter: str, x: Tensor) -> None:
        """Say so once if an adapter trains without the bases that it was to get, and at once if it cannot run."""
        S, basis = self.core_and_basis(adapter)
        if S.is_meta and is_offloaded(self.get_base_layer()):
            raise RuntimeError(f"adapter {adapter!r} was loaded onto a model that was offloaded already. {REMEDY}")
        if S.is_meta and not x.is_meta:
            raise RuntimeError(
                f"adapter {adapter!r} was made with low_cpu_mem_usage=True and has no core yet: call "
                "calibrate_adapter(model, batches), or load weights into it"
            )
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled() and S.requires_grad):
            return
        uncalibrated = basis.U is None and basis.V is None and not self.sparsegrad_original_space[adapter]
        if uncalibrated and basis not in _WARNED:
            _WARNED.add(basis)
            warnings.warn(
                f"adapter {adapter!r} trains without bases: call calibrate_adapter(model, batches) before you make the "
                "optimizer, or say original_space=True in SparseGradConfig if this is what you want",
                stacklevel=2,
            )
        if basis.U is not None and not basis.U.is_meta and basis not in _FILLED:
            if not basis.U.any():
                raise RuntimeError(
                    f"adapter {adapter!r} has room for bases, and none were loaded: its config is that of an adapter "
                    "that was calibrated. Load that adapter (PeftModel.from_pretrained), or set core_shapes={} in the "
                    "config for a new one"
                )
            _FILLED.add(basis)

    def _check_gradient(self, x: Tensor, result: Tensor) -> None:
        """Kernels made for inference have no backward: whatever is before the layer would silently learn nothing."""
        if not (self.training and x.requires_grad and torch.is_grad_enabled()):
            return
        if not result.requires_grad or _reordered(self.get_base_layer()):
            assert self.quantization_backend is not None
            raise RuntimeError(
                f"the quantized base layer ({self.quantization_backend.backend_name}) passes no gradient back to its "
                "input, so it cannot be trained through. torchao: quantize weights only, not activations. bitsandbytes "
                "on a CPU: after inference, model.state_dict() puts 4-bit weights into the order that training needs"
            )

    def _is_plain(self) -> bool:
        """Whether base layer and update can be one product: a bare linear layer, with no hooks to be called."""
        base = self.base_layer
        if is_offloaded(base):  # calling it fetches its weight
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return (type(base) is nn.Linear or is_conv1d(base)) and self.quantization_backend is None and not any(hooks)

    def _fast(self, x: Tensor, adapter: str) -> Tensor:
        weight, bias = weight_and_bias(self.base_layer)  # no copies
        S, basis = self.core_and_basis(adapter)
        if few_tokens(x, self.training) and not torch.is_autocast_enabled(autocast_kind(x.device)):
            matrices = folded(self._folded.get(adapter), S, basis, x.dtype)
            if matrices is not None:
                self._folded[adapter] = matrices
                return apply_folded(x, weight, bias, matrices)
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

    def get_base_weight(self) -> Tensor:
        """As in PEFT: the weight as plain numbers; a copy if it is quantized."""
        if _reordered(self.get_base_layer()):
            # PEFT takes the new order for the old one: all entries wrong, and no error. Asking for the state puts it
            # back.
            self.get_base_layer().state_dict()
        return super().get_base_weight()

    def _warn_of_rounding(self) -> None:
        if self.quantization_backend is not None:
            warnings.warn(
                f"the base weight is quantized ({self.quantization_backend.backend_name}): its sum with the adapter's "
                "update is quantized anew, and what is small beside the steps of the quantization is lost; load the "
                "adapter onto the unquantized model for an exact merge",
                stacklevel=3,
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight; `safe_merge` checks for values that are not finite first."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparsegrad_S:
                continue
            self._warn_of_rounding()
            weight = self.get_base_weight()
            merged = (weight + self.get_delta_weight(name)).to(weight.dtype)  # in the wider type, rounded once
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again, to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.sparsegrad_S:
                self._warn_of_rounding()
                weight = self.get_base_weight()
                self.set_base_weight((weight - self.get_delta_weight(name)).to(weight.dtype))

    def extra_repr(self) -> str:
        """Of the quantization, for `print(model)`."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparsegrad." + super().__repr__()


def _reordered(base: nn.Module) -> bool:
    """Whether bitsandbytes has reordered a 4-bit weight, which it does at the first inference on CPUs with AVX512-BF16.

    The weight is then good for inference alone. Seen with bitsandbytes 0.50.
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _quantization_backend(base: nn.Module, options: dict[str, Any]) -> QuantizationBackend | None:
    """What reads and writes the weight of a quantized layer; None for a plain one.

    Raises:
        ValueError: torchao's quantization was put on by hand, so that PEFT does not know which it is.
        TypeError: the weight is quantized in a way that PEFT does not know.
    """
    try:
        backend = resolve_quantization_backend(base, get_apply_tensor_subclass=options.get("get_apply_tensor_subclass"))
    except ValueError as error:
        raise ValueError(
            f"{error} Load the base model with quantization_config=TorchAoConfig(...), in place of torchao.quantize_"
        ) from error
    weight = getattr(base, "weight", None)
    if backend is None and isinstance(weight, Tensor) and weight.dtype not in _PLAIN:
        raise TypeError(
            f"{type(base).__name__} has a weight of {weight.dtype}, quantized in a way that PEFT does not know; "
            "adapt the unquantized model"
        )
    return backend
