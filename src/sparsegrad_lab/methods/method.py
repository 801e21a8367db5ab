"""The interface of a method. Each file in this room is one method; torch and peft are imported only when they are used.

To add a method, add a file with a subclass of `Method` and an instance of it named `METHOD`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .settings import AdapterArguments, CalibrationArguments

if TYPE_CHECKING:
    from peft import TaskType
    from torch import nn

    from sparsegrad_peft.method.config import CalibrationConfig

LAYERS = frozenset({"adapter.target_modules", "adapter.layers"})
"Settings that choose the layers."
SIZES = frozenset({"adapter.narrow", "adapter.wide", "adapter.c", "adapter.r", "adapter.trained_share"})
"Settings of the sizes of the bases."
FORM = frozenset({"adapter.neurons", "adapter.exponent"})
"Settings of the form of the bases."
SELECTION = frozenset({"adapter.density", "adapter.k"})
"Settings of the selection in each step."
CALIBRATION = frozenset({
    "calibration.n_steps", "calibration.walk", "calibration.normalize", "calibration.mean_gradient",
})  # fmt: skip
"Settings of the calibration."
LOOP = frozenset({"training.rest_learning_rate", "training.gradient_accumulation", "training.weight_decay"})
"Settings of the training loop that some methods cannot use."
REFUSED_IF_UNREAD = (*sorted(LAYERS | SELECTION | LOOP), "adapter.products", "calibration.refresh")
"""Settings that a run must leave at their default if its method does not read them.

A file of settings may hold the others for all methods of a comparison; on the command line they are refused.
"""
OPTIONAL_SETTINGS = frozenset({
    *REFUSED_IF_UNREAD, *CALIBRATION, *SIZES, *FORM, "adapter.rank", "adapter.shared", "adapter.prefer",
})  # fmt: skip
"Settings that some methods do not read."


@dataclass(frozen=True)
class Setup:
    """What a method needs to know of a run."""

    adapter: AdapterArguments
    calibration: CalibrationArguments
    density: float | None
    "share of the entries that a step updates, with the method's default"
    train_rest: bool
    "train the whole model besides the MLP layers, and not only the head"
    heads: tuple[str, ...]
    "last parts of the head modules' names"
    task_type: TaskType | None
    "PEFT's name of the task"


@dataclass
class Adapted:
    """A model that is ready to be trained, and what the trainer must know."""

    model: nn.Module
    calibration: CalibrationConfig | None = None
    density: float | None = None
    k: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    "arguments for `TrainingArguments`, for a method whose optimizer the Trainer creates"
    trainer: Callable[..., Any] | None = None
    "creates the trainer; default: `MethodTrainer`"
    targets: Sequence[str] = ()
    "names of the layers whose own weights are trained, for a method without an adapter"


class Method(ABC):
    """A way to fine-tune the MLP layers of a model. Instances hold no state of a run.

    Attributes:
        name: on the command line.
        order: position in lists and tables; methods with the same position are sorted by name.
        summary: description for the command's help.
        learning_rate: default. Masked and low-rank updates need about ten times the rate of full fine-tuning.
        density: default share of the entries that a step updates; None: all.
        leaves: what a run writes: an adapter, or a whole model.
        reads: the names in `OPTIONAL_SETTINGS` that the method reads.
    """

    name: str
    order: int = 100
    summary: str
    learning_rate: float
    density: float | None = None
    leaves: Literal["adapter", "model"] = "adapter"
    reads: frozenset[str] = LAYERS | LOOP

    def ignores(self, setting: str) -> bool:
        """True if the method does not read this setting (a dotted name as on the command line)."""
        return setting in OPTIONAL_SETTINGS - self.reads

    def without_effect(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Settings that the method reads and others of these settings replace: dotted name -> what replaces it."""
        return {}

    def problems(self, adapter: AdapterArguments, calibration: CalibrationArguments) -> list[str]:
        """What this method cannot run with, one message each."""
        return []

    def why_not_four_bits(self, adapter: AdapterArguments) -> str | None:
        """Why the method cannot train on a base in 4 bits; None if it can."""
        return "trains the model's own weights" if self.leaves == "model" else None

    def adapts_experts(self, adapter: AdapterArguments) -> bool:
        """True if the method adapts fused experts, with these settings."""
        return False

    def target_layers(self, model: nn.Module, adapter: AdapterArguments) -> list[str]:
        """Names of the layers to adapt, and of fused experts' parameters. The model may be on the meta device.

        Raises:
            ValueError: the model has no such layers, or they are too small for the settings.
        """
        from .training.layers import target_layers

        return target_layers(model, adapter.target_modules, adapter.layers, experts=self.adapts_experts(adapter))

    @abstractmethod
    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Prepare the model for training, in place: add the adapter, freeze the rest or not.

        Raises:
            ValueError: see `target_layers`; the rest is to be trained and some of its modules share weights.
        """
