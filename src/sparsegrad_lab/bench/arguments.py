"""What can be set for a benchmark; light, so that its help is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

DEFAULT_METHODS = (
    "floor", "sparsegrad", "sparsegrad-speed", "sparsegrad-paper", "sparsegrad-complete", "literal", "literal-sparse",
    "lora", "lora-rank-7", "lora-fa", "full", "galore",
)  # fmt: skip


@dataclass
class BenchArguments:
    """One training step of each method, in turn, on random data."""

    workload: str = "bert-base"
    """bert-base, bert-base-padded, roberta-large, minilm, mlp (one block), mlp-HIDDENxWIDE, llama-mlp, llama-long,
    llama-2-7b"""
    tokens: int = 2048
    "tokens of a step, padding included"
    layers: int | None = None
    "blocks; default: the whole model on a GPU, at most 4 blocks on a CPU"
    methods: str | None = None
    "names with commas between, all in memory at once; default: all, without square bases of a side above 4096"
    rest: Literal["freeze", "train"] = "freeze"
    "the model besides the MLP layers: frozen, or trained by AdamW"
    narrow: int | float = 0.33
    "rows of the basis of a layer's smaller side"
    wide: int | float = 0.03
    "of its larger side"
    c: int | float | None = None
    "rows of U, in place of those two"
    r: int | float | None = None
    "rows of V, in place of those two"
    repeats: int = 9
    "measured rounds; in each, every method makes one step"
    warmup: int = 2
    "rounds before that"
    precision: Literal["fp32", "bf16"] = "fp32"
    "of the products (automatic mixed precision)"
    threads: int = 2
    "CPU threads of a step"
    seed: int = 0
    "of weights and data"

    @property
    def method_names(self) -> list[str] | None:
        """Those asked for."""
        return None if self.methods is None else [name.strip() for name in self.methods.split(",")]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
