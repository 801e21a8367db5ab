"""`inspect`: parameters as in the paper's table, groups as in `group_linears`, bytes as computed by hand."""

from __future__ import annotations

import io
import json
import re
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from torch import nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    RobertaConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
)
from tuner.models import MAKE, batch, make

from sparsegrad_lab.inspection.inspect import Inspection, inspect
from sparsegrad_lab.inspection.tables import render
from sparsegrad_peft import (
    Basis,
    SparseGradAdamW,
    SparseGradConfig,
    calibrate_adapter,
    param_groups,
    replace_linears,
)
from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.tuner.layer import SparseGradLayer
from sparsegrad_peft.tuner.targets import TARGETS

TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
MILLION = 1e6


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def printed(inspection: Inspection, width: int = 80) -> str:
    text = io.StringIO()
    render(inspection, Console(file=text, width=width))
    return text.getvalue()


def method(inspection: Inspection, key: str) -> Any:
    return next(row for row in inspection.methods if row.key == key)


def test_bert_base_is_the_papers() -> None:
    parts = inspect(BertConfig()).parts
    assert parts.total == 109_482_240
    assert parts.mlp == 12 * (2 * 768 * 3072 + 3072 + 768)
    assert parts.embeddings == (30522 + 512 + 2) * 768
    assert parts.attention == 12 * 4 * (768 * 768 + 768)
    assert parts.norms == 25 * 2 * 768
    assert parts.head == 768 * 768 + 768
    assert parts.other == 0
    assert parts.mlp == pytest.approx(57 * MILLION, abs=MILLION)
    assert parts.embeddings == pytest.approx(24 * MILLION, abs=MILLION)
    assert parts.attention == pytest.approx(28 * MILLION, abs=MILLION)
    assert parts.share("mlp") == pytest.approx(0.518, abs=0.001)


def test_roberta_base_is_the_papers() -> None:
    parts = inspect(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)).parts
    assert parts.total == 124_645_632
    assert parts.mlp == pytest.approx(57 * MILLION, abs=MILLION)
    assert parts.embeddings == (50265 + 514 + 1) * 768  # 39.0 million; the paper has 40
    assert parts.attention == pytest.approx(28 * MILLION, abs=MILLION)


def test_llama_2_7b_is_the_papers_and_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inspection = inspect(LlamaConfig(), task_type="CAUSAL_LM", dtype="bfloat16")  # the defaults are LLaMA-2-7B's
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 300 * 1024
    parts = inspection.parts
    assert parts.total == 6_738_415_616
    assert parts.mlp == 32 * 3 * 4096 * 11008
    assert parts.attention == 32 * 4 * 4096**2
    assert parts.embeddings == parts.head == 32000 * 4096
    assert parts.norms == 65 * 4096
    assert parts.other == 0
    assert [(g.name, g.layers, g.out, g.in_) for g in inspection.groups] == [
        ("model.layers.*.mlp.gate_proj", 32, 11008, 4096),
        ("model.layers.*.mlp.up_proj", 32, 11008, 4096),
        ("model.layers.*.mlp.down_proj", 32, 4096, 11008),
    ]


@pytest.mark.parametrize("kind", MAKE)
def test_parts_sum_to_the_whole(kind: str) -> None:
    model = make(kind)
    inspection = inspect(model.config)
    assert type(model).__name__ != inspection.model_class  # no architecture in the config: the model without a head
    headed = inspect(model)
    assert headed.model_class == type(model).__name__
    assert headed.parts.total == parameters(model)
    assert headed.parts.other == 0
    assert min(headed.parts.mlp, headed.parts.attention, headed.parts.norms, headed.parts.embeddings) > 0


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(),
        T5Config(),
        T5Config(tie_word_embeddings=False, architectures=["T5ForConditionalGeneration"]),
        ViTConfig(),
        AlbertConfig(hidden_size=64, intermediate_size=256, num_attention_heads=2, architectures=["AlbertForMaskedLM"]),
        SwinConfig(architectures=["SwinForImageClassification"]),
        WhisperConfig(architectures=["WhisperForConditionalGeneration"]),
    ],
    ids=lambda config: config.model_type,
)
def test_parts_of_other_families(config: Any) -> None:
    with torch.device("meta"):
        named = getattr(transformers, (config.architectures or [""])[0], None)
        model = named(config) if named else transformers.AutoModel.from_config(config)
    parts = inspect(config).parts
    assert parts.total == parameters(model)
    assert parts.mlp > parts.attention / 2 > 0
    assert parts.other < 0.1 * parts.total


