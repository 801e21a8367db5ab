"""The layers that SparseGrad would take, and the bytes that each way of fine-tuning holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.method.selection import resolve_k
from sparsegrad_peft.method.sizes import Rows, Sizes
from sparsegrad_peft.method.sketch import sketch_width
from sparsegrad_peft.tuner.config import SparseGradConfig, dtype_of_bases

from .built import built, model_type_of, targets
from .parts import ModelParts, parts_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT32 = 4  # bytes; complete bases and whatever trains are held in float32
_MOMENTS = 8  # bytes an entry: AdamW's two moments
_TOUCHED = 12  # bytes an entry that was ever selected: position and two moments, see method/optim.py
_COO = 20  # bytes an entry of a COO gradient: row and column (int64), value


@dataclass(frozen=True)
class GroupRow:
    """One group of layers that share a basis.

    Attributes:
        name: group name, see `group_linears`.
        layers: number of layers in it.
        out, in_: size of each layer, (out, in).
        r, c: size of the core of each layer, (r, c): rows of `V` and of `U` that are kept.
        entries_per_layer: trained entries of a layer, r · c.
        entries: the same for all layers of the group.
        k_per_layer: entries of a layer that move in a step at the density given.
        bases_bytes: `U` (c, in) and `V` (r, out), once for the group or for each of its layers: bfloat16, complete ones
            float32.
        gram_bytes: both Gram matrices in float32, or sketches of them, during calibration; as often.
    """

    name: str
    layers: int
    out: int
    in_: int
    r: int
    c: int
    entries_per_layer: int
    entries: int
    k_per_layer: int
    bases_bytes: int
    gram_bytes: int


@dataclass(frozen=True)
class MethodBytes:
    """What one way of fine-tuning holds in memory, activations aside.

    What is frozen has the type of the weights; what trains is float32, as are its gradients and moments.

    Attributes:
        key: the method in a word: "full", "layers", "lora", "block", "topk", "published" or "published_plain".
        name: the method in a few words, with its numbers.
        trained: number of entries that train.
        weights_bytes: of the model, with what the method adds or widens to float32.
        bases_bytes: the bases of all groups.
        gradients_bytes: of what trains.
        optimizer_bytes_low: optimizer state after the first step. With selection it grows from here.
        optimizer_bytes_high: optimizer state once every entry has been selected; the same as `low` without selection.
    """

    key: str
    name: str
    trained: int
    weights_bytes: int
    bases_bytes: int
    gradients_bytes: int
    optimizer_bytes_low: int
    optimizer_bytes_high: int

    @property
    def total_bytes_high(self) -> int:
        """Everything together, with the optimizer's upper bound."""
        return self.weights_bytes + self.bases_bytes + self.gradients_bytes + self.optimizer_bytes_high


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`.

    Attributes:
        model: the name or folder that was asked for, else the class of the model.
        model_class: class of the model that was built, and so its head.
        model_type: `config.model_type`, "" where there is no config.
        dtype: of frozen weights.
        sizes, shared, density: as asked for, or the defaults.
        target_modules: the layers' names, a regular expression for them, or their endings.
        parts: parameters by part.
        groups: the layers that SparseGrad would take.
        calibration_bytes: extra memory of calibration at its peak: all Gram matrices, or sketches of them with their
            random vectors, and one gradient.
        lora_rank: rank at which LoRA on the same layers trains about as many entries.
        methods: bytes under each method.
        notes: what the numbers mean and what they leave out.
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
    groups: list[GroupRow]
    calibration_bytes: int
    lora_rank: int
    methods: list[MethodBytes]
    notes: list[str]

    @property
    def layers(self) -> int:
        """Number of layers that SparseGrad would take."""
        return sum(group.layers for group in self.groups)

    @property
    def entries(self) -> int:
        """Trained entries of all layers, the sum of r · c."""
        return sum(group.entries for group in self.groups)

    @property
    def k(self) -> int:
        """Entries of all layers that move in a step at the density given."""
        return sum(group.layers * group.k_per_layer for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON; sums and shares included."""
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
    c: Rows | None = None,
    r: Rows | None = None,
    shared: bool | None = None,
    density: float = 0.01,
    target_modules: Iterable[str] | str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    dtype: str | torch.dtype = "float32",
) -> Inspection:
    """Parameters by part, groups that SparseGrad would take, and bytes under each method.

    Args:
        model: a folder with a config.json, a name on the Hugging Face Hub (its config.json is fetched, nothing else), a
            config, or a model on any device, which is only looked at.
        narrow: rows of the basis of a layer's smaller side, a count, a fraction or "full"; None is the default of
            `SparseGradConfig`.
        wide: rows of the basis of its larger side, likewise.
        c: rows of `U`, the input side of every layer, in place of those two.
        r: rows of `V`, the output side of every layer, likewise.
        shared: one pair of bases for a group of layers, or one for each layer; None is the default.
        density: share of the entries that move in a step, above 0 and at most 1.
        target_modules: which layers, as in PEFT; None: the MLP linears of the architecture.
        task_type: PEFT's name of the task ("SEQ_CLS", "CAUSAL_LM", ...), which decides on the head. None: the class
            that the config names, else the model without a head.
        num_labels: number of classes of the head; None is the config's.
        dtype: of frozen weights: float32, bfloat16 or float16.

    Raises:
        FileNotFoundError: no such folder or model, or no config.json in it.
        ValueError: the config is of no known model; the model has no MLP linears, or none that match
            `target_modules`; a number is out of range, or depends on gradients ("energy:SHARE").
    """
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype_name}")
    defaults = SparseGradConfig()
    sizes = Sizes(defaults.narrow if narrow is None else narrow, defaults.wide if wide is None else wide, c, r)
    shared = defaults.shared if shared is None else shared
    modules = built(model, task_type, num_labels)
    wanted = targets(modules, target_modules, task_type)
    groups = group_linears(modules, wanted)  # by role, for a short table; with bases of its own, a layer has a pair
    parts = parts_of(modules, {name for names in groups.values() for name in names})
    rows = [_group_row(modules, name, names, sizes, shared, density) for name, names in groups.items()]
    width = _DTYPES[dtype_name].itemsize
    # A gradient has the type of the weights; the sums are float32, so a narrower one is copied.
    gradient = max(row.out * row.in_ for row in rows) * (width if width == _FLOAT32 else width + _FLOAT32)
    rank = max(1, round(sum(row.entries for row in rows) / _lora_entries(rows)))
    named = getattr(getattr(modules, "config", None), "name_or_path", None) or type(modules).__name__
    return Inspection(
        model=model if isinstance(model, str) else str(named),
        model_class=type(modules).__name__,
        model_type=model_type_of(modules),
        dtype=dtype_name,
        sizes=sizes,
        shared=shared,
        density=density,
        target_modules=wanted,
        parts=parts,
        groups=rows,
        calibration_bytes=sum(row.gram_bytes for row in rows) + _probe_bytes(rows) + gradient,
        lora_rank=rank,
        methods=_methods(parts.total, rows, rank, density, width),
        notes=_notes(dtype_name),
    )


def _group_row(model: nn.Module, name: str, layers: list[str], sizes: Sizes, shared: bool, density: float) -> GroupRow:
    out, in_ = linear_shape(model.get_submodule(layers[0]), layers[0])
    sizes.check(out, in_, f"group {name}")
    r_count, c_count = sizes.counts(out, in_)
    if r_count is None or c_count is None:
        raise ValueError(
            f"{sizes}: a number of rows that the gradients decide; give counts or fractions to look at a model before "
            "calibration"
        )
    entries = r_count * c_count
    pairs = 1 if shared else len(layers)  # of bases, and of Gram matrices
    return GroupRow(
        name=name,
        layers=len(layers),
        out=out,
        in_=in_,
        r=r_count,
        c=c_count,
        entries_per_layer=entries,
        entries=len(layers) * entries,
        k_per_layer=resolve_k(entries, density=density),
        bases_bytes=pairs * (c_count * in_ + r_count * out) * dtype_of_bases(sizes).itemsize,
        gram_bytes=pairs
        * sum(n * (sketch_width(rows, n) or n) for n, rows in ((in_, c_count), (out, r_count)))
        * _FLOAT32,
    )


def _probe_bytes(rows: list[GroupRow]) -> int:
    """Random vectors of the sketches: one matrix for all sides of a size."""
    sides = {(n, sketch_width(count, n)) for row in rows for n, count in ((row.in_, row.c), (row.out, row.r))}
    return sum(n * width for n, width in sides if width is not None) * _FLOAT32


def _lora_entries(rows: list[GroupRow]) -> int:
    """Trained entries of LoRA for each unit of rank."""
    return sum(row.layers * (row.in_ + row.out) for row in rows)


def _methods(total: int, rows: list[GroupRow], rank: int, density: float, width: int) -> list[MethodBytes]:
    """Bytes under each method, for a model of `total` parameters with `width` bytes a frozen weight."""
    layers = sum(row.layers * row.out * row.in_ for row in rows)  # weights of the layers, without biases
    entries = sum(row.entries for row in rows)
    k = sum(row.layers * row.k_per_layer for row in rows)
    k_complete = sum(row.layers * resolve_k(row.out * row.in_, density=density) for row in rows)
    bases = sum(row.bases_bytes for row in rows)
    complete = sum(row.in_**2 + row.out**2 for row in rows) * _FLOAT32
    lora = rank * _lora_entries(rows)
    widened = (total - layers) * width + layers * _FLOAT32

    def dense(key: str, name: str, trained: int, weights: int, bases: int = 0) -> MethodBytes:
        state = _MOMENTS * trained
        return MethodBytes(key, name, trained, weights, bases, _FLOAT32 * trained, state, state)

    def selecting(key: str, name: str, trained: int, weights: int, bases: int, gradients: int, k: int) -> MethodBytes:
        name = f"{name}, top {density:.4g}"
        return MethodBytes(key, name, trained, weights, bases, gradients, _TOUCHED * k, _TOUCHED * trained)

    adapted = total * width + _FLOAT32 * entries
    return [
        dense("full", "all weights, AdamW", total, _FLOAT32 * total),
        dense("layers", "these layers, AdamW", layers, widened),
        dense("lora", f"LoRA rank {rank}, AdamW", lora, total * width + _FLOAT32 * lora),
        dense("block", "SparseGrad, whole blocks", entries, adapted, bases),
        selecting("topk", "SparseGrad", entries, adapted, bases, _FLOAT32 * entries, k),
        selecting("published", "published layer", layers, widened, complete, _COO * k_complete, k_complete),
        selecting("published_plain", "plain weights", layers, widened, complete, _FLOAT32 * layers, k_complete),
    ]


def _notes(dtype: str) -> list[str]:
    return [
        "Activations are not counted: they depend on batch, length and checkpointing.",
        f"Frozen weights are {dtype}, truncated bases bfloat16; what trains, its gradients and moments, and complete "
        "bases are float32.",
        "Weights of the layers train, not their biases; a head that trains as well is not counted.",
        "SparseGrad: an adapter, the blocks S (r, c) in truncated bases; trained whole by AdamW, or the largest "
        "gradient entries of each step.",
        "Published layer, plain weights: the method of the paper in complete bases. The layer holds its weight in the "
        "basis and has COO gradients of 20 bytes an entry; plain weights have dense ones. The dense gradient of one "
        "layer that the former passes through is not counted.",
        "optimizer, LOW-HIGH: an entry takes 12 bytes from when it is first selected. LOW is the first step, HIGH is "
        "with every entry selected at some time; a run ends between them. AdamW takes 8 bytes an entry.",
    ]
