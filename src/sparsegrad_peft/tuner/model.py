"""SparseGradModel: which module is replaced by what, and how the adapter is saved and loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.data_free import data_free_basis
from ..method.plain import is_conv1d
from ..method.surgery import leave_fast_path
from .adapters import BASIS, ROOT, layers_of
from .bases import data_free_sizes, empty_basis
from .checks import check_adapter_name
from .combine import add_weighted_sum
from .config import SparseGradConfig
from .layer import AdapterStatus, SparseGradLayer, SparseGradTunerLinear, Start
from .loading import make_room
from .peft_private import PREFIX, in_out_features
from .targets import TARGETS, choose_targets, log_share

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
        configuration of an adapter to be loaded (`inference_mode`) is used itself, which PEFT expects.

        Raises:
            ValueError: PyTorch's containers cannot hold the name; the sizes or targets do not fit the model.
        """
        check_adapter_name(adapter_name)
        given = cast(SparseGradConfig, self.peft_config[adapter_name])
        others = (name for name, config in self.peft_config.items() if config is given and name != adapter_name)
        source = next(others, None)
        config = given if given.inference_mode and source is None else copy(given)
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
        log_share(model, layers_of(model, adapter_name), automatic=given.target_modules is None)

    def _prepare_adapter_config(self, peft_config: SparseGradConfig, model_config: dict[str, Any]) -> SparseGradConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = choose_targets(self.model, model_config.get("model_type"))
        return peft_config

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
        current_key: str, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
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
        basis = self._basis_for(config, current_key, base, target)
        injection = self._injection
        from_file = bool(config.core_shapes) and not injection.is_new and injection.source is None
        start: Start = "from file" if from_file else "new"
        if isinstance(target, SparseGradLayer):
            target.update_layer(adapter_name, config, basis, injection.status, start)
            if injection.source is not None:
                target.copy_core(injection.source, adapter_name)
            return
        quantization = get_quantization_kwargs(self.model)
        new_module = SparseGradTunerLinear(target, adapter_name, config, basis, injection.status, start, **quantization)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # another adapter is the one that trains
        self._replace_module(parent, target_name, new_module, target)
        leave_fast_path(self.model, parent)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the new layer in its place, and do nothing more.

        PEFT also copies `weight` and `bias`, which fails on modules without them (BERT's pooler in `modules_to_save`),
        and moves the new layer to the device of the old, which fails on 8-bit layers with `low_cpu_mem_usage`.
        """
        setattr(parent, child_name, new_module)

    def _basis_for(self, config: SparseGradConfig, key: str, base: nn.Module, target: nn.Module) -> Basis:
        """Return the basis that the layer of this name shares with its group."""
        in_features, out_features = in_out_features(base)
        bases, source = self._injection.bases, self._injection.source
        if self._injection.is_new:
            assert config.core_shapes is not None
            r, c = data_free_sizes(config, out_features, in_features, key)
            group = f"data-free {out_features}x{in_features}"
            config.core_shapes[key] = [group, r, c, out_features, in_features]
        elif config.original_space:
            group, r, c = "", out_features, in_features
        else:
            group, r, c = self._known_shape(config, key, out_features, in_features)
        weight = getattr(base, "weight", None)
        place = (group, weight.device if isinstance(weight, Tensor) else None)  # where the layer will move it to
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
    def _known_shape(config: SparseGradConfig, key: str, out_features: int, in_features: int) -> tuple[str, int, int]:
        """Return [group, r, c] of a layer of a trained adapter."""
        shapes = config.core_shapes or {}
        if key not in shapes:
            raise ValueError(
                f"the adapter was made for {', '.join(list(shapes)[:3])}, ... and not for {key}; it belongs to another "
                "model, or target_modules was changed"
            )
        group, r, c, *known = shapes[key]
        if known != [out_features, in_features]:
            raise ValueError(
                f"the adapter belongs to another model: {key} had (out, in) = ({known[0]}, {known[1]}) when the "
                f"adapter was made, and has ({out_features}, {in_features}) here"
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
        shapes = getattr(config, "core_shapes", None) or {}
        kept, saved = {}, set()
        for key, value in entries.items():
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
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, {**state_dict, **shared})

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is the weighted sum of others, to rounding. It is not active yet.

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
        layers = [module for module in self.modules() if isinstance(module, SparseGradTunerLinear)]

        @wraps(generate)
        def decode(*args: Any, **kwargs: Any) -> Any:
            try:
                for layer in layers:
                    layer.fold()
                return generate(*args, **kwargs)
            finally:
                for layer in layers:
                    layer.folded = None

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
        layers = [module for module in self.modules() if isinstance(module, SparseGradLayer)]
        known = {name for layer in layers for name in layer.sparsegrad_S}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

        def with_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
            return args, {**kwargs, "adapter_names": names}

        beams = kwargs.get("num_beams")
        repeated = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        once = set(encoder.modules()) if encoder is not self.model else set()  # sees each example once, not each beam
        handles = [
            module.register_forward_pre_hook(
                partial(with_names, names=list(adapter_names) if module in once else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (SparseGradLayer, AuxiliaryTrainingWrapper))  # the latter: modules_to_save
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
