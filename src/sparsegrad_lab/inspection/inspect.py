"""Inspect a model: parameters by part, layers to adapt, memory of each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sparsegrad_peft.method.experts import group_experts
from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.method.sizes import DEFAULT_SHARE, Rows, Sizes
from sparsegrad_peft.tuner.config import SparseGradConfig
from sparsegrad_peft.tuner.targets import mlp_share

from ..methods.lora import matching_rank
from .activations import count_activations
from .groups import GroupRow, calibration_bytes, group_rows
from .memory import MethodBytes, method_bytes
from .model import build_model, model_type_of, resolve_targets
from .parts import ModelParts, count_parts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`.

    Attributes:
        model: the given name or folder, else the name in the config or the class of the model.
        model_class: class of the model, which decides the head.
        model_type: `config.model_type`, "" without a config.
        dtype: of frozen weights.
        sizes, shared, density: as given, or the defaults.
        target_modules: names of the layers to adapt, their endings, or a regular expression.
        parts: parameters by part.
        adapted_mlp_share: share of the MLP's weights that the adapted layers hold, 0 to 1.
        groups: layers to adapt.
        calibration_bytes: extra memory of calibration at its peak, for sums and one gradient.
        calibration_copy_bytes: on the CPU, the copy of the layers' weights that calibration restores at its end; none
            without a trajectory.
        lora_rank: rank at which LoRA trains about as many entries on the same layers.
        methods: memory of each method.
        notes: what the numbers include and leave out.
    """

    model: str
    model_class: str
    model_type: str
    dtype: str
    sizes: Sizes
    shared: bool
    density: float
    target_modules: list[str] | str
    parts: ModelParts
    adapted_mlp_share: float
    groups: list[GroupRow]
    calibration_bytes: int
    calibration_copy_bytes: int
    lora_rank: int
    methods: list[MethodBytes]
    notes: list[str]

    @property
    def layers(self) -> int:
        """Number of layers to adapt."""
        return sum(group.layers for group in self.groups)

    @property
    def entries(self) -> int:
        """Trained entries of all layers, the sum of r · c."""
        return sum(group.entries for group in self.groups)

    @property
    def k(self) -> int:
        """Entries of all layers that a step updates, at the given density."""
        return sum(group.layers * group.k_per_layer for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, with sums and shares."""
        result = asdict(self)
        parts = [field.name for field in fields(self.parts)]
        result["parts"] |= {"total": self.parts.total, "shares": {part: self.parts.share(part) for part in parts}}
        for row, method in zip(result["methods"], self.methods, strict=True):
            row["total_bytes_high"] = method.total_bytes_high
        for row in result["groups"]:
            row["in"] = row.pop("in_")
        return {**result, "layers": self.layers, "entries": self.entries, "k": self.k}


def inspect(
    model: str | nn.Module | PretrainedConfig,
    *,
    narrow: Rows | None = None,
    wide: Rows | None = None,
    trained_share: float = DEFAULT_SHARE,
    neurons: bool | None = None,
    c: Rows | None = None,
    r: Rows | None = None,
    shared: bool | None = None,
    density: float = 0.01,
    target_modules: Iterable[str] | str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    dtype: str | torch.dtype = "float32",
    batch_size: int | None = None,
    length: int | None = None,
    gradient_checkpointing: bool = False,
) -> Inspection:
    """Count parameters by part, find the layers that SparseGrad adapts, and compute the memory of each method.

    Args:
        model: a folder with a config.json, a name on the Hugging Face Hub (only its config.json is fetched), a config,
            or a model on any device, which is not changed.
        narrow: as in `SparseGradConfig`: a count, a fraction or "full".
        wide: likewise.
        trained_share: share of a layer's entries that train, where `wide` is None.
        neurons: as in `SparseGradConfig`.
        c: rows of `U`, the input side of every layer; with `r`, in place of narrow and wide.
        r: rows of `V`, the output side of every layer, likewise.
        shared: one pair of bases for a group of layers, or one for each layer. None: the default.
        density: share of the entries that a step updates, above 0 and at most 1.
        target_modules: layers to adapt, as in PEFT. None: the model's MLP layers.
        task_type: PEFT's task type ("SEQ_CLS", "CAUSAL_LM", ...), which decides the head. None: the class that the
            config names, else the model without a head.
        num_labels: classes of the head. None: as in the config.
        dtype: of frozen weights: float32, bfloat16 or float16.
        batch_size: rows of a training step. With `length`, activations are counted as well.
        length: tokens of a row.
        gradient_checkpointing: count the activations with gradient checkpointing.

    Raises:
        FileNotFoundError: there is no such folder or model, or the folder has no config.json.
        ValueError: unknown model type; no layers to adapt; a number out of range or dependent on gradients
            ("energy:SHARE"); the activations cannot be counted (see `count_activations`).
    """
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype_name}")
    step = _step(batch_size, length, gradient_checkpointing)
    config = SparseGradConfig(
        narrow=narrow, wide=wide, trained_share=trained_share, neurons=neurons, c=c, r=r, shared=bool(shared)
    )
    built = build_model(model, task_type, num_labels)
    targets, experts = resolve_targets(built, target_modules, task_type, experts=bool(config.neurons))
    name = model if isinstance(model, str) else getattr(getattr(built, "config", None), "name_or_path", None)
    groups = group_linears(built, targets) if targets else {}  # by role, also for bases of each layer: a short table
    groups |= group_experts(built, experts)
    return _inspect(built, name or type(built).__name__, targets, groups, config, density, dtype_name, step,
                    gradient_checkpointing)  # fmt: skip


def _step(batch_size: int | None, length: int | None, gradient_checkpointing: bool) -> list[int]:
    """Return [batch_size, length], or nothing if neither is given."""
    step = [size for size in (batch_size, length) if size is not None]
    if len(step) == 1 or min(step, default=1) < 1:
        raise ValueError(f"expected batch_size and length of at least 1, or neither; found {batch_size} and {length}")
    if gradient_checkpointing and not step:
        raise ValueError("gradient_checkpointing: expected batch_size and length too, found neither")
    return step


def _inspect(
    model: nn.Module, name: str, targets: list[str] | str, groups: dict[str, list[str]], config: SparseGradConfig,
    density: float, dtype: str, step: Sequence[int], checkpointing: bool,
) -> Inspection:  # fmt: skip
    layers = [layer for names in groups.values() for layer in names]
    rows = group_rows(model, groups, config, density)
    parts = count_parts(model, set(layers))
    weight_bytes, rank = _DTYPES[dtype].itemsize, matching_rank(model, layers, config.sizes)
    methods = method_bytes(parts.total, rows, rank, density, weight_bytes)
    if step:
        saved = count_activations(
            _on_meta(model), layers, config, rank, _DTYPES[dtype], *step, checkpointing=checkpointing
        )
        methods = [replace(method, activations_bytes=saved.get(method.key)) for method in methods]
    return Inspection(
        model=name,
        model_class=type(model).__name__,
        model_type=model_type_of(model),
        dtype=dtype,
        sizes=config.sizes,
        shared=config.shared,
        density=density,
        target_modules=targets,
        parts=parts,
        adapted_mlp_share=mlp_share(model, layers),
        groups=rows,
        calibration_bytes=calibration_bytes(rows, weight_bytes),
        calibration_copy_bytes=sum(row.layers * row.out * row.in_ for row in rows) * weight_bytes,
        lora_rank=rank,
        methods=methods,
        notes=_notes(dtype, step, checkpointing, experts=any(row.experts > 1 for row in rows)),
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """Return the model on the meta device: itself, or one of the same class and config."""
    if next(model.parameters()).is_meta:
        return model
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"batch_size and length: expected a model of transformers, found {type(model).__name__}")
    with torch.device("meta"):
        return type(model)(config)


def _notes(dtype: str, step: Sequence[int], checkpointing: bool, *, experts: bool) -> list[str]:
    fused = (
        "Fused experts: the experts in one parameter count as one layer, whose larger side holds the neurons of all. "
        "The paper's own form does not exist for them."
    )
    activations = "Activations are not counted. They depend on the batch and the length; give batch_size and length."
    if step:
        activations = (
            f"Activations: what autograd saves for backward with {step[0]} rows of {step[1]} tokens, in {dtype}, "
            f"with{'' if checkpointing else 'out'} gradient checkpointing. Not counted: buffers of a single operation, "
            "such as the gradient of the logits."
        )
    return [
        *([fused] if experts else []),
        activations,
        f"Frozen weights are {dtype} and truncated bases bfloat16. Complete bases are float32, and so is what trains, "
        "with its gradients and moments.",
        "The layers' weights train, their biases do not. A trained head is not counted.",
        "SparseGrad: an adapter, a core S (r, c) in truncated bases for each layer. A step trains all of S, or its "
        "largest gradient entries (top).",
        "published layer, plain weights: the paper's method in complete bases. The published layer stores its weight "
        "in the basis and has COO gradients (20 bytes an entry); plain weights have dense gradients. Not counted: the "
        "dense gradient that the published layer forms on the way, one layer at a time.",
        "optimizer, LOW-HIGH: an entry takes 12 bytes from its first selection on. LOW is after the first step, HIGH "
        "with every entry selected; a run ends in between. AdamW takes 8 bytes an entry.",
    ]
