"""Convert small pretrained models into `transformers` folders: the LLaMA and the ViT of the study.

    python benchmarks/small_models.py --output models    # from the weights in $SPARSEGRAD_DATA/weights

stories260k       a LLaMA of 260,032 parameters for children's stories (llama2.c), trained on 512 tokens
stories260k-2048  the same weights with YaRN's rotary embedding, for 2,048 tokens
mnist-vit         a ViT for images of 28 x 28, trained on MNIST, without its head
"""

from __future__ import annotations

import argparse
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_llama(source: Path, folder: Path, length: int | None = None) -> None:
    """Convert model and tokenizer from llama2.c's files; `length` extends the context beyond the trained one."""
    model, tokenizer = llama_of(source / "stories260K.bin"), tokenizer_of(source / "tok512.bin")
    if length is not None:
        trained_on = model.config.max_position_embeddings
        model.config.rope_parameters |= {
            "rope_type": "yarn", "factor": length / trained_on, "original_max_position_embeddings": trained_on,
        }  # fmt: skip
        model.config.max_position_embeddings = tokenizer.model_max_length = length
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vit(source: Path, folder: Path) -> None:
    """Convert the ViT without its head; each task adds a new one."""
    vit_of(source / "vit_mnist.pth").save_pretrained(folder)


def llama_of(file: Path) -> Any:
    """Convert llama2.c's fp32 export (the format without a version) to a LlamaForCausalLM.

    llama2.c's rotary embedding rotates neighbours (0, 1), (2, 3), ... of a head; that of `transformers` rotates the
    pairs (0, n/2), (1, n/2 + 1), ... So the rows of the query and key weights are reordered.
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
    """Convert llama2.c's tokenizer file (scores and pieces) to a fast tokenizer, with merges in the order of scores."""
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


def vit_of(file: Path, own_head: bool = False) -> Any:
    """Convert a ViT with fused query, key and value weights to a ViTForImageClassification.

    Its attention divides by the square root of the model's width, that of `transformers` by that of a head's width; the
    query weights are scaled to compensate. The original has no norm after the last block, and a head of two layers.
    `own_head` adds both; such a model cannot be saved as a folder.
    """
    from torch import nn
    from transformers import ViTConfig, ViTForImageClassification

    original = torch.load(file, weights_only=True)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=8, intermediate_size=128, image_size=28, patch_size=7,
        num_channels=1, num_labels=10, qkv_bias=False, layer_norm_eps=1e-5, hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = ViTForImageClassification(config)
    state = {
        "embeddings.cls_token": original["cls_token"],
        "embeddings.position_embeddings": original["pos_embedding"],
        "embeddings.patch_embeddings.projection.weight": original["patch_to_embedding.weight"].view(64, 1, 7, 7),
        "embeddings.patch_embeddings.projection.bias": original["patch_to_embedding.bias"],
    }
    for number in range(6):
        here, there = f"layers.{number}", f"transformer.layers.{number}"
        attention, mlp = f"{there}.0.fn", f"{there}.1.fn"
        q, k, v = original[f"{attention}.fn.to_qkv.weight"].chunk(3)
        state |= {f"{here}.attention.q_proj.weight": q * (8 / 64) ** 0.5}
        state |= {f"{here}.attention.k_proj.weight": k, f"{here}.attention.v_proj.weight": v}
        for part in ("weight", "bias"):
            state |= {
                f"{here}.attention.o_proj.{part}": original[f"{attention}.fn.to_out.{part}"],
                f"{here}.layernorm_before.{part}": original[f"{attention}.norm.{part}"],
                f"{here}.layernorm_after.{part}": original[f"{mlp}.norm.{part}"],
                f"{here}.mlp.fc1.{part}": original[f"{mlp}.fn.net.0.{part}"],
                f"{here}.mlp.fc2.{part}": original[f"{mlp}.fn.net.2.{part}"],
            }
    missing, unexpected = model.vit.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["layernorm.bias", "layernorm.weight"], [])
    if own_head:
        model.vit.layernorm = nn.Identity()
        model.classifier = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
        model.classifier.load_state_dict(
            {name.removeprefix("mlp_head."): value for name, value in original.items() if name.startswith("mlp_head.")}
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("SPARSEGRAD_DATA"), help="data folder; default: $SPARSEGRAD_DATA"
    )
    parser.add_argument("--output", type=Path, default=Path("models"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("expected the data folder in --data or SPARSEGRAD_DATA, found neither")
    stories = options.data / "weights" / "stories260K"
    write_llama(stories, options.output / "stories260k")
    write_llama(stories, options.output / "stories260k-2048", length=2048)
    write_vit(options.data / "weights" / "vit_mnist_gaurav", options.output / "mnist-vit")
    print(f"written: stories260k, stories260k-2048 and mnist-vit in {options.output}")


if __name__ == "__main__":
    main()
