"""Settings of `sparsegrad bench`. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsegrad_peft.method.sizes import Sizes, default_form

from ..run.settings import refuse

DEFAULT_METHODS = (
    "floor", "sparsegrad", "sparsegrad-paper", "sparsegrad-complete", "literal", "literal-sparse",
    "lora", "lora-rank-7", "lora-fa", "full", "galore",
)  # fmt: skip


WORKLOADS = (
    "bert-base", "bert-base-padded", "roberta-large", "minilm", "mlp", "llama-mlp", "llama-long", "smollm2",
    "llama-2-7b",
)  # fmt: skip
MLP_SIZES = re.compile(r"mlp-(\d+)x(\d+)")
"""The workload `mlp` at another width."""


@dataclass
class BenchArguments:
    """Measure one training step of each method, in turn, on random data."""

    workload: str = "bert-base"
    """bert-base, bert-base-padded, roberta-large, minilm, mlp (one block), mlp-HIDDENxWIDE, llama-mlp, llama-long,
    smollm2, llama-2-7b"""
    tokens: int = 2048
    "tokens of a step, padding included"
    layers: int | None = None
    "number of blocks; default: the whole model on a GPU, at most 4 blocks on a CPU"
    methods: str | None = None
    """names, separated by commas; all of them are in memory at the same time; default: all but sparsegrad-topk, and
    without complete bases if a layer has a side above 4096"""
    rest: Literal["freeze", "train"] = "freeze"
    "freeze the model besides the MLP layers, or train it with AdamW"
    narrow: int | float | None = None
    "rows of the basis of a layer's smaller side: a count or a fraction"
    wide: int | float | None = None
    "rows of the basis of a layer's larger side, likewise"
    c: int | float | None = None
    "rows of U, the input side of every layer, in place of narrow and wide"
    r: int | float | None = None
    "rows of V, the output side of every layer, in place of narrow and wide"
    repeats: int = 9
    "measured rounds; in each round every method runs one step"
    warmup: int = 2
    "rounds before the measured ones"
    precision: Literal["fp32", "bf16"] = "fp32"
    "precision of the matrix products; bf16: automatic mixed precision"
    threads: int = 2
    "CPU threads of a step"
    seed: int = 0
    "random seed of weights and data"

    @property
    def method_names(self) -> list[str] | None:
        """The methods asked for; None for the default."""
        return None if self.methods is None else [name.strip() for name in self.methods.split(",")]

    @property
    def sizes(self) -> Sizes:
        """Rows of the bases, by the shape of a layer."""
        plain = self.c is not None or self.r is not None
        neurons, _ = default_form(None, None, plain=plain, shared=False)
        return Sizes(self.narrow, self.wide, self.c, self.r, neurons=neurons)

    def problems(self) -> list[str]:
        """Return what is wrong with the workload's name and with the numbers, one message each."""
        least = {"tokens": 1, "repeats": 1, "warmup": 0, "threads": 1, "layers": 1}
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} must be at least {least[name]}, found {value}"
            for name, value in values.items()
            if value is not None and value < least[name]
        ]
        if self.workload not in WORKLOADS and not MLP_SIZES.fullmatch(self.workload):
            problems.append(
                f"workload: expected one of {', '.join(WORKLOADS)}, or mlp-HIDDENxWIDE; found {self.workload!r}"
            )
        names = self.method_names or []
        if len(set(names)) < len(names):
            problems.append(f"methods: expected each method once, found {self.methods}")
        return problems

    def check(self) -> None:
        """Raise RefusedError with all of `problems`."""
        refuse("cannot run this benchmark", self.problems())

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for JSON."""
        return asdict(self)