def test_tied_parameters_count_once_as_embeddings() -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "n_positions": 8}
    tied = inspect(GPT2Config(**sizes), task_type="CAUSAL_LM").parts
    free = inspect(GPT2Config(**sizes, tie_word_embeddings=False), task_type="CAUSAL_LM").parts
    assert (tied.embeddings, tied.head) == ((60 + 8) * 16, 0)
    assert (free.embeddings, free.head) == ((60 + 8) * 16, 60 * 16)
    assert tied.total == parameters(GPT2LMHeadModel(GPT2Config(**sizes)))


def test_masked_language_model_and_classifier_heads() -> None:
    config = BertConfig(**TINY, vocab_size=100, architectures=["BertForMaskedLM"])
    masked = inspect(config)
    assert masked.model_class == "BertForMaskedLM"
    assert masked.parts.head == 64 * 64 + 64 + 100  # the transformation and the bias of the tied decoder
    classifier = inspect(config, task_type="SEQ_CLS", num_labels=7)
    assert classifier.model_class == "BertForSequenceClassification"
    assert classifier.parts.head == 64 * 64 + 64 + 7 * 64 + 7
    assert config.num_labels == 2  # the caller's config is left alone


def test_position_tokens_of_vit_are_embeddings() -> None:
    model = ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4))
    parts = inspect(model).parts
    assert parts.embeddings == (3 * 4 * 4 * 64 + 64) + 64 + 5 * 64
    assert parts.head == 2 * 64 + 2


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("shared", [True, False])
def test_groups_are_those_of_group_linears(kind: str, shared: bool) -> None:
    model = make(kind)
    groups = group_linears(model, TARGETS[kind])
    pairs = group_linears(model, TARGETS[kind], shared=shared)
    rows = inspect(model, shared=shared, c=0.25, r=0.5, density=0.1).groups
    assert [row.name for row in rows] == list(groups)
    for row, names in zip(rows, groups.values(), strict=True):
        assert row.layers == len(names)
        assert (row.out, row.in_) == linear_shape(model.get_submodule(names[0]), names[0])
        assert row.entries_per_layer == row.r * row.c
        assert row.entries == row.layers * row.r * row.c
    # One pair of bases for each group or each layer, in float32.
    shapes = [linear_shape(model.get_submodule(names[0]), names[0]) for names in pairs.values()]
    assert sum(row.gram_bytes for row in rows) == sum(4 * (out**2 + in_**2) for out, in_ in shapes)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["dense"]}, {"target_modules": "all-linear"}], ids=str)
def test_the_adapter_takes_the_same_layers(options: dict[str, Any]) -> None:
    inspection = inspect(make("bert"), **options, task_type="SEQ_CLS")
    adapted = get_peft_model(make("bert"), SparseGradConfig(task_type="SEQ_CLS", **options))
    names = [n for n, m in adapted.base_model.model.named_modules() if isinstance(m, SparseGradLayer)]
    roles = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    assert {group.name: group.layers for group in inspection.groups} == roles


@pytest.mark.parametrize("shared", [True, False])
def test_trained_entries_are_those_of_a_calibrated_adapter(shared: bool) -> None:
    inspection = inspect(make("bert"), c=0.5, r=0.25, shared=shared)
    adapted = get_peft_model(make("bert"), SparseGradConfig(c=0.5, r=0.25, shared=shared))
    assert inspection.entries == adapted.get_nb_trainable_parameters()[0]  # before calibration too
    calibration = calibrate_adapter(adapted, [batch("bert")], n_steps=2, progress=False)
    cores = [p for n, p in adapted.named_parameters() if "sparsegrad_S" in n]
    assert inspection.entries == sum(core.numel() for core in cores)
    grams = [gram for group in calibration.groups.values() for gram in (group.gram_in, group.gram_out)]
    held = sum(gram.numel() * gram.element_size() for gram in grams)
    assert held == sum(group.gram_bytes for group in inspection.groups)
    assert inspection.calibration_bytes == held + 32 * 16 * 4
    bases = [b for n, b in adapted.named_buffers() if n.endswith((".U", ".V"))]  # one module for all layers of a group
    assert sum(b.numel() * b.element_size() for b in bases) == sum(group.bases_bytes for group in inspection.groups)


