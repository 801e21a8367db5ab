"""Count a model's parameters by part."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, fields

from torch import nn

from sparsegrad_peft.tuner.targets import ATTENTION_NAME, mlp_linears

_EMBEDDING_NAME = re.compile(r"embed|position|(cls|mask|class|distillation)_token", re.IGNORECASE)
_HEAD_NAME = re.compile(
    r"(^|\.)(classifier|score|cls|pooler|head|proj_out|embed_out|qa_outputs|vocab_\w+|logits_proj|predictions|"
    r"sequence_summary|\w+_(head|classifier|predictions))\."
)
"""Counts only outside the numbered blocks, where the head is."""
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_?forward|(block_sparse_)?moe|experts)\.", re.IGNORECASE)
"""For MLPs that are not made of linear layers, such as fused experts."""
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class ModelParts:
    """Number of parameters by part. Each parameter is in one part; a tied one is counted once.

    Attributes:
        embeddings: of tokens, positions and patches, and a head tied to them.
        attention: everything in an attention module.
        mlp: the MLP's layers with their biases, experts and routers.
        norms: normalization layers, by the name of their class.
        head: language model head, classifier, pooler.
        other: the rest.
    """

    embeddings: int = 0
    attention: int = 0
    mlp: int = 0
    norms: int = 0
    head: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, field.name) for field in fields(self))

    def share(self, part: str) -> float:
        """Return a part's share of all parameters, 0 to 1."""
        return float(getattr(self, part) / self.total)


def count_parts(model: nn.Module, adapted: set[str]) -> ModelParts:
    """Count parameters by part. In a model without a known MLP, the `adapted` layers are the MLP."""
    try:
        mlp = set(mlp_linears(model))
    except ValueError:  # none is known
        mlp = set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules(remove_duplicate=False))
    names_of: dict[nn.Parameter, list[str]] = defaultdict(list)  # a tied parameter has several names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[parameter].append(name)
    counts: dict[str, int] = defaultdict(int)
    for parameter, names in names_of.items():
        parts = []
        for name in names:
            owner = name.rpartition(".")[0]
            part = "mlp" if owner in mlp else _part_of(name, modules[owner], output)
            parts.append("mlp" if part == "other" and owner in adapted and not mlp else part)
        counts["embeddings" if "embeddings" in parts else parts[0]] += parameter.numel()
    return ModelParts(**counts)


def _part_of(name: str, owner: nn.Module, output: nn.Module | None) -> str:
    """Return the part of a parameter outside the known MLP layers, by its full name and the module that holds it."""
    if "Norm" in type(owner).__name__:
        return "norms"
    if isinstance(owner, nn.Embedding) or _EMBEDDING_NAME.search(name.rpartition(".")[2]):
        return "embeddings"
    head = _HEAD_NAME.search(name)
    if owner is output or (head and not _IN_BLOCK.search(name[: head.start() + 1])):
        return "head"
    if ATTENTION_NAME.search(name):
        return "attention"
    if _EMBEDDING_NAME.search(name):
        return "embeddings"
    return "mlp" if _MLP_NAME.search(name) else "other"
