"""Which module is replaced by what, and how shared bases are saved once and loaded for all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.plain import is_conv1d
from ..method.surgery import leave_fast_path
from .bases import BASIS, ROOT, make_room
from .combine import add_weighted_sum
from .config import SparseGradConfig
from .layer import SparseGradLayer, SparseGradTunerLinear
from .peft_private import PREFIX, in_out_features
from .targets import TARGETS, find_mlp_linears

logger = logging.getLogger(__name__)


def _group_of(config: PeftConfig, layer: str) -> str:
    """The group of a layer, as calibration wrote it down."""
    return getattr(config, "core_shapes", {}).get(layer.removeprefix(ROOT), [layer])[0]


class SparseGradModel(BaseTuner):
    """The adapted model, made by `get_peft_model(model, SparseGradConfig(...))`."""

    prefix = PREFIX
    tuner_layer_cls = SparseGradLayer
    target_module_mapping = TARGETS  # type: ignore[assignment]  # PEFT takes regular expressions too

    def _prepare_adapter_config(self, peft_config: SparseGradConfig, model_config: dict[str, Any]) -> SparseGradConfig:
        if peft_config.target_modules is None:
            known = TARGETS.get(model_config.get("model_type", ""))
            peft_config.target_modules = known or find_mlp_linears(self.model)
            if not peft_config.target_modules:
                raise ValueError(
                    f"no MLP layers known for model_type {model_config.get('model_type')!r}, and none found by "
                    "structure; please specify `target_modules` in the config"
                )
            logger.info("target_modules, %s: %s", "known" if known else "by structure", peft_config.target_modules)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """As in PEFT, but `layers_to_transform` holds for all targets.

        PEFT looks at it only where a layer is targeted by the ending of its name; the default targets are a regular
        expression or whole names.
        """
        found = check_target_module_exists(peft_config, key)
        if not found or getattr(peft_config, "layers_to_transform", None) is None or "." not in key:
            return found
        by_ending = copy(peft_config)
        by_ending.target_modules = {key.rpartition(".")[2]}
        return check_target_module_exists(by_ending, key)

    def _prepare_model(self, peft_config: SparseGradConfig, model: nn.Module) -> None:
        # Group and device -> basis, while one adapter is injected.
        self._bases: dict[tuple[str, torch.device | None], Basis] = {}

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        self._bases = {}  # the layers hold them, until the adapter is deleted

    def _create_and_replace(  # type: ignore[override]
        self, config: SparseGradConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{current_key} cannot be adapted: torch.nn.MultiheadAttention reads its weight and never calls it"
            )
        basis = self._basis_for(config, current_key, target)
        if isinstance(target, SparseGradLayer):
            target.update_layer(adapter_name, config, basis)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not (isinstance(base, nn.Linear) or is_conv1d(base) or resolve_quantization_backend(base) is not None):
            raise TypeError(
                f"Target module {target} is not supported. SparseGrad adapts `torch.nn.Linear`, "
                "`transformers.pytorch_utils.Conv1D` and quantized linear layers."
            )
        kwargs = get_quantization_kwargs(self.model)
        new_module = SparseGradTunerLinear(target, adapter_name, config, basis, **kwargs)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # another adapter is the one that trains
        self._replace_module(parent, target_name, new_module, target)
        leave_fast_path(self.model, parent)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Nothing more than that.

        PEFT's also copies `weight` and `bias` over, which is theirs already, and fails on what has none (BERT's pooler
        in `modules_to_save`); and it moves the new layer to the device of the old, where it is already, and fails on
        8-bit layers if low_cpu_mem_usage has left the core on the meta device.
        """
        setattr(parent, child_name, new_module)

    def _basis_for(self, config: SparseGradConfig, key: str, target: nn.Module) -> Basis:
        """The identity before calibration; afterwards room for the group's basis, which the checkpoint fills."""
        if not config.calibrated:
            return self._bases.setdefault(("", None), Basis.identity())
        if key not in config.core_shapes:
            raise ValueError(
                f"the adapter was calibrated for {', '.join(list(config.core_shapes)[:3])}, ... and not for {key}; "
                "it belongs to another model, or target_modules was changed"
            )
        group, r, c, out_features, in_features = config.core_shapes[key]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        in_here, out_here = in_out_features(base)
        if (out_here, in_here) != (out_features, in_features):
            raise ValueError(
                f"the adapter belongs to another model: {key} had (out, in) = ({out_features}, {in_features}) when it "
                f"was calibrated, and has ({out_here}, {in_here}) here"
            )
        weight = getattr(base, "weight", None)
        place = (group, weight.device if isinstance(weight, Tensor) else None)  # where the layer will move it to
        if place not in self._bases:
            self._bases[place] = Basis.allocate(
                r=r, c=c, out_features=out_features, in_features=in_features, dtype=config.dtype_of_bases
            )
        return self._bases[place]

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        kept, saved = {}, set()
        for key, value in entries.items():
            if BASIS in key:  # once for each group: the first layer's
                layer, _, side = key.partition(BASIS)
                group = (_group_of(config, layer), side)
                if group in saved:
                    continue
                saved.add(group)
            kept[key] = value
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, SparseGradConfig)
        make_room(model, config, adapter_name, state_dict)
        config = model.peft_config[adapter_name]  # type: ignore[index, assignment]  # with the shapes, if it made some
        bases = {}
        for key, value in state_dict.items():
            if BASIS in key:
                layer, _, side = key.partition(BASIS)
                bases[_group_of(config, layer), side] = value
        shared = {  # for all layers of the group again: each holds the one module
            f"{ROOT}{layer}{BASIS}{side}": value
            for (group, side), value in bases.items()
            for layer, shape in getattr(config, "core_shapes", {}).items()
            if shape[0] == group
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, {**state_dict, **shared})

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is the weighted sum of others, to rounding; it is not active yet.

        Args:
            adapters: names of adapters of the same layers.
            weights: one for each, of any sign.
            adapter_name: of the new one.
            combination_type: PEFT's names. "linear" is for adapters with the same bases (both from one calibration, one
                trained on from the other's file, or both in the original space), and adds their cores. "cat" is for
                calibrated adapters with any bases; the new one has as many rows in its bases as all of them together.

        Raises:
            ValueError: the bases differ, the adapters hold modules trained whole, or the arguments do not fit; the
                message says what to do instead. Nothing has been changed then.
        """
        if combination_type not in ("linear", "cat"):
            raise ValueError(f'combination_type must be "linear" or "cat", found {combination_type!r}')
        add_weighted_sum(self, adapters, weights, adapter_name, joined=combination_type == "cat")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` on to the layers and the modules to save, for batches of several adapters."""
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
