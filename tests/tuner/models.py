"""Tiny randomly initialised models of five kinds, a batch for each, and how their output is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                   max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=16)
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
                   attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
                 decoder_start_token_id=0)
    )  # fmt: skip


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8,
                  patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


MAKE: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5, "vit": vit}
LAYERS = {"bert": 6, "llama": 9, "gpt2": 6, "t5": 8, "vit": 6}
"Number of MLP linears."
GROUPS = {"bert": 2, "llama": 3, "gpt2": 2, "t5": 4, "vit": 2}
"T5 has encoder and decoder apart."


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MAKE[kind]().eval()


def batch(kind: str, n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=generator), "labels": torch.arange(n) % 3}
    ids = torch.randint(3, 60, (n, 10), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(n) % 2 if kind == "bert" else ids}


def logits(model: nn.Module, data: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**data, **options).logits
