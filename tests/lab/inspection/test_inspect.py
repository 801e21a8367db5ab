"""The JSON result, and the adapted share of the MLP."""

from __future__ import annotations

import json

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Qwen2MoeConfig,
)

from helpers import TINY_SIZES
from sparsegrad_lab.inspection.inspect import inspect


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
    inspection = inspect(model)
    assert inspection.layers == 2 * 3
    assert inspection.parts.mlp == shared + experts + router + gate
    assert inspection.adapted_mlp_share == shared / (shared + experts)
