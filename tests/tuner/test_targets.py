"""The MLP linears of each family, on a tiny model of it; and those found by structure where nothing is known."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel

from helpers import tiny_batch, tiny_model
from sparsegrad_peft import SparseGradConfig
from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.tuner.experts import SparseGradExperts
from sparsegrad_peft.tuner.layer import SparseGradLayer
from sparsegrad_peft.tuner.targets import TARGETS, find_mlp_linears, mlp_linears

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 16}  # heads wider than the model
BART = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
IMAGE = {**ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 1}

# model type -> (configuration of a tiny model, names of the MLP's layers in one block, number of blocks)
FAMILIES: dict[str, tuple[dict[str, Any], set[str], int]] = {
    "albert": ({**ENCODER, "embedding_size": 8}, {"ffn", "ffn_output"}, 1),  # one block, used several times
    "bart": ({**BART, "vocab_size": 50}, {"fc1", "fc2"}, 4),
    "bert": (ENCODER, {"intermediate.dense", "output.dense"}, 2),
    "deberta": ({**ENCODER, "pooler_hidden_size": 16}, {"intermediate.dense", "output.dense"}, 2),
    "deberta-v2": ({**ENCODER, "pooler_hidden_size": 16}, {"intermediate.dense", "output.dense"}, 2),
    "dinov2": ({**IMAGE, "mlp_ratio": 2}, {"fc1", "fc2"}, 2),
    "distilbert": ({"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}, {"lin1", "lin2"}, 2),
    "electra": ({**ENCODER, "embedding_size": 8}, {"intermediate.dense", "output.dense"}, 2),
    "gemma": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "gemma2": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "gemma3_text": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}, {"c_fc", "c_proj"}, 2),
    "gpt_neox": (ENCODER, {"dense_h_to_4h", "dense_4h_to_h"}, 2),
    "gptj": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "vocab_size": 50}, {"fc_in", "fc_out"}, 2),
    "llama": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "mbart": ({**BART, "vocab_size": 50}, {"fc1", "fc2"}, 4),
    "mistral": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "mpnet": (ENCODER, {"intermediate.dense", "output.dense"}, 2),
    "mt5": ({**T5, "feed_forward_proj": "gated-gelu"}, {"wi_0", "wi_1", "wo"}, 4),
    "opt": ({"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
             "word_embed_proj_dim": 16}, {"fc1", "fc2"}, 2),
    "phi": (ENCODER, {"fc1", "fc2"}, 2),
    "phi3": ({**ENCODER, "pad_token_id": 0}, {"gate_up_proj", "down_proj"}, 2),
    "qwen2": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "qwen3": (DECODER, {"gate_proj", "up_proj", "down_proj"}, 2),
    "roberta": (ENCODER, {"intermediate.dense", "output.dense"}, 2),
    "t5": (T5, {"wi", "wo"}, 4),
    "vit": (IMAGE, {"fc1", "fc2"}, 2),
    "whisper": ({**BART, "vocab_size": 50, "num_mel_bins": 4, "max_source_positions": 8, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, {"fc1", "fc2"}, 4),
    "xlm-roberta": (ENCODER, {"intermediate.dense", "output.dense"}, 2),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # early transformers


def model_of(kind: str) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(kind, **FAMILIES[kind][0]))


def test_dinov2_with_gated_layers() -> None:
    """Its largest models have them, by other names in early transformers."""
    model = AutoModel.from_config(AutoConfig.for_model("dinov2", **IMAGE, use_swiglu_ffn=True))
    assert mlp_linears(model) == find_mlp_linears(model)


def test_every_family_has_a_case() -> None:
    assert FAMILIES.keys() == TARGETS.keys()
    assert len(FAMILIES) == 29


@pytest.mark.parametrize("kind", FAMILIES)
def test_default_targets_are_the_mlp(kind: str) -> None:
    _, endings, blocks = FAMILIES[kind]
    model = get_peft_model(model_of(kind), SparseGradConfig())
    names = [name for name, module in model.named_modules() if isinstance(module, SparseGradLayer)]
    if kind == "vit" and names[0].endswith("intermediate.dense"):  # before transformers 5.10
        endings = {"intermediate.dense", "output.dense"}
    assert len(names) == len(endings) * blocks
    assert all(any(name.endswith(ending) for ending in endings) for name in names)
    assert not any("attention" in name or "attn" in name for name in names)


@pytest.mark.parametrize("kind", FAMILIES)
def test_structure_finds_the_same_layers(kind: str) -> None:
    """What is known by name is what the search by structure finds, so an unknown model is in good hands."""
    model = model_of(kind)
    known = {name for names in group_linears(model, TARGETS[kind]).values() for name in names}
    assert set(find_mlp_linears(model)) == known


def test_attention_output_of_bert_is_no_mlp_layer() -> None:
    """IA3's table of feed-forward layers has `output.dense`, which also ends the name of the attention's output."""
    model = model_of("bert")
    found = {name for names in group_linears(model, TARGETS["bert"]).values() for name in names}
    assert "encoder.layer.0.output.dense" in found
    assert "encoder.layer.0.attention.output.dense" not in found


def test_unknown_architecture(caplog: pytest.LogCaptureFixture) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)
            self.wide = nn.Linear(8, 24)
            self.narrow = nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(torch.relu(self.wide(self.mix(x))))

    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 4))
    with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
        adapted = get_peft_model(model, SparseGradConfig())
    names = [name for name, module in adapted.named_modules() if isinstance(module, SparseGradLayer)]
    assert [name.removeprefix("base_model.model.") for name in names] == [
        "1.0.wide",
        "1.0.narrow",
        "1.1.wide",
        "1.1.narrow",
    ]
    assert "found by structure" in caplog.text
    assert "1.0.narrow" in caplog.text
    with pytest.raises(ValueError, match="none found by structure in this Sequential; please specify `target_mod"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), SparseGradConfig())


def test_chosen_layers_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
        model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    assert "target_modules of the model's family" in caplog.text
    assert "adapts 6 layers with 100.0 % of the MLP weights" in caplog.text
    assert model(**tiny_batch("bert")).loss > 0


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)


class SparseBlock(nn.Module):
    """A mixture whose routed experts are linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))


