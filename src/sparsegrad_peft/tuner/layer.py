"""The state of one adapted weight: the frozen base layer, and for each adapter a core `S` (r, c) and a `Basis`.

The forward pass is in `linear.py` and, for fused experts, in `experts.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..method.basis import BASIS_BUFFERS, Basis
from ..method.costs import Prefer
from ..method.data_free import is_data_free
from ..method.function import form_weight
from ..method.linear import set_core
from ..method.plain import is_conv1d
from ..method.precision import HALF_PRECISION, at_least_float32
from ..method.processes import is_sharded, own_shard
from ..method.sides import scaled
from .checks import check_buffer, check_core
from .config import SparseGradConfig
from .offload import REMEDY, is_offloaded
from .peft_private import in_out_features
from .quantized import quantization_backend

Start = Literal["new", "from file"]
"""Where the numbers of a core come from: a no-op (or random) start, or a file that is still to be loaded."""


@dataclass
class AdapterStatus:
    """What all layers of an adapter share besides bases."""

    prefer: Prefer
    data_free: bool
    "the bases are not calibrated: warn at the first training step"
    half: bool = False
    "half-precision cores were asked for, with autocast_adapter_dtype=False"
    warned_of_lone_cores: bool = False


class Cores(nn.ParameterDict):
    """The cores of a layer. A core on the meta device stays there when the model is moved, until it is calibrated."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        def apply(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except NotImplementedError:  # there is nothing to copy
                if tensor.is_meta:
                    return tensor
                raise

        return super()._apply(apply, recurse)


