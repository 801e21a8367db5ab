"""Sequences of 4,096 tokens: many steps stay finite, and backward keeps what the layers say that it keeps."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import train
from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups

TOKENS, HIDDEN, WIDE, NARROW = 4096, 32, 64, 8


@pytest.mark.slow
def test_200_steps_of_4096_tokens() -> None:
    """In bfloat16, where half-precision sums over many tokens would overflow or vanish first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    sizes = SparseGradConfig(narrow=NARROW, wide=16, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), sizes)
    ids = torch.arange(TOKENS).remainder(61)[None]  # what follows can be learnt
    batch = {"input_ids": ids, "labels": ids}
    calibrate_adapter(model, [batch], n_steps=4, progress=False)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, optimizer, [batch] * 200)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
