"""What is trained in a benchmark: real architectures with random weights, and batches of random tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """MLP blocks alone; the loss is the inner product with a fixed direction, so that `δ` is dense."""

    def __init__(self, hidden: int, wide: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, wide), nn.GELU(), nn.Linear(wide, hidden)) for _ in range(layers)
        )

    def forward(self, x: Tensor, direction: Tensor) -> Any:
        """(T, hidden) -> an object with the loss, as models of transformers return it."""
        for block in self.blocks:
            x = block(x)
        return Output((x * direction).sum())


class GatedBlock(nn.Module):
    """LLaMA's MLP blocks alone."""

    def __init__(self, hidden: int, wide: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        config = LlamaConfig(hidden_size=hidden, intermediate_size=wide)
        self.blocks = nn.ModuleList(LlamaMLP(config) for _ in range(layers))

    def forward(self, x: Tensor, direction: Tensor) -> Any:
        """As `Block`."""
        for block in self.blocks:
            x = block(x)
        return Output((x * direction).sum())


@dataclass
class Output:
    """What is read of a model's output."""

    loss: Tensor


@dataclass(frozen=True)
class Workload:
    """One kind of training step.

    Attributes:
        name: for `--workload`.
        words: what it is.
        layers: of the whole model.
        sequence: tokens of an example; 0: the tokens are one flat batch.
        hidden: hidden size.
        wide: size between the MLP's layers.
        make: layers -> model.
        padded: lengths are spread evenly from an eighth of the sequence to all of it, and the rest is padding.
        targets: regular expression of the MLP's layers.
    """

    name: str
    words: str
    layers: int
    sequence: int
    hidden: int
    wide: int
    make: Callable[[int], nn.Module]
    targets: str
    padded: bool = False

    def batch(self, tokens: int, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Random tokens (padding included in their number), always the same ones."""
        generator = torch.Generator().manual_seed(seed)
        if not self.sequence:
            x = torch.randn(tokens, self.hidden, generator=generator)
            direction = torch.randn(tokens, self.hidden, generator=generator) / tokens
            return {"x": x.to(device).requires_grad_(), "direction": direction.to(device)}
        sequence = min(self.sequence, tokens)
        rows = max(1, tokens // sequence)
        ids = torch.randint(5, 1000, (rows, sequence), generator=generator)
        if self.name.startswith("llama"):
            return {"input_ids": ids.to(device), "labels": ids.to(device)}
        mask = torch.ones_like(ids)
        if self.padded:
            lengths = torch.linspace(sequence / 8, sequence, rows).round().long()
            mask = (torch.arange(sequence) < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}
        return {name: tensor.to(device) for name, tensor in batch.items()}


def _bert(hidden: int, wide: int, heads: int) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_hidden_layers=layers
        )
        return BertForSequenceClassification(config)

    return make


def _roberta(layers: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=layers,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def _llama(hidden: int, wide: int, heads: int, vocabulary: int) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_key_value_heads=heads,
            num_hidden_layers=layers, vocab_size=vocabulary,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return make


_BERT = r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"
_GATED = r"(.*\.)?(gate_proj|up_proj|down_proj)"
_PLAIN = r"blocks\.\d+\.[02]"

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("bert-base", "BERT-base, sequences of 128", 12, 128, 768, 3072, _bert(768, 3072, 12), _BERT),
        Workload("bert-base-padded", "BERT-base, sequences of 16 to 128 padded to 128", 12, 128, 768, 3072,
                 _bert(768, 3072, 12), _BERT, padded=True),
        Workload("roberta-large", "RoBERTa-large, sequences of 128", 24, 128, 1024, 4096, _roberta, _BERT),
        Workload("minilm", "MiniLM-L6, sequences of 128", 6, 128, 384, 1536, _bert(384, 1536, 12), _BERT),
        Workload("mlp", "one MLP block of BERT-base", 1, 0, 768, 3072, lambda n: Block(768, 3072, n), _PLAIN),
        Workload("llama-mlp", "one MLP block of LLaMA-2-7B", 1, 0, 4096, 11008, lambda n: GatedBlock(4096, 11008, n),
                 r"blocks\.\d+\.(gate_proj|up_proj|down_proj)"),
        Workload("llama-long", "a LLaMA of 1024/2816, one sequence of 2048", 8, 2048, 1024, 2816,
                 _llama(1024, 2816, 16, 8192), _GATED),
        Workload("llama-2-7b", "LLaMA-2-7B, sequences of 512", 32, 512, 4096, 11008, _llama(4096, 11008, 32, 32000),
                 _GATED),
    )
}  # fmt: skip
"""Name -> workload."""


def find_workload(name: str) -> Workload:
    """One of `WORKLOADS`, or "mlp-HIDDENxWIDE": the `mlp` workload at another width.

    Raises:
        ValueError: there is none of that name.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    width = re.fullmatch(r"mlp-(\d+)x(\d+)", name)
    if width is None:
        raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}, or mlp-HIDDENxWIDE; found {name!r}")
    hidden, wide = int(width[1]), int(width[2])
    words = f"one MLP block of {hidden}/{wide}"
    return Workload(name, words, 1, 0, hidden, wide, lambda layers: Block(hidden, wide, layers), _PLAIN)
