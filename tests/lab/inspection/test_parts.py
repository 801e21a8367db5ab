"""Parameters by part: the paper's table, and other families."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    RobertaConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
)

from helpers import TINY_MODELS, TINY_SIZES, parameter_count, tiny_model
from sparsegrad_lab.inspection.inspect import inspect

MILLION = 1e6


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


def test_the_head_of_albert_is_named_predictions() -> None:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    parts = inspect(transformers.AlbertForMaskedLM(config)).parts
    assert (parts.head, parts.other) == (16 * 8 + 8 + 50, 0)  # its decoder is tied to the embeddings


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


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_parts_sum_to_the_whole(kind: str) -> None:
    model = tiny_model(kind)
    inspection = inspect(model.config)
    assert type(model).__name__ != inspection.model_class  # no architecture in the config: the model without a head
    headed = inspect(model)
    assert headed.model_class == type(model).__name__
    assert headed.parts.total == parameter_count(model)
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
    assert parts.total == parameter_count(model)
    assert parts.mlp > parts.attention / 2 > 0
    assert parts.other < 0.1 * parts.total


def test_tied_parameters_count_once_as_embeddings() -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "n_positions": 8}
    tied = inspect(GPT2Config(**sizes), task_type="CAUSAL_LM").parts
    free = inspect(GPT2Config(**sizes, tie_word_embeddings=False), task_type="CAUSAL_LM").parts
    assert (tied.embeddings, tied.head) == ((60 + 8) * 16, 0)
    assert (free.embeddings, free.head) == ((60 + 8) * 16, 60 * 16)
    assert tied.total == parameter_count(GPT2LMHeadModel(GPT2Config(**sizes)))


def test_masked_language_model_and_classifier_heads() -> None:
    config = BertConfig(**TINY_SIZES, vocab_size=100, architectures=["BertForMaskedLM"])
    masked = inspect(config)
    assert masked.model_class == "BertForMaskedLM"
    assert masked.parts.head == 64 * 64 + 64 + 100  # the transformation and the bias of the tied decoder
    classifier = inspect(config, task_type="SEQ_CLS", num_labels=7)
    assert classifier.model_class == "BertForSequenceClassification"
    assert classifier.parts.head == 64 * 64 + 64 + 7 * 64 + 7
    assert config.num_labels == 2  # the caller's config is left alone


def test_position_tokens_of_vit_are_embeddings() -> None:
    model = ViTForImageClassification(ViTConfig(**TINY_SIZES, image_size=8, patch_size=4))
    parts = inspect(model).parts
    assert parts.embeddings == (3 * 4 * 4 * 64 + 64) + 64 + 5 * 64
    assert parts.head == 2 * 64 + 2
