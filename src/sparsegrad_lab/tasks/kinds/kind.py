"""What a kind of task has to say to the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from peft import TaskType
from torch import Tensor

from ...run.settings import RunArguments
from ..task import Task

if TYPE_CHECKING:
    from ...run.finished_run import Finished

Rows = list[dict[str, Any]]


class Kind(ABC):
    """One kind of task; it holds no state.

    Attributes:
        auto: the class of `transformers` that loads a model with the head.
        task_type: PEFT's name of it; None where it has none.
        does: what a model with this head does, for messages: "transformers has no ... model that ...".
        heads: last parts of the names of the modules between the pretrained model and its output, which are trained
            with `rest: freeze` too.
        processor_folder: where a run keeps the tokenizer, or what reads images.
    """

    auto: Any
    task_type: TaskType | None
    does: str
    heads: tuple[str, ...] = ()
    processor_folder: str = "tokenizer"

    @abstractmethod
    def processor(self, model: str | Path) -> Any:
        """The model's tokenizer, or what reads images for it.

        Raises:
            ValueError: there is none.
        """

    def options(self, task: Task) -> dict[str, Any]:
        """For `auto.from_pretrained`."""
        return {}

    @abstractmethod
    def features(self, task: Task, split: str, processor: Any, arguments: RunArguments) -> Dataset:
        """What the model is given for each row of a split, with "labels".

        Raises:
            ValueError: the model cannot read rows of that length, or none is left.
        """

    @abstractmethod
    def collator(self, processor: Any, arguments: RunArguments) -> Callable[[Rows], dict[str, Tensor]]:
        """Rows of features -> a batch."""

    def evaluation_batch(self, arguments: RunArguments) -> int:
        """Rows of a batch in evaluation."""
        return 64

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """What is kept of a batch's output for `score`: (rows, ...)."""
        found: Tensor = logits[0] if isinstance(logits, tuple) else logits
        return found

    @abstractmethod
    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """The task's metrics, of what `reduced` has kept of all rows, and the labels of their features.

        Raises:
            ValueError: the outputs are not finite.
        """

    @abstractmethod
    def predict(self, run: Finished, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> Rows:
        """The rows, with "prediction" and whatever else there is to say."""

    def prompt_columns(self, task: Task) -> tuple[str, ...]:
        """The columns that `predict` needs."""
        return task.text
