"""Parameters of a model by part."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, fields

from torch import nn

from sparsegrad_peft.tuner.targets import _ATTENTION

from .built import mlp_linears

_EMBEDDING_NAME = re.compile(r"embed|position|(cls|mask|class|distillation)_token", re.IGNORECASE)
# A head lies beside the blocks, not in one of them.
_HEAD_NAME = re.compile(
    r"(^|\.)(classifier|score|cls|pooler|head|proj_out|embed_out|qa_outputs|vocab_\w+|logits_proj|sequence_summary|"
    r"\w+_(head|classifier|predictions))\."
)
# Where the MLP is not made of linear layers, as with fused experts.
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_?forward|(block_sparse_)?moe|experts)\.", re.IGNORECASE)
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class ModelParts:
    """Parameters of a model by part; each parameter is in exactly one, a tied one is counted once.

    Attributes:
        embeddings: of tokens, positions and patches. A head tied to them is counted here.
        attention: projections, and whatever else lies in an attention module.
        mlp: the MLP's layers with their biases.
        norms: every normalization, by the name of its class.
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
        """All parameters of the model."""
        return sum(getattr(self, field.name) for field in fields(self))

    def share(self, part: str) -> float:
        """Share of a part in the whole, 0 to 1."""
        return float(getattr(self, part) / self.total)


def parts_of(model: nn.Module, chosen: set[str]) -> ModelParts:
    """Every parameter to its part; what is chosen as a target is the MLP where no better is known."""
    mlp = mlp_linears(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[nn.Parameter, list[str]] = defaultdict(list)  # a tied parameter has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[parameter].append(name)
    counts: dict[str, int] = defaultdict(int)
    for parameter, names in places.items():
        found = []
        for name in names:
            owner = name.rpartition(".")[0]
            part = "mlp" if owner in mlp else _part_of(name, modules[owner], output)
            found.append("mlp" if part == "other" and owner in chosen and not mlp else part)
        counts["embeddings" if "embeddings" in found else found[0]] += parameter.numel()
    return ModelParts(**counts)


def _part_of(name: str, owner: nn.Module, output: nn.Module | None) -> str:
    """The part of a parameter outside the known MLP layers, from its full name and the module that holds it."""
    if "Norm" in type(owner).__name__:
        return "norms"
    if isinstance(owner, nn.Embedding) or _EMBEDDING_NAME.search(name.rpartition(".")[2]):
        return "embeddings"
    head = _HEAD_NAME.search(name)
    if owner is output or (head and not _IN_BLOCK.search(name[: head.start() + 1])):
        return "head"
    if _ATTENTION.search(name):
        return "attention"
    if _EMBEDDING_NAME.search(name):
        return "embeddings"
    return "mlp" if _MLP_NAME.search(name) else "other"
