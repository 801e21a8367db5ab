"""What a benchmark trains: real architectures with random weights, on batches of random tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .settings import MLP_SIZES


class Blocks(nn.Module):
    """MLP blocks without the rest of the model. The loss is the inner product with a given direction."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, direction: Tensor) -> Output:
        """(T, hidden), (T, hidden) -> an output with a loss, as models of transformers return it."""
        for block in self.blocks:
            x = block(x)
        return Output((x * direction).sum())


@dataclass
class Output:
    """A model's output."""

    loss: Tensor


def _mlp(hidden: int, wide: int) -> Callable[[int], nn.Module]:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(hidden, wide), nn.GELU(), nn.Linear(wide, hidden))

    return lambda layers: Blocks([block() for _ in range(layers)])


def _gated_mlp(hidden: int, wide: int) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        config = LlamaConfig(hidden_size=hidden, intermediate_size=wide)
        return Blocks([LlamaMLP(config) for _ in range(layers)])

    return build


def transformer(model_type: str, auto: str, hidden: int, wide: int, heads: int, **config: Any
                 ) -> Callable[[int], nn.Module]:  # fmt: skip
    """Return a function: number of blocks -> model with random weights and the head of `auto`."""

    def build(layers: int) -> nn.Module:
        import transformers

        settings = transformers.AutoConfig.for_model(
            model_type, hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads,
            num_hidden_layers=layers, **config,
        )  # fmt: skip
        model: nn.Module = getattr(transformers, auto).from_config(settings)
        return model

    return build


@dataclass(frozen=True)
class Workload:
    """One kind of training step.

    Attributes:
        name: for `--workload`.
        summary: description for the result.
        layers: blocks of the whole model.
        sequence: tokens of an example; 0: the tokens are one flat batch of vectors.
        hidden: hidden size.
        wide: size between the MLP's layers.
        build: number of blocks -> model.
        targets: regular expression for the names of the MLP layers.
        padded: lengths are spread evenly from an eighth of the sequence to all of it; the rest is padding.
    """

    name: str
    summary: str
    layers: int
    sequence: int
    hidden: int
    wide: int
    build: Callable[[int], nn.Module]
    targets: str
    padded: bool = False

    def batch(self, tokens: int, seed: int, device: torch.device) -> dict[str, Tensor]:
        """Return a random batch with this number of tokens, padding included. The same seed gives the same batch."""
        generator = torch.Generator().manual_seed(seed)
        if not self.sequence:
            x = torch.randn(tokens, self.hidden, generator=generator)
            direction = torch.randn(tokens, self.hidden, generator=generator) / tokens
            return {"x": x.to(device).requires_grad_(), "direction": direction.to(device)}
        sequence = min(self.sequence, tokens)
        rows = max(1, tokens // sequence)
        ids = torch.randint(5, 1000, (rows, sequence), generator=generator)
        if self.targets == _GATED:
            return {"input_ids": ids.to(device), "labels": ids.to(device)}
        mask = torch.ones_like(ids)
        if self.padded:
            lengths = torch.linspace(sequence / 8, sequence, rows).round().long()
            mask = (torch.arange(sequence) < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}
        return {name: tensor.to(device) for name, tensor in batch.items()}


_CLASSIFIER, _DECODER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
_BERT = r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"
_GATED = r"(.*\.)?(gate_proj|up_proj|down_proj)"
_MLP = r"blocks\.\d+\.[02]"

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("bert-base", "BERT-base, sequences of 128", 12, 128, 768, 3072,
                 transformer("bert", _CLASSIFIER, 768, 3072, 12), _BERT),
        Workload("bert-base-padded", "BERT-base, sequences of 16 to 128 padded to 128", 12, 128, 768, 3072,
                 transformer("bert", _CLASSIFIER, 768, 3072, 12), _BERT, padded=True),
        Workload("roberta-large", "RoBERTa-large, sequences of 128", 24, 128, 1024, 4096,
                 transformer("roberta", _CLASSIFIER, 1024, 4096, 16, vocab_size=50265, max_position_embeddings=514,
                              type_vocab_size=1), _BERT),
        Workload("minilm", "MiniLM-L6, sequences of 128", 6, 128, 384, 1536,
                 transformer("bert", _CLASSIFIER, 384, 1536, 12), _BERT),
        Workload("mlp", "one MLP block of BERT-base", 1, 0, 768, 3072, _mlp(768, 3072), _MLP),
        Workload("llama-mlp", "one MLP block of LLaMA-2-7B", 1, 0, 4096, 11008, _gated_mlp(4096, 11008), _GATED),
        Workload("llama-long", "a LLaMA of 1024/2816, one sequence of 2048", 8, 2048, 1024, 2816,
                 transformer("llama", _DECODER, 1024, 2816, 16, num_key_value_heads=16, vocab_size=8192), _GATED),
        Workload("smollm2", "SmolLM2-135M, sequences of 512", 30, 512, 576, 1536,
                 transformer("llama", _DECODER, 576, 1536, 9, num_key_value_heads=3, vocab_size=49152,
                              tie_word_embeddings=True), _GATED),
        Workload("llama-2-7b", "LLaMA-2-7B, sequences of 512", 32, 512, 4096, 11008,
                 transformer("llama", _DECODER, 4096, 11008, 32, num_key_value_heads=32, vocab_size=32000), _GATED),
    )
}  # fmt: skip
"""Name -> workload. The names are those of `settings.WORKLOADS`."""


def find_workload(name: str) -> Workload:
    """Return the workload with this name; "mlp-HIDDENxWIDE" is `mlp` at another width."""
    width = MLP_SIZES.fullmatch(name)
    if width is None:
        return WORKLOADS[name]
    hidden, wide = int(width[1]), int(width[2])
    return Workload(name, f"one MLP block of {hidden}/{wide}", 1, 0, hidden, wide, _mlp(hidden, wide), _MLP)
