"""Method `lora`: PEFT's LoRA on the MLP layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsegrad_peft.method.sizes import Sizes

from .method import LAYERS, LOOP, SIZES, Adapted, Method, Setup
from .settings import AdapterArguments

if TYPE_CHECKING:
    from torch import nn


class Lora(Method):
    """LoRA with `lora_alpha` equal to its rank, so that the update is `B A` itself."""

    name = "lora"
    order = 1
    summary = "PEFT's LoRA"
    learning_rate = 2e-3
    reads = LAYERS | LOOP | SIZES | {"adapter.rank"}

    def without_effect(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """The sizes, if the rank is given: they only serve to find the matching rank."""
        return {} if settings.get("adapter.rank") is None else dict.fromkeys(SIZES, "adapter.rank")

    def adapts_experts(self, adapter: AdapterArguments) -> bool:
        """True where `sparsegrad` with these settings does, so that both adapt the same weights."""
        return adapter.form[0]

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Add the adapter."""
        from peft import LoraConfig, get_peft_model

        from .training.layers import modules_to_save, split_targets

        targets = self.target_layers(model, setup.adapter)
        rank = setup.adapter.rank or matching_rank(model, targets, setup.adapter.sizes)
        others = modules_to_save(model, targets, setup.heads, train_rest=setup.train_rest)
        linears, fused = split_targets(model, targets)
        config = LoraConfig(
            task_type=setup.task_type, r=rank, lora_alpha=rank, target_modules=linears, target_parameters=fused or None,
            modules_to_save=others,
        )  # fmt: skip
        return Adapted(get_peft_model(model, config))


def matching_rank(model: nn.Module, targets: Sequence[str], sizes: Sizes) -> int:
    """The rank at which LoRA trains about as many entries as SparseGrad with these sizes.

    Args:
        model: the model, also on the meta device.
        targets: names of the adapted layers, and of fused experts' parameters.
        sizes: of SparseGrad's bases.

    Raises:
        ValueError: a size is a share of energy, so that SparseGrad's entries are known only after calibration.
    """
    from sparsegrad_peft.method.experts import expert_layout, owner_of, target_shape

    cores = per_rank = 0
    for name in targets:
        out_features, in_features = target_shape(model, name)
        r, c = sizes.counts(out_features, in_features)
        if r is None or c is None:
            raise ValueError("adapter.rank: the matching rank is not known for sizes by energy; give a rank")
        cores += r * c
        owner, parameter = owner_of(model, name)
        if parameter is None:
            per_rank += out_features + in_features
        else:
            layout = expert_layout(owner, parameter)
            per_rank += layout.experts * (layout.out + layout.in_)
    return max(1, round(cores / per_rank))


METHOD = Lora()
