"""The interface of a kind of task: everything that differs between text, language and image models."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from sparsegrad_peft.tuner.quantized import keep_order

from ..library_logs import suppress_library_logs
from ..metrics import predictions_of, scores_by_class
from ..model_folder import model_path
from ..pretrained import build_without_weights, first_line, load_tokenizer
from ..read import Row, check_columns
from ..settings import DataArguments
from ..task import Task

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


class Kind(ABC):
    """One kind of task. Stateless: there is one instance per kind, see `KINDS`.

    Attributes:
        auto: the Auto class of transformers that loads a model with the head for this kind.
        task_type: PEFT's task type; None if PEFT has none.
        heads: last name parts of the modules between the backbone and the output. They train even with `rest: freeze`.
        processor_folder: the folder in a run that holds the tokenizer or image processor.
    """

    auto: Any
    task_type: TaskType | None
    heads: tuple[str, ...] = ()
    processor_folder: str = "tokenizer"

    def processor(self, model: str | Path) -> Any:
        """Load the model's tokenizer or image processor.

        Raises:
            ValueError: the model has none.
        """
        return load_tokenizer(model)

    def model_options(self, task: Task) -> dict[str, Any]:
        """Return the options of `from_pretrained` for a head with an output per class, or with one for regression."""
        if task.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(task.labels),
            "problem_type": "single_label_classification",
            "label2id": {name: number for number, name in enumerate(task.labels)},
            "id2label": dict(enumerate(task.labels)),
        }

    def load_model(
        self, model: str, task: Task, processor: Any, folder: str | Path | None = None,
        four_bits: torch.dtype | None = None, dtype: torch.dtype = torch.float32,
    ) -> nn.Module:  # fmt: skip
        """Load a pretrained model with a head for the task.

        The head of the checkpoint is kept if it has the right size; else it is initialized.

        Args:
            model: hub name or folder of the pretrained model.
            task: the task.
            processor: the tokenizer or image processor; a missing `pad_token_id` is taken from it.
            folder: load this finished run's model instead of `model`.
            four_bits: quantize the linear layers, except the head, to NF4; products are computed in this type.
            dtype: of the weights.

        Raises:
            ValueError: the weights are missing or damaged.
        """
        place = folder or model_path(model)
        try:
            with suppress_library_logs():  # transformers warns about the new head
                found: Any = self.auto.from_pretrained(
                    place, dtype=dtype, ignore_mismatched_sizes=folder is None, **self.model_options(task),
                    **({} if four_bits is None else {"quantization_config": self._nf4(four_bits)}),
                )  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{place}: the model's weights cannot be read ({first_line(error)}); save or download them again"
            ) from error
        if getattr(found.config, "pad_token_id", 0) is None and hasattr(processor, "pad_token_id"):
            found.config.pad_token_id = processor.pad_token_id
        keep_order(found)  # so that a run and a later evaluation compute the same
        model_with_head: nn.Module = found
        return model_with_head

    def _nf4(self, compute: torch.dtype) -> BitsAndBytesConfig:
        """Return the quantization of QLoRA (Dettmers et al., 2023): NF4 with quantized scales."""
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # Regular expressions of names; None: the output embeddings.
            llm_int8_skip_modules=[rf"(.*\.)?{head}" for head in self.heads] or None,
        )  # fmt: skip

    def empty_model(self, config: PretrainedConfig) -> nn.Module:
        """Build the model with its head on the meta device; see `build_without_weights`."""
        return build_without_weights(config, self.auto)

    @abstractmethod
    def features(self, task: Task, split: str, processor: Any, data: DataArguments) -> Dataset:
        """Return the model's inputs for each row of a split, with "labels".

        Raises:
            ValueError: `data.max_length` exceeds the model's limit, or no row is left.
        """

    def check_features(self, features: Dataset, model: nn.Module, processor: Any) -> None:
        """Raise ValueError for a token that the model has no embedding for."""
        if "input_ids" in features.column_names:
            for ids in features["input_ids"]:
                check_token_ids(ids, model, processor)

    @abstractmethod
    def collator(self, processor: Any, length: int | None) -> Callable[[Rows], dict[str, Tensor]]:
        """Return a function that makes a batch of rows of features.

        Args:
            processor: the tokenizer or image processor.
            length: pad every row to this number of tokens; None: to the longest row of the batch.
        """

    def evaluation_batch_size(self, training_batch_size: int) -> int:
        """Return the number of rows per evaluation batch."""
        return 64

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """Return what `score` needs of a batch's output: (rows, ...)."""
        found: Tensor = logits[0] if isinstance(logits, tuple) else logits
        return found

    @abstractmethod
    def score(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, float]:
        """Return the task's metrics.

        Args:
            task: the task.
            outputs: `reduced` outputs of all rows.
            labels: "labels" of their features.

        Raises:
            ValueError: the outputs are not finite.
        """

    def score_by_class(self, task: Task, outputs: np.ndarray[Any, Any], labels: Any) -> dict[str, Any] | None:
        """Return `scores_by_class` of the same outputs and labels; None for a task without classes."""
        if task.labels is None:
            return None
        return scores_by_class(task.labels, np.asarray(labels), predictions_of(outputs, regression=False))

    @abstractmethod
    def predict(
        self, model: nn.Module, processor: Any, task: Task, rows: Sequence[dict[str, Any]], data: DataArguments,
        max_new_tokens: int,
    ) -> Rows:  # fmt: skip
        """Return the rows with "prediction"; for classes also the probability of each, "p(CLASS)"."""

    def prompt_columns(self, task: Task) -> tuple[str, ...]:
        """Return the columns that `predict` needs."""
        return task.text

    def check_rows(self, task: Task, rows: Sequence[Row], where: str) -> None:
        """Raise ValueError for a row that `predict` cannot read; `where` names the file in the message."""
        check_columns(rows, self.prompt_columns(task), where)

    def in_model_order(self, task: Task, config: Any) -> Task:
        """Return the task with its classes in the order of the model's head, if the model has the same classes.

        A head of the right size is kept, so class numbers must mean the same for the head and the task.
        """
        numbers = getattr(config, "label2id", None) or {}
        return task.with_label_order(sorted(numbers, key=numbers.__getitem__))


def warn_of_cut_rows(lengths: Sequence[int], max_length: int, where: str) -> None:
    """Log how many rows fill `max_length` tokens; what does not fit into it was cut off."""
    full = sum(length >= max_length for length in lengths)
    if full:
        logger.warning(
            "%s: %d of %d rows fill data.max_length, %d tokens; longer rows were cut off", where, full, len(lengths),
            max_length,
        )  # fmt: skip


def check_token_ids(ids: Sequence[int], model: Any, tokenizer: Any) -> None:
    """Raise ValueError for a token id that the model has no embedding for, the padding token included."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    largest = max([*ids, tokenizer.pad_token_id or 0])
    if largest >= embeddings:
        raise ValueError(
            f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, the model "
            f"has {embeddings} embeddings; use the model's own tokenizer, or resize the model's embeddings"
        )