def test_bytes_by_hand() -> None:
    """BERT-base with the defaults: 24 cores of 256 x 96, long on the hidden side."""
    inspection = inspect(BertConfig(), density=0.01)
    total, layers, entries = 109_482_240, 24 * 768 * 3072, 24 * 256 * 96
    sketches = 24 * 4 * (768**2 + 3072 * (2 * 96 + 16)) + 4 * 3072 * (2 * 96 + 16)  # and their random vectors, once
    complete = 2 * 4 * (768**2 + 3072**2)
    bases = 24 * 2 * (256 * 768 + 96 * 3072)
    k, k_complete = 24 * 245, 24 * 23592
    rank = 6
    assert [(g.r, g.c, g.k_per_layer) for g in inspection.groups] == [(96, 256, 245), (256, 96, 245)]
    assert (inspection.layers, inspection.entries, inspection.k, inspection.lora_rank) == (24, entries, k, rank)
    assert inspection.calibration_bytes == sketches + 4 * 768 * 3072
    lora = rank * 24 * (768 + 3072)
    assert abs(lora - entries) <= 24 * (768 + 3072) / 2
    expected = {  # trained entries; bytes of weights, bases, gradients, optimizer at first and at most
        "full": (total, 4 * total, 0, 4 * total, 8 * total, 8 * total),
        "layers": (layers, 4 * total, 0, 4 * layers, 8 * layers, 8 * layers),
        "lora": (lora, 4 * (total + lora), 0, 4 * lora, 8 * lora, 8 * lora),
        "block": (entries, 4 * (total + entries), bases, 4 * entries, 8 * entries, 8 * entries),
        "topk": (entries, 4 * (total + entries), bases, 4 * entries, 12 * k, 12 * entries),
        "published": (layers, 4 * total, complete, 20 * k_complete, 12 * k_complete, 12 * layers),
        "published_plain": (layers, 4 * total, complete, 4 * layers, 12 * k_complete, 12 * layers),
    }
    assert [row.key for row in inspection.methods] == list(expected)
    for row in inspection.methods:
        found = (row.trained, row.weights_bytes, row.bases_bytes, row.gradients_bytes, row.optimizer_bytes_low,
                 row.optimizer_bytes_high)  # fmt: skip
        assert found == expected[row.key], row.key
        assert row.total_bytes_high == sum(found[1:4]) + found[5]


def test_frozen_weights_in_half_precision() -> None:
    wide, half = inspect(BertConfig()), inspect(BertConfig(), dtype=torch.bfloat16)
    layers = 24 * 768 * 3072
    assert half.dtype == "bfloat16"
    assert method(half, "full") == method(wide, "full")  # what trains is float32
    assert method(half, "layers").weights_bytes == 2 * (109_482_240 - layers) + 4 * layers
    assert method(half, "block").weights_bytes == 2 * 109_482_240 + 4 * half.entries
    assert method(half, "block").optimizer_bytes_high == method(wide, "block").optimizer_bytes_high
    assert half.calibration_bytes - wide.calibration_bytes == 2 * 768 * 3072  # the gradient, and its float32 copy


def test_optimizer_state_is_what_the_optimizer_keeps() -> None:
    """The lower bound, against one step of `SparseGradAdamW` on a model with `replace_linears`."""
    model = make("bert")
    groups = group_linears(model, TARGETS["bert"])
    inspection = inspect(model, c="full", r="full", density=0.05)
    model.requires_grad_(False)
    replace_linears(model, groups, {name: Basis.identity() for name in groups})
    optimizer = SparseGradAdamW(param_groups(model, density=0.05))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state_bytes() == method(inspection, "topk").optimizer_bytes_low


def test_folder_with_a_config_and_nothing_else(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**TINY, vocab_size=100, num_labels=3)).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    inspection = inspect(str(tmp_path))
    assert inspection.model == str(tmp_path)
    assert inspection.model_class == "BertForSequenceClassification"
    assert inspection.model_type == "bert"
    assert inspection.parts.head == 64 * 64 + 64 + 3 * 64 + 3


def test_model_is_left_alone() -> None:
    model = make("gpt2")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    inspect(model)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_as_dict_is_json_and_complete() -> None:
    for target_modules in (None, ("fc2", "dense")):
        inspection = inspect(BertConfig(**TINY), target_modules=target_modules, c="full", r=8)
        found = json.loads(json.dumps(inspection.as_dict()))
        assert found["parts"]["total"] == inspection.parts.total
        assert sum(found["parts"]["shares"].values()) == pytest.approx(1)
        assert found["groups"][0]["in"] == 64
        assert found["methods"][-1]["total_bytes_high"] == inspection.methods[-1].total_bytes_high
        assert found["entries"] == inspection.entries
        assert any("Activations are not counted" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("config", "options"),
    [(BertConfig(), {}), (LlamaConfig(), {"dtype": "bfloat16"}), (T5Config(), {"shared": False}),
     (LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80), {"c": "full", "r": "full"})],
    ids=["bert", "llama", "t5", "llama-70b"],
)  # fmt: skip
def test_printed_at_80_columns(config: Any, options: dict[str, Any]) -> None:
    inspection = inspect(config, **options)
    text = printed(inspection)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off
    for part in ("embeddings", "attention", "MLP", "norms", "head", "other"):
        assert part in text
    for number in (inspection.parts.total, inspection.parts.mlp, inspection.entries, inspection.layers):
        assert f"{number:,}" in text
    assert "Activations are not counted" in text
    assert inspection.groups[-1].name in text


