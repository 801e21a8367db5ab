"""Helpers of the tests of answers and judges: a tiny LLaMA with a chat template, answer files, a free port."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ("bright", "dull", "Decide", "[[9]]", "[[2]]", "[[A]]", "what", "is", "warm", "the", "a", "film", "one", "and")


def save_model(folder: Path, template: str | None = TEMPLATE) -> Any:
    """Save a LLaMA with random weights, and a tokenizer of whole words; returns both."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|end|>"]
    words = {word: number for number, word in enumerate([*special, "system", "user", "assistant", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=1024, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=2,
                    pad_token_id=0, initializer_range=0.3)
    )  # fmt: skip
    model.save_pretrained(folder)
    return model, tokenizer


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def write_answers(path: Path, name: str, text: str, questions: Path) -> Path:
    """An answer file in which each answer is the same."""
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    lines = []
    for row in rows:
        choices = [{"index": 0, "turns": [text] * len(row["turns"])}]
        lines.append(json.dumps({"question_id": row["question_id"], "model_id": name, "choices": choices}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
