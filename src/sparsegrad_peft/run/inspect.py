"""What SparseGrad would do to a model, from its config alone: parameters by part, groups of layers, bytes a method.

    config.json ──► the model's modules on the meta device ──► ModelParts, GroupRow, MethodBytes

No weight is downloaded or allocated, so a model of any size is looked at in a second. Every number is computed, none is
measured; activations are left out, because they depend on the batch.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from ..method.groups import group_linears, linear_shape
from ..method.selection import resolve_k
from ..method.sizes import Rows, Sizes
from ..method.sketch import sketch_width
from ..tuner.config import SparseGradConfig, dtype_of_bases
from ..tuner.targets import _ATTENTION, TARGETS, find_mlp_linears
from .pretrained import first_line, load_config

if TYPE_CHECKING:
    from rich.console import Console

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT32 = 4  # bytes; complete bases and whatever trains are held in float32
_MOMENTS = 8  # bytes an entry: AdamW's two moments
_TOUCHED = 12  # bytes an entry that was ever selected: position and two moments, see method/optim.py
_COO = 20  # bytes an entry of a COO gradient: row and column (int64), value

_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types -> the model with the head for it."""

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
    built = _built(model, task_type, num_labels)
    targets = _targets(built, target_modules, task_type)
    groups = group_linears(built, targets)  # by role, for a short table; with bases of its own, a layer has a pair
    parts = _parts(built, {name for names in groups.values() for name in names})
    rows = [_group_row(built, name, names, sizes, shared, density) for name, names in groups.items()]
    width = _DTYPES[dtype_name].itemsize
    # A gradient has the type of the weights; the sums are float32, so a narrower one is copied.
    gradient = max(row.out * row.in_ for row in rows) * (width if width == _FLOAT32 else width + _FLOAT32)
    rank = max(1, round(sum(row.entries for row in rows) / _lora_entries(rows)))
    named = getattr(getattr(built, "config", None), "name_or_path", None) or type(built).__name__
    return Inspection(
        model=model if isinstance(model, str) else str(named),
        model_class=type(built).__name__,
        model_type=_model_type(built),
        dtype=dtype_name,
        sizes=sizes,
        shared=shared,
        density=density,
        target_modules=targets,
        parts=parts,
        groups=rows,
        calibration_bytes=sum(row.gram_bytes for row in rows) + _probe_bytes(rows) + gradient,
        lora_rank=rank,
        methods=_methods(parts.total, rows, rank, density, width),
        notes=_notes(dtype_name),
    )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _built(model: str | nn.Module | PretrainedConfig, task_type: str | None, num_labels: int | None) -> nn.Module:
    """The model's modules, with parameters that have a shape and no storage."""
    if isinstance(model, nn.Module):
        return model
    config = load_config(model) if isinstance(model, str) else copy.deepcopy(model)
    if num_labels is not None:
        config.num_labels = num_labels
    try:
        with torch.device("meta"):
            return _construct(config, task_type)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        task = f" with a head for task_type={task_type!r}" if task_type else ""
        raise ValueError(f"transformers has no {config.model_type} model{task}") from None
    except (RuntimeError, NotImplementedError) as error:  # it looks at numbers while it is made
        raise ValueError(
            f"{config.model_type}: the model cannot be made without its weights ({first_line(error)}); load it and "
            "pass the model itself"
        ) from error


def _construct(config: PretrainedConfig, task_type: str | None) -> nn.Module:
    if task_type is not None:
        auto = _HEADS.get(str(task_type).rpartition(".")[2].upper())
        if auto is None:
            raise ValueError(f"task_type must be one of {', '.join(_HEADS)}, found {task_type!r}")
        return getattr(transformers, auto).from_config(config)
    architectures = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, architectures[0], None)
    return transformers.AutoModel.from_config(config) if named is None else named(config)


def _targets(model: nn.Module, target_modules: Iterable[str] | str | None, task_type: str | None) -> list[str] | str:
    """The layers that `SparseGradConfig(target_modules=...)` would adapt, in a form that `group_linears` takes."""
    if target_modules is None:
        if not _mlp_linears(model):
            raise ValueError(
                f"{type(model).__name__}: no MLP layers known for model_type {_model_type(model)!r}, and none found by "
                "structure; name the layers with target_modules (endings of their names, or a regular expression)"
            )
        return _mlp_targets(model)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        config = SparseGradConfig(target_modules="all-linear", task_type=task_type)
        names = set(_maybe_include_all_linear_layers(config, model).target_modules or ())
        return [name for name, _ in model.named_modules() if name in names]
    return target_modules if isinstance(target_modules, str) else sorted(target_modules)