def test_printed_numbers_have_units() -> None:
    text = printed(inspect(BertConfig()))
    assert "Calibration needs 130.0 MB more at its peak" in text
    assert "in MB (1e6 bytes)" in text
    assert "LoRA rank 6, AdamW" in text
    assert "0.071-7.08" in text  # 12 bytes for each of 5,880 to 589,824 entries
    assert "[odd]" in printed(inspect(BertConfig(**TINY, name_or_path="[odd]")))


def test_model_without_config() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)

    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([Block(), Block()]))
    inspection = inspect(model, r=1.0, c=1.0)
    assert inspection.model_type == ""
    assert inspection.parts.mlp == parameters(model[1])
    assert inspection.parts.other == parameters(model[0])
    assert inspection.entries == 4 * 8 * 24
    with pytest.raises(ValueError, match="none found by structure in this Sequential; please specify `target_modules`"):
        inspect(nn.Sequential(nn.Linear(4, 4)))
    chosen = inspect(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    assert (chosen.layers, chosen.parts.mlp) == (1, 20)
    with pytest.raises(ValueError, match=r"fused expert parameters, such as model\.layers\.0\.mlp\.experts"):
        inspect(MixtralConfig(**TINY), task_type="CAUSAL_LM")
    mixtral = inspect(
        MixtralConfig(**TINY), task_type="CAUSAL_LM", target_modules=["lm_head"]
    )  # experts are no linears
    assert mixtral.layers == 1
    assert mixtral.parts.head == 32000 * 64
    assert mixtral.parts.mlp == 2 * 8 * (3 * 64 * 256 + 64)  # experts and router


def test_adapted_share_of_the_mlp() -> None:
    """A dense MLP whole, one of its two layers, attention only, and a mixture of experts whose experts are fused."""
    bert = BertConfig(**TINY)
    assert inspect(bert).adapted_mlp_share == 1
    assert inspect(bert, target_modules=["output.dense"]).adapted_mlp_share == 0.5  # attention.output.dense is no MLP
    assert inspect(bert, target_modules=["query"]).adapted_mlp_share == 0
    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 128}
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**TINY, **sizes, num_key_value_heads=2, vocab_size=100))
    shared, experts, router, gate = 2 * 3 * 64 * 128, 2 * 4 * 3 * 64 * 32, 2 * 4 * 64, 2 * 64
    inspection = inspect(model)
    assert inspection.layers == 2 * 3
    assert inspection.parts.mlp == shared + experts + router + gate
    assert inspection.adapted_mlp_share == shared / (shared + experts)
    share = f"{100 * inspection.adapted_mlp_share:.3g}"
    assert f"These layers hold {share} % of the MLP's weights." in printed(inspection)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(**TINY)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        inspect(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        inspect(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not know the model type in config\.json"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"does not know the model type in config\.json .* `no-such-type`"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        inspect(str(tmp_path))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"^nobody/nothing: no such folder here, .* \(We couldn't connect"):
        inspect("nobody/nothing")

    with pytest.raises(ValueError, match="matches no linear layer; the model has: encoder"):
        inspect(config, target_modules=["nothing"])
    with pytest.raises(ValueError, match="transformers has no AutoModelForSeq2SeqLM of type 'llama'"):
        inspect(LlamaConfig(**TINY), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match=r"task_type must be one of SEQ_CLS, .* found 'poetry'"):
        inspect(config, task_type="poetry")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, found int8"):
        inspect(config, dtype="int8")
    with pytest.raises(ValueError, match=r"c, group encoder.*expected"):
        inspect(config, c=1000)
    with pytest.raises(ValueError, match=r"r = energy:0\.9: this size depends on the gradients"):
        inspect(config, r="energy:0.9")
    with pytest.raises(ValueError, match="density must be above 0"):
        inspect(config, density=0.0)
