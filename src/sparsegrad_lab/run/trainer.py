"""Create the trainer of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from ..methods.training.trainer import MethodTrainer
from ..tasks.kinds import KINDS
from ..tasks.task import Task, higher_is_better
from .checkpoints import writing
from .folder import RunFolder
from .inputs import Inputs
from .phase import Phase, measured
from .processes import process_count
from .sampler import LengthSampler
from .settings import RunArguments, TrainingArguments


class MeasureTraining(TrainerCallback):
    """Time and peak memory of the steps and evaluations, without calibration and optimizer creation."""

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
        """Stop, also after an error."""
        self._stack.close()


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping that a resumed run remembers: the Trainer forgets it when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop again after one step if the run was killed after it had stopped. The best weights replace it."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def make_trainer(
    arguments: RunArguments, folder: RunFolder, inputs: Inputs, callbacks: Sequence[TrainerCallback]
) -> MethodTrainer:
    """The trainer of a run. Early stopping is added to the callbacks if the settings ask for it."""
    task, adapted, features = inputs.task, inputs.adapted, inputs.features
    kind, training = KINDS[task.kind], arguments.training
    stopping = [] if training.patience is None else [EarlyStopping(early_stopping_patience=training.patience)]
    rows_per_step = _rows_per_step(training)
    by_length = partial(LengthSampler.of_dataset, rows_per_step, arguments.seeds[0])
    trainer: MethodTrainer = (adapted.trainer or MethodTrainer)(
        model=adapted.model,
        args=_trainer_arguments(arguments, folder, task, len(features["train"]), adapted.optimizer),
        train_dataset=features["train"],
        eval_dataset=features[task.evaluation_splits[0]],
        data_collator=kind.collator(inputs.processor, arguments.padded_length),
        compute_metrics=_scorer(task),
        preprocess_logits_for_metrics=kind.reduced,
        callbacks=[*callbacks, *stopping],
        calibration=adapted.calibration,
        refresh_every=arguments.calibration.refresh,
        density=adapted.density,
        k=adapted.k,
        rest_learning_rate=training.rest_learning_rate,
        own_optimizer=not adapted.optimizer,
        measuring=_measure_into(folder),
        saving=partial(writing, folder.checkpoints),
        sampler=by_length if training.batches == "by_length" else None,
    )
    trainer.remove_callback(PrinterCallback)  # `ProgressCallback` prints
    if arguments.report_to == "tensorboard":
        board = trainer.pop_callback(TensorBoardCallback)
        board.logging_dir = str(folder.path / "logs")  # its default is in the folder of the checkpoints
        trainer.add_callback(board)
    return trainer


def _measure_into(folder: RunFolder) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def measure() -> Any:
        with measured() as phase:
            yield
        folder.write_json("calibration.json", phase.as_dict())

    return measure


def _trainer_arguments(
    arguments: RunArguments, folder: RunFolder, task: Task, n_train: int, optimizer: dict[str, Any]
) -> transformers.TrainingArguments:
    """The run's settings as `transformers.TrainingArguments`."""
    training = arguments.training
    steps_per_epoch = -(-n_train // _rows_per_step(training))
    evaluation_steps = -(-steps_per_epoch // training.evaluations)
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
        eval_steps=evaluation_steps,
        save_steps=evaluation_steps,
        save_total_limit=2,  # the last one, and the best or the one before it: a substitute if the last is damaged
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # early stopping continues its count
        metric_for_best_model=task.main_metric,
        greater_is_better=higher_is_better(task.main_metric),
        label_names=["labels"],  # for some kinds PEFT has no model class from which the Trainer could read it
        logging_steps=max(1, min(evaluation_steps, total // 20)),
        **_checkpointing(training.gradient_checkpointing),
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),  # without it, the Trainer refuses bf16 on a CPU
        seed=arguments.seeds[0],
        disable_tqdm=True,
        report_to=arguments.report_to,
        run_name=f"{task.name}, {arguments.method}, seed {arguments.seeds[0]}",
        dataloader_pin_memory=torch.cuda.is_available(),
        **optimizer,
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    known = {field.name for field in fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def _rows_per_step(training: TrainingArguments) -> int:
    return training.batch_size * training.gradient_accumulation * process_count()


def _scorer(task: Task) -> Callable[[transformers.EvalPrediction], dict[str, float]]:
    def compute(found: transformers.EvalPrediction) -> dict[str, float]:
        return KINDS[task.kind].score(task, found.predictions, found.label_ids)

    return compute