def _mlp_targets(model: nn.Module) -> list[str] | str:
    return TARGETS.get(_model_type(model)) or find_mlp_linears(model)


def _mlp_linears(model: nn.Module) -> set[str]:
    """Names of the MLP's linear layers, whatever SparseGrad is asked to take."""
    try:
        groups = group_linears(model, _mlp_targets(model))
    except ValueError:  # nothing matches
        return set()
    return {name for names in groups.values() for name in names}


def _parts(model: nn.Module, chosen: set[str]) -> ModelParts:
    """Every parameter to its part; what is chosen as a target is the MLP where no better is known."""
    mlp = _mlp_linears(model)
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


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection as tables that fit into 80 columns."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    calibration = inspection.calibration_bytes
    say(f"{inspection.model}: {inspection.model_class}, {inspection.parts.total:,} parameters")
    console.print(_parts_table(inspection.parts))
    console.print(_groups_table(inspection))
    for number, group in enumerate(inspection.groups, 1):
        say(f"{number:>3} {group.name}")
    say("\nCalibration adds at its peak, for its sums and one gradient: "
        f"{_in(calibration, _unit(calibration))} {_unit(calibration)}")  # fmt: skip
    console.print(_methods_table(inspection))
    say("")
    for note in inspection.notes:
        say(f"- {note}")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _parts_table(parts: ModelParts) -> Table:
    table = _table("Parameters by part", "part", "parameters", "share, %")
    for field in fields(parts):
        name = "MLP" if field.name == "mlp" else field.name
        table.add_row(name, f"{getattr(parts, field.name):,}", f"{100 * parts.share(field.name):.1f}")
    table.add_row("all", f"{parts.total:,}", "100.0", style="bold")
    return table


def _groups_table(i: Inspection) -> Table:
    table = _table(
        f"Layers to adapt: {i.sizes}, k at density {i.density:.4g}",
        "no.", "layers", "out x in", "core r x c", "entries\na layer", "entries", "k a\nlayer", "bases,\nMB",
    )  # fmt: skip
    for number, g in enumerate(i.groups, 1):
        table.add_row(f"{number:>3}", str(g.layers), f"{g.out}x{g.in_}", f"{g.r}x{g.c}", f"{g.entries_per_layer:,}",
                      f"{g.entries:,}", f"{g.k_per_layer:,}", _in(g.bases_bytes, "MB"))  # fmt: skip
    bases = _in(sum(g.bases_bytes for g in i.groups), "MB")
    table.add_row("all", str(i.layers), "", "", "", f"{i.entries:,}", "", bases, style="bold")
    return table


def _methods_table(i: Inspection) -> Table:
    unit = _unit(max(method.total_bytes_high for method in i.methods))
    table = _table(
        f"Memory of each method, in {unit} ({'1e9' if unit == 'GB' else '1e6'} bytes)",
        "what trains", "trained,\nmillion", "weights", "bases", "gradients", "optimizer", "in all,\nat most",
    )  # fmt: skip
    for m in i.methods:
        low, high = _in(m.optimizer_bytes_low, unit), _in(m.optimizer_bytes_high, unit)
        table.add_row(m.name, _figure(m.trained / 1e6), _in(m.weights_bytes, unit), _in(m.bases_bytes, unit),
                      _in(m.gradients_bytes, unit), low if low == high else f"{low}-{high}",
                      _in(m.total_bytes_high, unit))  # fmt: skip
    return table


def _unit(largest: int) -> str:
    return "GB" if largest >= 10**10 else "MB"


def _in(number: int, unit: str) -> str:
    """Bytes in a decimal unit."""
    return _figure(number / (1e9 if unit == "GB" else 1e6))


def _figure(value: float) -> str:
    """About three figures, without exponents."""
    if value == 0:
        return "0"
    return f"{value:,.3f}" if value < 1 else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"
