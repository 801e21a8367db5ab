"""The JSON result, and the adapted share of the MLP."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from helpers import TINY_SIZES
from sparsegrad_lab.inspection.inspect import inspect
from sparsegrad_peft import SparseGradConfig


def test_as_dict_is_json_and_complete() -> None:
    for target_modules in (None, ("fc2", "dense")):
        inspection = inspect(BertConfig(**TINY_SIZES), target_modules=target_modules, c="full", r=8)
        found = json.loads(json.dumps(inspection.as_dict()))
        assert found["parts"]["total"] == inspection.parts.total
        assert sum(found["parts"]["shares"].values()) == pytest.approx(1)
        assert found["groups"][0]["in"] == 64
        assert found["methods"][-1]["total_bytes_high"] == inspection.methods[-1].total_bytes_high
        assert found["entries"] == inspection.entries
        assert any("Activations are not counted" in note for note in found["notes"])


def test_adapted_share_of_the_mlp() -> None:
    """A dense MLP whole, one of its two layers, attention only, and a mixture of experts whose experts are fused."""
    bert = BertConfig(**TINY_SIZES)
    assert inspect(bert).adapted_mlp_share == 1
    assert inspect(bert, target_modules=["output.dense"]).adapted_mlp_share == 0.5  # attention.output.dense is no MLP
    assert inspect(bert, target_modules=["query"]).adapted_mlp_share == 0
    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 128}
    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**TINY_SIZES, **sizes, num_key_value_heads=2, vocab_size=100)
    )
    shared, experts, router, gate = 2 * 3 * 64 * 128, 2 * 4 * 3 * 64 * 32, 2 * 4 * 64, 2 * 64
    inspection = inspect(model, c=0.5, r=0.5)  # a form that leaves fused experts out
    assert inspection.layers == 2 * 3
    assert inspection.parts.mlp == shared + experts + router + gate
    assert inspection.adapted_mlp_share == shared / (shared + experts)


def test_fused_experts_are_layers_of_their_own() -> None:
    """What is counted is what an adapter trains; LoRA's rank is for matrices of each expert."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**TINY_SIZES, **sizes))
    inspection = inspect(model)
    assert inspection.adapted_mlp_share == 1
    assert [group.name for group in inspection.groups] == [
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    ]
    up, down = inspection.groups
    assert (up.layers, up.out, up.in_, up.experts) == (2, 4 * 512, 64, 4)
    assert (down.out, down.in_) == (64, 4 * 256)
    assert up.lora_entries_per_rank == 4 * (512 + 64)
    assert [row.key for row in inspection.methods] == ["full", "layers", "lora", "block", "topk"]
    assert inspection.notes[0].startswith("Fused experts")
    adapted = get_peft_model(model, SparseGradConfig())
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert inspection.entries == trained
    per_rank = 2 * (up.lora_entries_per_rank + down.lora_entries_per_rank)
    assert inspection.lora_rank == round(trained / per_rank)
