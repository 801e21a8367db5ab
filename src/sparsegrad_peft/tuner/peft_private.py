"""Everything private of PEFT that the adapter relies on. Checked against peft 0.21.0 to 0.21.2.

PEFT has no plugin interface for methods of other packages:

- Its registry takes members of the `PeftType` enum only, so `ensure_peft_type` adds one. Waits for a registry that
  takes names (huggingface/peft issues 2273, 2282). If PEFT gets a SPARSEGRAD of its own, that one stays.
- A tuner overrides underscored methods of `BaseTuner` and `BaseTunerLayer`. `HOOKS` lists them with their parameters.
- `in_out_features` reads the size of any linear layer, quantized ones included. Waits for a public function.
- `include_all_linear_layers` resolves target_modules="all-linear". Waits for a public function.
- `mistaken_for_experts` knows which linear layers PEFT's LoRA takes for fused experts, as they were named in
  transformers 4. Waits for a PEFT that looks at the layer itself.

`tests/tuner/test_peft_private.py` fails if one of these changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

__all__ = [
    "HOOKS", "NAME", "PREFIX", "ensure_peft_type", "in_out_features", "include_all_linear_layers",
    "mistaken_for_experts", "register",
]  # fmt: skip

logger = logging.getLogger(__name__)

NAME = "SPARSEGRAD"
PREFIX = "sparsegrad_"
"""Begins the names of all attributes that an adapted layer has for its adapters. transformers expects the method's name
in lower case."""

HOOKS: dict[type, dict[str, tuple[str, ...]]] = {
    BaseTuner: {
        "_cast_adapter_dtype": ("self", "adapter_name", "autocast_adapter_dtype"),
        "_check_target_module_exists": ("peft_config", "key"),
        "_create_and_replace": ("self", "peft_config", "adapter_name", "target", "target_name", "parent",
                                "current_key", "parameter_name"),
        "_inject_parameters": ("self", "peft_config", "model", "adapter_name", "low_cpu_mem_usage"),
        "_get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        "_prepare_adapter_config": ("self", "peft_config", "model_config"),
        "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
        "_replace_module": ("self", "parent", "child_name", "new_module", "child"),
    },
    PeftModel: {"_enable_peft_forward_hooks": ("self", "args", "kwargs")},  # calls the tuner's
    BaseTunerLayer: {
        "_cast_input_dtype": ("self", "x", "dtype"),
        "_get_base_layer_device_and_dtype": ("self", "base_layer"),
        "_move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
    },
}  # fmt: skip
"""Class -> underscored method that the tuner overrides or calls -> its parameters."""


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of any linear layer, quantized ones included.

    Raises:
        TypeError: PEFT does not know the layer's size.
    """
    in_features, out_features = _get_in_out_features(layer)
    if in_features is None or out_features is None:
        raise TypeError(f"the size of a {type(layer).__name__} is not known")
    return in_features, out_features


def mistaken_for_experts(linears: Iterable[str], model_type: str | None, *, unknown: bool) -> list[str]:
    """Return the linear layers that PEFT takes for a model's fused experts if LoRA's `target_modules` names them.

    It goes by the last part of the name, also for a dense MLP and for shared experts.

    Args:
        linears: names of linear layers.
        model_type: of the model's config; None if it is not known.
        unknown: what to assume of a model whose type is not known: that it is one of those concerned, or not.
    """
    # Here, since an export alone needs it.
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    if model_type is not None:
        names = set(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ()))
    else:
        names = set().union(*_MOE_TARGET_MODULE_MAPPING.values()) if unknown else set()
    return [name for name in linears if name.rpartition(".")[2] in names]


def ensure_peft_type() -> PeftType:
    """Return the enum member `PeftType.SPARSEGRAD`; add it if it does not exist.

    A plain string works for `get_peft_model`, but transformers reads `.value`.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        type.__setattr__(PeftType, NAME, member)  # from Python 3.12 on, members are attributes of their class
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT, so that `get_peft_model` and the loaders know it. A second call does nothing."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(ensure_peft_type())
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    elif known is not model_cls:
        logger.warning(
            "PEFT already has a method %s (%s.%s). It stays registered; the one of sparsegrad_peft is not registered. "
            "To use sparsegrad_peft's, install a PEFT version without it.",
            NAME, known.__module__, known.__qualname__,
        )  # fmt: skip