def test_routed_experts_that_are_linear_layers_are_adapted(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(SparseBlock() for _ in range(2))
    with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
        adapted = get_peft_model(model, SparseGradConfig())
    names = [name for name, module in adapted.named_modules() if isinstance(module, SparseGradLayer)]
    assert len(names) == 2 * 4 * 3
    assert not any("gate" in name and "gate_proj" not in name for name in names)
    assert "adapts 24 layers with 100.0 % of the MLP weights" in caplog.text


MOE = {**DECODER, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


DEEPSEEK = {**DECODER, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}  # fmt: skip
BESIDE_EXPERTS = {
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 24}, 6, 4),
    "deepseek_v3": (DEEPSEEK, 6, 2),  # the first block is dense
}
"Model type -> configuration, number of MLP linears, number of fused experts' parameters."


@pytest.mark.parametrize("kind", BESIDE_EXPERTS)
def test_linears_and_fused_experts_are_adapted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, linears, fused = BESIDE_EXPERTS[kind]
    with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
        model = get_peft_model(AutoModel.from_config(AutoConfig.for_model(kind, **sizes)), SparseGradConfig())
    layers = [module for module in model.modules() if isinstance(module, SparseGradLayer)]
    assert sum(isinstance(layer, SparseGradExperts) for layer in layers) == fused
    assert len(layers) == linears + fused
    assert f"adapts {linears + fused} layers with 100.0 % of the MLP weights" in caplog.text
    assert len(model.peft_config["default"].target_parameters) == fused


@pytest.mark.parametrize("kind", BESIDE_EXPERTS)
def test_a_form_that_rotates_both_sides_leaves_fused_experts_out(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, linears, _ = BESIDE_EXPERTS[kind]
    base = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    model = get_peft_model(base, SparseGradConfig(c=0.5, r=0.5))
    assert sum(isinstance(module, SparseGradLayer) for module in model.modules()) == linears
    if kind == "qwen2_moe":  # one shared expert beside four
        assert "20.0 % of the MLP weights" in caplog.text
    assert "fused expert parameters such as layers." in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("kind", "key"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_a_form_that_adapts_nothing_is_refused_with_what_works(kind: str, key: str) -> None:
    base = AutoModel.from_config(AutoConfig.for_model(kind, **{**MOE, key: 4}))
    with pytest.raises(ValueError, match=r"fused expert parameters, such as layers.*of shape \(4, .*target_modules"):
        get_peft_model(base, SparseGradConfig.paper())
    assert get_peft_model(base, SparseGradConfig(target_modules=["q_proj", "v_proj"]))  # what the message says


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_the_mixers_of_mamba_are_no_mlp(kind: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4}
    sizes |= {"num_heads": 4, "head_dim": 8, "n_groups": 1} if kind == "mamba2" else {}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    assert find_mlp_linears(model) == []
    with pytest.raises(ValueError, match=f"no MLP layers known for model_type '{kind}', and none found by structure"):
        get_peft_model(model, SparseGradConfig())


def test_names_without_a_layer_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(tiny_model("llama"), SparseGradConfig(target_modules=["up_proj", "dwon_proj"]))
    assert "target_modules: no adapted layer matches dwon_proj; the adapted layers are" in caplog.text
    caplog.clear()
    get_peft_model(tiny_model("llama"), SparseGradConfig(target_modules=["up_proj", "down_proj"]))
    assert "matches" not in caplog.text
