"""Real pretrained models that are only a few hundred kilobytes, as `transformers` folders; from the data folder."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    'big, red ball. She wanted to play with it. Her mom said, "Let\'s go to the park and play!"'
)


def data_folder(name: str) -> Path:
    """A folder below SPARSEGRAD_DATA; skips the test where it is not there."""
    root = os.environ.get("SPARSEGRAD_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"SPARSEGRAD_DATA names no folder with {name}")
    return Path(root) / name


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 260,032 parameters that tells children's stories (llama2.c's stories260K)."""
    source = data_folder("weights/stories260K")
    folder = tmp_path_factory.mktemp("stories")
    llama_of(source / "stories260K.bin").save_pretrained(folder)
    tokenizer_of(source / "tok512.bin").save_pretrained(folder)
    return folder


def llama_of(file: Path) -> Any:
    """llama2.c's fp32 export (the one without a version) -> LlamaForCausalLM.

    Its rotary embedding turns neighbours (0, 1), (2, 3), ... of a head together, that of `transformers` the halves
    (0, n/2), (1, n/2 + 1), ...: the rows of the queries' and keys' weights are put in that order.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    content = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, words, length = struct.unpack("7i", content[:28])
    numbers = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy())
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return numbers[at - count : at].view(shape)

    def halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
        size = dim // heads
        return weight.view(layers, n_heads, size // 2, 2, dim).transpose(2, 3).reshape(layers, n_heads * size, dim)

    kv = dim // heads * kv_heads
    embeddings, attention_norm = take(abs(words), dim), take(layers, dim)
    q, k, v = halves(take(layers, dim, dim), heads), halves(take(layers, kv, dim), kv_heads), take(layers, kv, dim)
    o, mlp_norm = take(layers, dim, dim), take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    state = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings, "model.norm.weight": take(dim)}
    for name, stack in {
        "input_layernorm": attention_norm, "post_attention_layernorm": mlp_norm, "self_attn.q_proj": q,
        "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": o, "mlp.gate_proj": gate, "mlp.up_proj": up,
        "mlp.down_proj": down,
    }.items():  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": stack[i] for i in range(layers)}
    config = LlamaConfig(
        vocab_size=abs(words), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=words > 0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def tokenizer_of(file: Path) -> Any:
    """llama2.c's tokenizer file (scores and pieces) -> a fast tokenizer: merges in the order of the scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    content, at = file.read_bytes(), 4
    pieces: list[str] = []
    while at < len(content):
        _, size = struct.unpack_from("fi", content, at)
        pieces.append(content[at + 8 : at + 8 + size].decode())
        at += 8 + size
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces = [piece if i < 3 else piece.replace(" ", "▁") for i, piece in enumerate(pieces)]
    number = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in number and piece[cut:] in number
    ]
    backend = Tokenizer(models.BPE(number, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