class SparseGradLayer(BaseTunerLayer):
    """The state of an adapted layer, as PEFT expects it. Subclasses have the forward pass."""

    training: bool

    adapter_layer_names = ("sparsegrad_S",)  # trained
    other_param_names: tuple[str, ...] = ("sparsegrad_basis", "sparsegrad_status", "sparsegrad_checked")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.sparsegrad_S = Cores()  # adapter -> (r, c)
        self.sparsegrad_basis = nn.ModuleDict()  # adapter -> Basis, one module for all layers of a group
        self.sparsegrad_status: dict[str, AdapterStatus] = {}  # adapter -> one object for all of its layers
        self.sparsegrad_checked: dict[str, bool] = {}  # adapter -> its numbers are known to be sound
        self.skipped_adapters: set[str] = set()  # active, but left out of the forward pass
        self.quantization_backend = quantization_backend(self.get_base_layer(), kwargs)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = self.weight_shape()
        for hook in (_refuse_other_bases, _warn_of_lone_cores):
            self.register_load_state_dict_pre_hook(hook)  # type: ignore[attr-defined]  # of nn.Module

    def weight_shape(self) -> tuple[int, int]:
        """Return (out, in) of the adapted weight as a matrix."""
        in_features, out_features = in_out_features(self.get_base_layer())
        return out_features, in_features

    def size_entry(self) -> list[int]:
        """Return the size of the weight as `SparseGradConfig.core_shapes` has it: [out, in]."""
        return [self.out_features, self.in_features]

    def key(self, name: str) -> str:
        """Return the name of the adapted weight in files and configurations, from the layer's name in the model."""
        return name

    def calibrated_name(self, name: str) -> str:
        """Return the name in the model of what `calibrate` takes the gradient of, from the layer's name."""
        return f"{name}.base_layer"

    def update_layer(
        self, adapter_name: str, config: SparseGradConfig, basis: Basis, status: AdapterStatus, start: Start = "new"
    ) -> None:
        """Add an adapter, or replace the one of that name."""
        r, c = basis.core_shape(self.out_features, self.in_features)
        self.sparsegrad_basis[adapter_name] = basis
        # Filled in place: with low_cpu_mem_usage the core is on the meta device, and nothing is allocated.
        core = self.sparsegrad_S[adapter_name] = nn.Parameter(torch.empty(r, c, dtype=self._core_dtype(half=False)))
        if start == "from file":
            nn.init.constant_(core, torch.nan)  # a core that the file lacks is found by `check_numbers`
        elif config.init_weights:
            nn.init.zeros_(core)
        else:  # an update of about the size of an ordinary weight
            nn.init.normal_(core, std=(r * c) ** -0.25)
        self.sparsegrad_status[adapter_name] = status
        self.sparsegrad_checked[adapter_name] = start == "new"
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def copy_core(self, source: str, adapter_name: str) -> None:
        """Copy the core of one adapter to another."""
        core = self.sparsegrad_S[source]
        self.sparsegrad_S[adapter_name].data = core.detach().clone()
        self.sparsegrad_checked[adapter_name] = self.sparsegrad_checked[source]

    def device_of(self, adapter_name: str) -> torch.device:
        """Return the device of an adapter's core; that of the base weight if the core is not allocated yet."""
        core = self.sparsegrad_S[adapter_name]
        return (self._base_device_and_dtype()[0] if core.is_meta else None) or core.device

    @torch.no_grad()
    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Replace an adapter's basis, and set its core to zero.

        The core stays the same parameter, for optimizers that hold it, also where its size changes.

        Raises:
            ValueError: the core is sharded and would change its size.
        """
        core = self.sparsegrad_S[adapter_name]
        shape, device = basis.core_shape(self.out_features, self.in_features), self.device_of(adapter_name)
        if is_sharded(core):
            if shape != tuple(core.shape):
                raise ValueError(
                    f"a sharded core keeps its size, found {tuple(core.shape)} and new bases for {shape}; calibrate "
                    "before fully_shard, or give the sizes as counts"
                )
            own_shard(core.detach()).zero_()
            self.sparsegrad_basis[adapter_name] = basis
            self.sparsegrad_checked[adapter_name] = True
            return
        zeros = torch.zeros(shape, dtype=core.dtype, device=device)
        self.sparsegrad_basis[adapter_name] = basis
        self.sparsegrad_checked[adapter_name] = True
        if core.is_meta:
            torch.utils.swap_tensors(core, nn.Parameter(zeros, requires_grad=core.requires_grad))
        else:
            set_core(core, zeros)

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())

    def _core_dtype(self, *, half: bool) -> torch.dtype:
        """Return the type of the base weight; float32 if that is narrower, unless `half` asks for it.

        A weight of integers is quantized and has no say.
        """
        dtype = self._base_device_and_dtype()[1]
        if dtype is None or not dtype.is_floating_point:
            return torch.float32
        return dtype if half else at_least_float32(dtype)

    @torch.no_grad()
    def narrow_core(self, adapter_name: str) -> None:
        """Give a core the type of the base weight, as `autocast_adapter_dtype=False` asks for."""
        self.sparsegrad_status[adapter_name].half = True
        core = self.sparsegrad_S[adapter_name]
        core.data = core.data.to(self._core_dtype(half=True))

    @torch.no_grad()
    def widen_cores(self) -> None:
        """Give cores that something has cast to half precision float32 again, unless half precision was asked for."""
        for name, core in self.sparsegrad_S.items():
            if core.dtype in HALF_PRECISION and not self.sparsegrad_status[name].half:
                set_core(core, core.float())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move core and basis to the device of the base weight. Unlike in PEFT, they keep their types.

        A core on the meta device stays there, until it is calibrated or loaded. And if the base weight is on disk (meta
        here), the basis stays: accelerate fetches parameters, not buffers.
        """
        target = self._base_device_and_dtype()[0] if device is None else device
        core, basis = self.core_and_basis(adapter_name)
        if target is None:
            return
        if core.device not in (target, torch.device("meta")):
            self.sparsegrad_S[adapter_name] = nn.Parameter(core.detach().to(target), requires_grad=core.requires_grad)
        if target.type != "meta":
            basis.to(target)

    def trained_cores(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the cores of all adapters, for `param_groups`."""
        for core in self.sparsegrad_S.values():
            yield "block", core

    def core_and_basis(self, adapter: str) -> tuple[nn.Parameter, Basis]:
        """Return `S` (r, c) of an adapter, and its basis."""
        return self.sparsegrad_S[adapter], cast(Basis, self.sparsegrad_basis[adapter])

    @torch.no_grad()  # `isfinite` would save tensors, which gradient checkpointing counts
    def check_numbers(self, adapter: str) -> None:
        """Check the numbers of an adapter from a file, once: at its first use in any mode, and before it is saved.

        Raises:
            RuntimeError: a tensor has not been loaded, or is damaged.
        """
        core, basis = self.core_and_basis(adapter)
        if self.sparsegrad_checked[adapter] or core.is_meta:
            return
        try:
            check_core(core, "S")
            for name in BASIS_BUFFERS:
                if getattr(basis, name) is not None:
                    check_buffer(getattr(basis, name), name)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"adapter {adapter!r} cannot be used: {error}. Its config belongs to a trained adapter, whose weights "
                "were not loaded, or are damaged. Load them with PeftModel.from_pretrained (the load_adapter of "
                "transformers' own models loads no fused experts); for a new adapter, call config.forget_bases() first"
            ) from error
        self.sparsegrad_checked[adapter] = True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `Vᵀ S U` in the layout of the base layer's weight and the type of the core."""
        self.check_numbers(adapter)
        S, basis = self.core_and_basis(adapter)
        delta = basis.from_basis(S.to(at_least_float32(S.dtype))).to(S.dtype)
        return delta.T if is_conv1d(self.get_base_layer()) else delta

    def weight_plus(self, adapter: str, factor: int = 1) -> Tensor:
        """Return the base weight plus `factor` times an adapter's update, in float32 or wider, rounded once."""
        self.check_numbers(adapter)
        S, basis = self.core_and_basis(adapter)
        if S.is_meta and not self.get_base_weight().is_meta:
            raise RuntimeError(no_core_yet(adapter))
        weight, transposed = self.get_base_weight(), is_conv1d(self.get_base_layer())
        core = factor * scaled(S.to(at_least_float32(S.dtype)), basis.scales)
        found = form_weight(weight.T if transposed else weight, core, basis.U, basis.V)
        return found.T.contiguous() if transposed else found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: `peft.convert_to_lora` works, since the update is a matrix of its own."""
        return True

    def _used_adapters(self) -> list[str]:
        wanted = set(self.sparsegrad_S) - self.skipped_adapters
        return [name for name in self.active_adapters if name in wanted and not self.disable_adapters]

    def _check_ready(self, adapter: str, x: Tensor) -> None:
        """Refuse an adapter that cannot run; warn once if it trains without calibration."""
        S = self.sparsegrad_S[adapter]
        if S.is_meta and is_offloaded(self.get_base_layer()):
            raise RuntimeError(f"adapter {adapter!r} was loaded onto a model that was offloaded already. {REMEDY}")
        if S.is_meta and not x.is_meta:
            raise RuntimeError(no_core_yet(adapter))
        self._check_first_use(adapter, torch.is_grad_enabled())

    @torch.compiler.assume_constant_result
    def _check_first_use(self, adapter: str, with_gradients: bool) -> None:
        """Check the numbers of an adapter once; warn once if it trains without calibration.

        `torch.compile` calls this when it traces the layer, and leaves it out of the graph. `torch.export` has no
        numbers to check.
        """
        if _is_exporting():
            return
        self.check_numbers(adapter)
        status = self.sparsegrad_status[adapter]
        trains = self.training and with_gradients and self.sparsegrad_S[adapter].requires_grad
        if status.data_free and trains and not self.skipped_adapters:  # these are being calibrated: nothing trains yet
            status.data_free = False  # warned
            warnings.warn(
                f"adapter {adapter!r} was not calibrated: its bases do not depend on the model, so it will learn less. "
                "Call calibrate_adapter(model, batches) before training, or train with SparseGradTrainer or the "
                "SparseGradCalibration callback",
                stacklevel=3,
            )

    def _check_own_weight(self) -> None:
        """Refuse a weight that is computed from others in each forward pass: what is written to it is lost."""
        base = self.get_base_layer()
        has_weight = type(base) is nn.Linear or is_conv1d(base) or is_parametrized(base)
        if has_weight and not isinstance(base.weight, nn.Parameter):
            raise TypeError(
                f"{type(base).__name__} computes its weight (by a parametrization, weight norm or pruning), so nothing "
                "can be merged into it; remove that from the layer before the adapter is made"
            )

    def _warn_of_rounding(self) -> None:
        if self.quantization_backend is not None:
            warnings.warn(
                f"the base weight is quantized ({self.quantization_backend.backend_name}) and is quantized again after "
                "the update is added, so small updates are lost; load the adapter onto the unquantized model for an "
                "exact merge",
                stacklevel=3,
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight; `safe_merge` checks for values that are not finite first."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparsegrad_S:
                continue
            self._warn_of_rounding()
            self._check_own_weight()
            merged = self.weight_plus(name)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged updates from the base weight, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.sparsegrad_S:
                self._warn_of_rounding()
                self.set_base_weight(self.weight_plus(name, -1))


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"The latter in PyTorch before 2.7: outside of what is traced, it is True in exports alone."


def check_unmerged(layers: Iterable[SparseGradLayer], adapter_name: str | None = None) -> None:
    """Raise `ValueError` if an adapter is merged into one of the layers; of `adapter_name`, that one alone counts."""
    for name in (name for layer in layers for name in layer.merged_adapters):
        if adapter_name in (None, name):
            raise ValueError(f"adapter {name!r} is merged; call unmerge_adapter() first")


def no_core_yet(adapter: str) -> str:
    """Say why an adapter on the meta device cannot be used."""
    return (
        f"adapter {adapter!r} was made with low_cpu_mem_usage=True and has no core yet: call "
        "calibrate_adapter(model, batches), or load weights into it"
    )


def _refuse_other_bases(
    layer: SparseGradLayer, tensors: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, _missing: list[str],
    _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Refuse calibrated bases in `load_state_dict`, if the adapter is not calibrated.

    Its layers of one shape share a data-free basis, which cannot hold the bases of all of them.
    """
    if errors:
        return  # one message is enough
    sizes = {"U": layer.in_features, "V": layer.out_features}
    for adapter in layer.sparsegrad_basis:
        basis, start = layer.core_and_basis(adapter)[1], f"{prefix}sparsegrad_basis.{adapter}."
        here = {name: getattr(basis, name) for name in BASIS_BUFFERS}
        found = {name: tensors[start + name] for name in BASIS_BUFFERS if start + name in tensors}
        if any(tensor is not None and tensor.is_meta for tensor in (*here.values(), *found.values())):
            continue
        same = all(
            name in sizes  # a data-free basis has no scales
            and here[name] is not None
            and here[name].shape == tensor.shape
            and is_data_free(tensor, sizes[name])
            for name, tensor in found.items()
        )
        if not same and _has_data_free_basis(layer, adapter):
            errors.append(
                f"{prefix.rstrip('.')}: the weights hold calibrated bases for adapter {adapter!r}, and the adapter "
                "here is not calibrated. Load them with PeftModel.from_pretrained, load_adapter or "
                "set_peft_model_state_dict, which make room for them. Accelerator.load_state and others that call "
                "load_state_dict need an adapter that is calibrated: save it with model.save_pretrained(folder), and "
                "make it here with PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
            return


def _has_data_free_basis(layer: SparseGradLayer, adapter: str) -> bool:
    basis = layer.core_and_basis(adapter)[1]
    return is_data_free(basis.U, layer.in_features) and is_data_free(basis.V, layer.out_features)


def _warn_of_lone_cores(layer: SparseGradLayer, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Warn once in `load_state_dict` if it has nothing of this layer but cores, and an adapter here is new.

    These may be the trained parameters of a calibrated adapter, whose bases are lost; or of a data-free one, which has
    the same bases here. The weights do not tell. A complete data-free basis has no tensors, and any file lacks them.
    """
    cores = f"{prefix}sparsegrad_S."
    if not all(key.startswith(cores) for key in tensors if key.startswith(prefix)):
        return
    for adapter, core in layer.sparsegrad_S.items():
        basis, status = layer.core_and_basis(adapter)[1], layer.sparsegrad_status[adapter]
        sides = [side for side in (basis.U, basis.V) if side is not None]
        if not sides or any(tensor.is_meta for tensor in (core, *sides)) or own_shard(core.detach()).any():
            continue
        if cores + adapter in tensors and not status.warned_of_lone_cores and _has_data_free_basis(layer, adapter):
            status.warned_of_lone_cores = True
            warnings.warn(
                f"the weights hold cores S for adapter {adapter!r} without their bases (sparsegrad_basis), and the "
                "adapter here is not calibrated. If they were trained in calibrated bases, they do nothing useful "
                "here. Save with model.save_pretrained or get_peft_model_state_dict(model), which include the bases; "
                "or give the adapter its bases before: calibrate it on the same batches",
                stacklevel=2,
            )
