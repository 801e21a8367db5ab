"""Activations counted without weights are those that a real step saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
)

from calibration import LiveBytes
from helpers import TINY_SIZES
from sparsegrad_lab.bench.worker import saved_bytes
from sparsegrad_lab.inspection.activations import count_activations
from sparsegrad_lab.inspection.inspect import Inspection, inspect
from sparsegrad_peft import SparseGradConfig
from sparsegrad_peft.tuner.targets import mlp_linears

IDS = torch.zeros(3, 8, dtype=torch.long)
SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "speed"


def measured(config: Any, auto: Any, found: Inspection, inputs: dict[str, Any]) -> dict[str, int]:
    """Bytes that the real model saves, by method."""

    def saved(adapt: Any) -> int:
        model = adapt(auto.from_config(config)).train()
        return saved_bytes(model, lambda: model(**inputs).loss)

    lora = LoraConfig(r=found.lora_rank, target_modules=mlp_linears(auto.from_config(config)))
    return {
        "full": saved(lambda model: model),
        "lora": saved(lambda model: get_peft_model(model, lora)),
        "block": saved(lambda model: get_peft_model(model, SparseGradConfig())),
    }


CASES = {
    "smollm2": (  # its sizes, with fewer blocks and words
        LlamaConfig(
            vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        ),
        AutoModelForCausalLM, {"input_ids": IDS, "labels": IDS}, "CAUSAL_LM",
    ),
    "bert": (
        BertConfig(**TINY_SIZES), AutoModelForSequenceClassification, {"input_ids": IDS, "labels": IDS[:, 0]},
        "SEQ_CLS",
    ),
    "t5": (
        T5Config(vocab_size=100, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0),
        AutoModelForSeq2SeqLM, {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS}, "SEQ_2_SEQ_LM",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*was not calibrated:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_counted_as_saved(name: str) -> None:
    config, auto, inputs, task_type = CASES[name]
    found = inspect(config, task_type=task_type, batch_size=3, length=8)
    counted = {row.key: row.activations_bytes for row in found.methods}
    expected = measured(config, auto, found, inputs)
    assert {key: counted[key] for key in expected} == expected
    assert counted["topk"] == counted["block"]
    assert counted["published"] is None
    full = next(row for row in found.methods if row.key == "full")
    assert full.total_bytes_high == 16 * full.trained + expected["full"]


def test_images_and_a_model_that_is_there() -> None:
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=7
    )
    model = AutoModelForImageClassification.from_config(config)
    found = inspect(model, batch_size=2, length=1)
    pixels = {"pixel_values": torch.zeros(2, 3, 28, 28), "labels": torch.zeros(2, dtype=torch.long)}
    counted = next(row.activations_bytes for row in found.methods if row.key == "full")
    assert counted == saved_bytes(model.train(), lambda: model(**pixels).loss)


def test_blocks_within_blocks() -> None:
    """A stage of Swin is checkpointed, and so are its blocks."""
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    model = AutoModelForImageClassification.from_config(config)
    found = inspect(model, batch_size=2, length=1)
    pixels = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}
    counted = next(row.activations_bytes for row in found.methods if row.key == "full")
    assert counted == saved_bytes(model.train(), lambda: model(**pixels).loss)


EXPERTS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "gpt-oss": GptOssConfig(**SMALL, num_local_experts=4, head_dim=8),
    "qwen2-moe": Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
}


@pytest.mark.filterwarnings("ignore:.*was not calibrated:UserWarning")
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts(name: str) -> None:
    """Fake tensors compute products by expert in bfloat16 only."""
    config = EXPERTS[name]
    found = inspect(config, task_type="CAUSAL_LM", batch_size=3, length=8, dtype=torch.bfloat16)
    counted = {row.key: row.activations_bytes for row in found.methods}
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).train()
    assert counted["full"] == saved_bytes(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert all(counted[key] for key in ("layers", "lora", "block"))


def test_fused_experts_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot be counted .*; use dtype bfloat16, or leave out"):
        inspect(EXPERTS["mixtral"], task_type="CAUSAL_LM", batch_size=3, length=8)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:.*was not calibrated:UserWarning")
@pytest.mark.parametrize("words", [20, 3000])
@pytest.mark.parametrize("method", ["full", "block"])
def test_with_gradient_checkpointing(words: int, method: str) -> None:
    """Of many words, the logits are the most; of few, the tensors of the last block when it runs again."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    found = inspect(config, task_type="CAUSAL_LM", batch_size=3, length=32, gradient_checkpointing=True)
    counted = {row.key: row.activations_bytes for row in found.methods}[method]
    assert "with gradient checkpointing" in " ".join(found.notes)
    model = AutoModelForCausalLM.from_config(config)
    if method == "block":
        model = get_peft_model(model, SparseGradConfig())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    live: list[int] = []
    last = next(module for name, module in model.named_modules() if name.endswith("layers.3.mlp"))

    def note(*_: Any) -> None:
        live.append(counter.live - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    last.register_forward_hook(note)
    ids = torch.zeros(3, 32, dtype=torch.long)
    with LiveBytes() as counter, set_checkpoint_early_stop(False):
        counter.seen |= {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        loss = model(input_ids=ids, labels=ids).loss
        forward = counter.live
        loss.backward()
    assert len(live) == 2  # the block ran again
    output_and_gradient = 2 * 3 * 32 * 64 * 4
    most = max(forward, live[1] - output_and_gradient)
    assert counted == pytest.approx(most, rel=0.05)
    assert (most == forward) == (words == 3000)


def test_checkpointing_needs_blocks_and_a_batch() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing: expected batch_size and length too, found neither"):
        inspect(BertConfig(**TINY_SIZES), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing: Sequential has no blocks that transformers"):
        count_activations(nn.Sequential(), [], SparseGradConfig(), 1, torch.float32, 1, 1, checkpointing=True)


@pytest.mark.parametrize(("batch_size", "length"), [(1, None), (None, 8), (0, 8)])
def test_refused(batch_size: int | None, length: int | None) -> None:
    with pytest.raises(ValueError, match="expected batch_size and length of at least 1, or neither"):
        inspect(BertConfig(**TINY_SIZES), batch_size=batch_size, length=length)


@pytest.mark.filterwarnings("ignore:.*was not calibrated:UserWarning")
def test_the_whole_of_smollm2_as_the_benchmark_measured_it() -> None:
    """Weights, bases, gradients, optimizer and activations of a step of 2,048 tokens: each method within 5 %."""
    measured = json.loads((RESULTS / "smollm2-whole.json").read_text(encoding="utf-8"))["methods"]
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    found = {row.key: row for row in inspect(config, task_type="CAUSAL_LM", batch_size=4, length=512).methods}
    for key, method in {"block": "sparsegrad", "lora": "lora", "layers": "full"}.items():
        row, parts = found[key], measured[method]["bytes"]
        assert row.activations_bytes == parts["kept_for_backward"]
        whole = sum(parts[name] for name in ("weights", "bases", "gradients", "optimizer", "kept_for_backward"))
        assert row.total_bytes_high == pytest.approx(whole, rel=0.05), method
