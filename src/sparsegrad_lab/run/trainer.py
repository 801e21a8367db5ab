"""`transformers.Trainer`, set up for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback

from sparsegrad_peft.tuner.trainer import SparseGradTrainer

from ..tasks.kinds import KINDS
from ..tasks.task import Task, higher_is_better
from .checkpoints import writing
from .folder import RunFolder
from .meter import Phase, measured
from .parameter_counts import trained_entries
from .sampler import ByLength
from .settings import RunArguments


class MeasureTraining(TrainerCallback):
    """Time and peak memory of the steps and evaluations, without calibration and the making of the optimizer."""

    def __init__(self) -> None:
        self.phase = Phase()
        self._stack = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.phase = self._stack.enter_context(measured())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """Also after an error."""
        self._stack.close()


class RunTrainer(SparseGradTrainer):
    """The trainer of a run.

    Args:
        calibrated: is told what calibration took, apart from training.
    """

    def __init__(self, *args: Any, calibrated: Callable[[Phase], None], **kwargs: Any) -> None:
        self.calibrated = calibrated
        super().__init__(*args, **kwargs)

    def _calibrate(self, adapter_name: str) -> None:
        with measured() as phase:
            super()._calibrate(adapter_name)
        self.calibrated(phase)

    def trained_entries(self, targets: Sequence[str]) -> dict[str, Any]:
        """How many numbers the run trains, in the layers `targets` above all; before `make_plain`."""
        return trained_entries(self.model, targets)

    def make_plain(self) -> None:
        """Give the model the form that is saved: for an adapter, or weights of its own, the one that it has."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length" or self.args.world_size > 1:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(tokens) for tokens in rows["input_ids"]]
        return ByLength(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths, self.args.seed)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        name = Path(self.state.best_model_checkpoint).name
        # The run's folder may have been moved or copied since: the checkpoint went with it.
        self.state.best_model_checkpoint = str(Path(self.args.output_dir) / name)
        super()._load_best_model()


def trainer_arguments(
    arguments: RunArguments, folder: RunFolder, task: Task, n_train: int, optimizer: dict[str, Any]
) -> transformers.TrainingArguments:
    """Ours in the Trainer's words."""
    training = arguments.training
    steps_per_epoch = -(-n_train // (training.batch_size * training.gradient_accumulation))
    # A whole number of evaluations an epoch is a share of all steps; at least one step lies between two.
    every = max(1, steps_per_epoch // training.evaluations)
    total = max(1, round(steps_per_epoch * training.epochs))
    return transformers.TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=KINDS[task.kind].evaluation_batch_size(training.batch_size),
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=round(training.warmup * total),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,  # the last, and the best or the one before: it stands in where the last is damaged
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        metric_for_best_model=task.main_metric,
        greater_is_better=higher_is_better(task.main_metric),
        label_names=["labels"],  # PEFT has no class of its own for some kinds, where the Trainer would find none
        logging_steps=max(1, min(every, total // 20)),
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),  # without it, the Trainer refuses bf16 there
        seed=arguments.seeds[0],
        train_sampling_strategy="group_by_length" if training.batches == "by_length" else "random",
        disable_tqdm=True,  # `Progress` shows it
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **optimizer,
    )


def stopping(arguments: RunArguments) -> list[EarlyStoppingCallback]:
    """Early stopping, where it was asked for."""
    patience = arguments.training.patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def scorer(task: Task) -> Any:
    """For the Trainer: outputs of all rows -> the task's metrics."""

    def compute(found: transformers.EvalPrediction) -> dict[str, float]:
        return KINDS[task.kind].score(task, found.predictions, found.label_ids)

    return compute
