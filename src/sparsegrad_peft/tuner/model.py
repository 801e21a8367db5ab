"""SparseGradModel: which module is replaced by what, and how the adapter is saved and loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.data_free import data_free_basis
from ..method.experts import check_selects_neurons, expert_layout
from ..method.plain import is_conv1d
from ..method.surgery import leave_fast_path
from .adapters import BASIS, ROOT, layers_of, paths_and_keys
from .bases import data_free_sizes, empty_basis, warn_of_few_entries
from .checks import check_adapter_name, check_whole
from .combine import add_weighted_sum
from .config import SparseGradConfig, uncompiled_name
from .decoding import prepared_for_decoding
from .experts import SparseGradExperts
from .fit import mixed_bases
from .layer import AdapterStatus, SparseGradLayer, no_core_yet
from .linear import SparseGradTunerLinear
from .loading import make_room
from .mixed_batch import mixed_batch
from .peft_private import PREFIX, in_out_features
from .targets import TARGETS, choose_targets, log_share, named_experts, warn_unmatched

logger = logging.getLogger(__name__)


@dataclass
class _Injection:
    """What is known while one adapter is injected."""

    source: str | None
    "the adapter of which this one is a copy"
    is_new: bool
    "the adapter gets data-free bases"
    status: AdapterStatus
    bases: dict[tuple[str, torch.device | None], Basis] = field(default_factory=dict)
    "group and device -> basis"


class SparseGradModel(BaseTuner):
    """The adapted model, made by `get_peft_model(model, SparseGradConfig(...))`.

    Adapters start in one of three ways:

    - with a new configuration: as a no-op in data-free bases;
    - with the configuration object of another adapter of the model (`model.peft_config["default"]`): as a copy of that
      adapter. TRL's reference adapters need it: TRL copies parameters of some names only, and no bases;
    - with the configuration of a trained adapter otherwise: empty, for `load_adapter`. Refused in use until loaded.
    """

    prefix = PREFIX
    tuner_layer_cls = SparseGradLayer
    target_module_mapping = TARGETS  # type: ignore[assignment]  # PEFT takes regular expressions too

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter's layers to the model, as in PEFT.

        A new adapter gets a copy of the configuration, so that the caller's object can make other adapters. Only the
        configuration of a trained adapter to be loaded (`inference_mode`) is used itself, which PEFT expects.

        Raises:
            ValueError: PyTorch's containers cannot hold the name; the sizes or targets do not fit the model.
        """
        check_adapter_name(adapter_name)
        given = cast(SparseGradConfig, self.peft_config[adapter_name])
        others = (name for name, config in self.peft_config.items() if config is given and name != adapter_name)
        source = next(others, None)
        to_load = given.inference_mode and bool(given.core_shapes) and source is None
        config = given if to_load else copy(given)
        is_new = not config.core_shapes and not config.original_space
        if is_new:
            config.core_shapes, config.data_free = {}, True
        self._injection = _Injection(source, is_new, AdapterStatus(config.prefer, config.data_free))
        self.peft_config[adapter_name] = config
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config[adapter_name] = given
            raise
        finally:
            del self._injection  # the layers hold the bases, until the adapter is deleted
        if source is not None:
            _copy_whole_modules(model, source, adapter_name)
        adapted = [layer.key(name) for name, layer in layers_of(model, adapter_name).items()]
        if is_new:
            warn_unmatched(given.target_modules, adapted)
            warn_of_few_entries(config)
        log_share(model, adapted, automatic=given.target_modules is None and given.target_parameters is None)

    def _prepare_adapter_config(self, peft_config: SparseGradConfig, model_config: dict[str, Any]) -> SparseGradConfig:
        if peft_config.target_modules is None:
            experts = peft_config.target_parameters is None and (peft_config.neurons or peft_config.original_space)
            targets, parameters = choose_targets(self.model, model_config.get("model_type"), experts=bool(experts))
            peft_config.target_modules, peft_config.target_parameters = targets, parameters
        elif peft_config.target_parameters:
            peft_config.target_parameters = named_experts(self.model, peft_config.target_parameters)
        return peft_config

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the fused experts. Unlike in PEFT, `layers_to_transform` and `exclude_modules` hold for them too."""
        assert isinstance(peft_config, SparseGradConfig)
        adapted, path_config = [], copy(peft_config)
        for name in peft_config.target_parameters or ():
            path, _, parameter = name.rpartition(".")
            path_config.target_modules = [path]
            if not self._check_target_module_exists(path_config, path):
                continue
            parent, _, child = path.rpartition(".")
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, model.get_submodule(path), child, model.get_submodule(parent), name,
                    parameter_name=parameter,
                )  # fmt: skip
            adapted.append(name)
        return adapted

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """As in PEFT, but `layers_to_transform` applies to all targets.

        PEFT applies it only to layers that are targeted by the ending of their names; the default targets are a regular
        expression or whole names.
        """
        found = check_target_module_exists(peft_config, key)
        if not found or getattr(peft_config, "layers_to_transform", None) is None or "." not in key:
            return found
        by_ending = copy(peft_config)
        by_ending.target_modules = {key.rpartition(".")[2]}
        return check_target_module_exists(by_ending, key)

    def _create_and_replace(  # type: ignore[override]
        self, config: SparseGradConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, *, parameter_name: str | None = None, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
        if parameter_name is not None:
            self._adapt_experts(config, adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{current_key} cannot be adapted: torch.nn.MultiheadAttention reads its weight and never calls it"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not (isinstance(base, nn.Linear) or is_conv1d(base) or resolve_quantization_backend(base) is not None):
            raise TypeError(
                f"Target module {target} is not supported. SparseGrad adapts `torch.nn.Linear`, "
                "`transformers.pytorch_utils.Conv1D` and quantized linear layers."
            )
        in_features, out_features = in_out_features(base)
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            check_whole(weight, current_key)
        device = weight.device if isinstance(weight, Tensor) else None
        basis = self._basis_for(config, current_key, [out_features, in_features], device, target)
        layer = target
        if not isinstance(layer, SparseGradLayer):
            layer = SparseGradTunerLinear(target, adapter_name, **get_quantization_kwargs(self.model))
        self._add_to(layer, config, adapter_name, basis)
        if layer is not target:
            self._insert(layer, adapter_name, parent, target_name, target)
            leave_fast_path(self.model, parent)

    def _adapt_experts(
        self, config: SparseGradConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        key: str, parameter_name: str,
    ) -> None:  # fmt: skip
        """Wrap a module of fused experts for one of its parameters, or add the adapter to that wrapper."""
        wrapper = target
        while isinstance(wrapper, SparseGradExperts) and wrapper.parameter_name != parameter_name:
            wrapper = wrapper.base_layer
        base = target.get_base_layer() if isinstance(target, SparseGradExperts) else target
        check_whole(base.get_parameter(parameter_name), key)
        layout = expert_layout(base, parameter_name)
        if not config.original_space:
            check_selects_neurons(layout, config.sizes, key)
        basis = self._basis_for(config, key, layout.entry, base.get_parameter(parameter_name).device, wrapper)
        layer = wrapper
        if not isinstance(layer, SparseGradExperts):
            layer = SparseGradExperts(target, parameter_name, adapter_name)
        self._add_to(layer, config, adapter_name, basis)
        if layer is not wrapper:
            self._insert(layer, adapter_name, parent, target_name, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give the cores the type of the weights if the caller asks for it; they are made in float32 or wider.

        So an adapter that is injected without a `PeftModel` has them in float32 too, in which small steps count.
        """
        if not autocast_adapter_dtype:
            for layer in layers_of(self.model, adapter_name).values():
                layer.narrow_core(adapter_name)

    def _add_to(self, layer: SparseGradLayer, config: SparseGradConfig, adapter_name: str, basis: Basis) -> None:
        """Add the adapter to a layer."""
        source = self._injection.source
        from_file = bool(config.core_shapes) and not self._injection.is_new and source is None
        layer.update_layer(adapter_name, config, basis, self._injection.status, "from file" if from_file else "new")
        if source is not None:
            layer.copy_core(source, adapter_name)

    def _insert(self, layer: Any, adapter_name: str, parent: nn.Module, name: str, target: nn.Module) -> None:
        """Put a new layer in the place of another."""
        layer.train(target.training)  # a layer put into a model in eval mode does not train
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # another adapter is the one that trains
        self._replace_module(parent, name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the new layer in its place, and do nothing more.

        PEFT also copies `weight` and `bias`, which fails on modules without them (BERT's pooler in `modules_to_save`),
        and moves the new layer to the device of the old, which fails on 8-bit layers with `low_cpu_mem_usage`.
        """
        setattr(parent, child_name, new_module)

    def _basis_for(
        self, config: SparseGradConfig, key: str, size: list[int], device: torch.device | None, target: nn.Module
    ) -> Basis:
        """Return the basis that the layer of this name and size (see `size_entry`) shares with its group."""
        key, (out_features, in_features) = uncompiled_name(key), size[:2]
        bases, source = self._injection.bases, self._injection.source
        if self._injection.is_new:
            assert config.core_shapes is not None
            r, c = data_free_sizes(config, out_features, in_features, key)
            group = f"data-free {out_features}x{in_features}"
            config.core_shapes[key] = [group, r, c, *size]
        elif config.original_space:
            group, r, c = "", out_features, in_features
        else:
            group, r, c = self._known_shape(config, key, size)
        place = (group, device)  # where the layer will move it to
        if place not in bases:
            if source is not None:
                assert isinstance(target, SparseGradLayer)
                bases[place] = deepcopy(target.core_and_basis(source)[1])  # of its own: it may be loaded into
            elif config.original_space:
                bases[place] = Basis.identity()
            elif self._injection.is_new:
                selected = config.sizes.selected(out_features, in_features)
                bases[place] = data_free_basis(r, c, out_features, in_features, config.dtype_of_bases, selected)
            else:
                bases[place] = empty_basis(
                    r, c, out_features, in_features, config.dtype_of_bases, data_free=config.data_free,
                    selected=config.sizes.selected(out_features, in_features),
                    scales=bool(config.exponent) and not config.data_free,
                )  # fmt: skip
        return bases[place]

    @staticmethod
    def _known_shape(config: SparseGradConfig, key: str, size: list[int]) -> tuple[str, int, int]:
        """Return [group, r, c] of a layer of a trained adapter."""
        shapes = config.core_shapes or {}
        if key not in shapes:
            raise ValueError(
                f"the adapter was made for {', '.join(list(shapes)[:3])}, ... and not for {key}; it belongs to another "
                "model, or target_modules was changed"
            )
        group, r, c, *known = shapes[key]
        if known != size:
            names = ("out", "in", "experts")[: len(known)]
            raise ValueError(
                f"the adapter belongs to another model: {key} had ({', '.join(names)}) = {tuple(known)} when the "
                f"adapter was made, and has {tuple(size)} here"
            )
        return group, r, c

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Select the adapter's tensors, with each basis once: under the first layer of its group."""
        for adapted in layers_of(model, adapter_name).values():
            adapted.check_numbers(adapter_name)
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if any(PREFIX in key and value.is_meta for key, value in entries.items()):
            raise RuntimeError(no_core_yet(adapter_name))
        shapes = getattr(config, "core_shapes", None) or {}
        kept, saved = {}, set()
        for key, value in _renamed(entries, paths_and_keys(model, adapter_name)).items():
            if BASIS in key:
                layer, _, side = key.partition(BASIS)
                group = (shapes.get(layer.removeprefix(ROOT), [layer])[0], side)
                if group in saved:
                    continue
                saved.add(group)
            kept[key] = value
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the weights, and name each basis under every layer of its group again."""
        assert isinstance(config, SparseGradConfig)
        shared = make_room(model, config, adapter_name, state_dict)
        paths = {key: path for path, key in paths_and_keys(model, adapter_name).items()}
        weights = _renamed({**state_dict, **shared}, paths)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse, in `load_state_dict`, different bases for layers that share one here: the last would win."""
        for adapter, config in self.peft_config.items():
            if config.calibrated and (problem := mixed_bases(self, adapter, state_dict, prefix)):
                error_msgs.append(problem)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is the weighted sum of others, up to rounding. It is not active yet.

        Args:
            adapters: names of adapters of the same layers.
            weights: one for each adapter, of any sign.
            adapter_name: name of the new adapter.
            combination_type: "linear" adds the cores of adapters with the same bases (from one calibration, or both
                data-free or in the original space). "cat" takes adapters with any bases; the new bases have as many
                rows as those of all adapters together.

        Raises:
            ValueError: the bases differ, the adapters hold modules trained whole, or the arguments do not fit. Nothing
                has been changed then.
        """
        if combination_type not in ("linear", "cat"):
            raise ValueError(f'combination_type must be "linear" or "cat", found {combination_type!r}')
        add_weighted_sum(self, adapters, weights, adapter_name, joined=combination_type == "cat")

    @property
    def generate(self) -> Callable[..., Any]:
        """The model's own `generate`, with the adapter's updates prepared for decoding while it runs."""
        generate = self.model.generate
        layers = [module for module in self.modules() if isinstance(module, SparseGradTunerLinear | SparseGradExperts)]

        @wraps(generate)
        def decode(*args: Any, **kwargs: Any) -> Any:
            with prepared_for_decoding(self, layers):
                return generate(*args, **kwargs)

        return decode

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` to the layers and the modules to save, for batches of several adapters."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with mixed_batch(self.model, adapter_names, kwargs.get("num_beams")):
            yield


@torch.no_grad()
def _copy_whole_modules(model: nn.Module, source: str, adapter_name: str) -> None:
    """Copy what an adapter trains besides the layers, such as a head. PEFT starts anew with what the base model has."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            if adapter_name not in module.modules_to_save:  # PEFT adds it later, if it is not there
                module.modules_to_save[adapter_name] = deepcopy(module.original_module).requires_grad_(False)
            module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
        deltas = getattr(module, "trainable_tokens_delta", {})
        if source in deltas and adapter_name in deltas:
            deltas[adapter_name].copy_(deltas[source])


def _renamed(entries: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the entries of an adapter with the names of layers replaced."""

    def rename(entry: str) -> str:
        layer, found, rest = entry.removeprefix(ROOT).partition(f".{PREFIX}")
        if not found:
            return entry
        root = ROOT if entry.startswith(ROOT) else ""  # transformers' own `save_pretrained` puts it before the names
        key = uncompiled_name(layer)
        return f"{root}{names.get(layer, names.get(key, key))}{found}{rest}"

    return {rename(entry): value for entry, value in entries.items()}
