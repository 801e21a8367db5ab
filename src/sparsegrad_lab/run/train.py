"""The run: model + task + method -> `transformers.Trainer` -> a folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from ..methods.by_name import adapt
from ..tasks.kinds import KINDS
from ..tasks.library_logs import suppress_library_logs
from ..tasks.pretrained import model_path
from .base import load_model, load_run_task
from .card import card
from .console import Progress
from .environment import environment
from .folder import RunFolder, save_whole, write_whole
from .picture import write_curves
from .precision import slow_precision
from .settings import WHOLE, RunArguments
from .trainer import MeasureTraining, scorer, stopping, trainer_arguments


def train(
    arguments: RunArguments, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()
) -> list[dict[str, Any]]:
    """One run for each seed; a finished one is not run again, an interrupted one goes on from its last checkpoint.

    Args:
        arguments: what to train.
        progress: show it.
        callbacks: for the Trainer, besides the run's own.

    Returns:
        The results, as in `result.json`.

    Raises:
        ValueError: what `RunArguments.check` found, all of it at once; a task without training rows; sizes that the
            model's layers do not have.
        FileExistsError: the folder holds another run.
        TrainingDivergedError: the loss is no longer finite.
        OSError: something could not be written; what was saved before is whole.
    """
    arguments.check()
    several = len(arguments.seeds) > 1
    output = output_folder(arguments)
    if several and (output / "config.yaml").is_file():
        raise FileExistsError(f"{output} holds the run of one seed; choose another output folder for several")
    results = []
    for seed in arguments.seeds:
        single = copy.deepcopy(arguments)
        single.seeds = [seed]
        single.output = str(output / f"seed-{seed}" if several else output)
        results.append(_train_one(single, progress, callbacks))
    return results


def output_folder(arguments: RunArguments) -> Path:
    """The folder that the arguments name, with the task's and method's names put in."""
    method = Path(arguments.method).stem if Path(arguments.method).is_file() else arguments.method
    return Path(arguments.output.replace("{task}", arguments.task.replace("/", "-")).replace("{method}", method))


def _train_one(arguments: RunArguments, progress: bool, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    folder, seed = RunFolder(arguments.output), arguments.seeds[0]
    reporter = Progress(folder, show=progress)
    folder.check(arguments)
    if folder.finished:
        reporter.say(f"{folder}: this run is finished already, nothing is done")
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # a kill may have left some
        return folder.read_result()
    task, _ = load_run_task(arguments)
    kind = KINDS[task.kind]
    set_seed(seed)
    processor = kind.processor(arguments.model)
    with suppress_library_logs():
        adapted = adapt(load_model(arguments.model, task, processor), arguments)
        features = {split: kind.features(task, split, processor, arguments.data) for split in task.splits}
    for data in features.values():
        kind.check_features(data, adapted.model, processor)
    # Nothing is refused any more by what was asked for: from here on the folder is this run's.
    folder.start(arguments)
    folder.write_json("environment.json", {**environment(), "seed": seed})
    broken = folder.drop_broken_checkpoints()
    checkpoint = folder.last_checkpoint()
    main_split = task.evaluation_splits[0]
    sizes = ", ".join(f"{len(data):,} {split}" for split, data in features.items())
    reporter.say(f"{task.name} ({sizes} rows), {arguments.method} on {arguments.model}, seed {seed}: {folder}")
    if slow := slow_precision(arguments.training.precision):
        reporter.say(slow)
    if broken:
        reporter.say(f"passed over, since it was cut off or damaged, or the best one before it: {', '.join(broken)}")
    if checkpoint is not None:
        reporter.say(f"going on from step {checkpoint.name.rpartition('-')[2]}")

    training = MeasureTraining()
    reporter.metric = task.main_metric
    trainer = adapted.trainer(
        model=adapted.model,
        args=trainer_arguments(arguments, folder, task, len(features["train"]), adapted.optimizer),
        train_dataset=features["train"],
        eval_dataset=features[main_split],
        data_collator=kind.collator(processor, arguments.padded_length),
        compute_metrics=scorer(task),
        preprocess_logits_for_metrics=kind.reduced,
        callbacks=[reporter, training, *stopping(arguments), *callbacks],
        calibration=adapted.calibration,
        refresh_every=arguments.calibration.refresh,
        density=adapted.density,
        k=adapted.k,
        rest_learning_rate=arguments.training.rest_learning_rate,
        own_optimizer=not adapted.optimizer,
        calibrated=lambda phase: folder.write_json("calibration.json", phase.as_dict()),
    )
    trainer.remove_callback(PrinterCallback)  # the reporter says it
    with suppress_library_logs():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except OSError:
            folder.drop_broken_checkpoints()  # a disk that is full: what was being written is of no use
            raise
        finally:
            reporter.stop()
            training.stop()
        entries = trainer.trained_entries(adapted.targets)
        trainer.make_plain()
        scores = {
            split: trainer.evaluate(features[split], metric_key_prefix=split) for split in task.evaluation_splits
        }  # of the best evaluation's weights, which the trainer has loaded

    save_whole(folder.path / ("model" if arguments.method in WHOLE else "adapter"),
               lambda path: save_weights(trainer.model, path))  # fmt: skip
    save_whole(folder.path / kind.processor_folder, lambda path: processor.save_pretrained(path))
    log = trainer.state.log_history
    folder.write_json("metrics.json", log)
    write_curves(folder.path / "curves.png", log, task.main_metric, f"{task.name}, {arguments.method}, seed {seed}")
    result = {
        "task": task.name, "method": arguments.method, "model": arguments.model, "seed": seed,
        "text": task.text, "labels": task.labels, "metrics": task.metrics,
        "rows": {split: len(data) for split, data in features.items()},
        "metric": task.main_metric,
        "score": scores[main_split][f"{main_split}_{task.main_metric}"],
        "scores": {split: _named(found, split) for split, found in scores.items()},
        "trained_entries": entries,
        "steps": trainer.state.global_step,
        "evaluations": [
            {"step": entry["step"], **_named(entry, "eval")} for entry in log if f"eval_{task.main_metric}" in entry
        ],
        "best_step": trainer.state.best_global_step,
        "learning_rate": arguments.learning_rate,
        "training_loss_last_sixth": last_sixth(log),
        "weights_bytes": sum(file.stat().st_size for file in folder.weights.iterdir() if file.suffix != ".md"),
        "calibration": folder.read_json("calibration.json"),
        "training": training.phase.as_dict(),
        "resumed": checkpoint is not None,
        "config": arguments.as_dict(),
        "environment": {**environment(), "seed": seed},
    }  # fmt: skip
    base, config = model_path(arguments.model), getattr(trainer.model, "peft_config", {}).get("default")
    write_whole(folder.weights / "README.md", card(result, config, kind.auto.__name__, base))
    folder.write_json("result.json", result)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return folder.read_result()


def save_weights(model: nn.Module, path: Path) -> None:
    """Adapter or model, in safetensors."""
    with suppress_library_logs():
        model.save_pretrained(path)  # type: ignore[operator]


def last_sixth(log: list[dict[str, Any]]) -> float | None:
    """Mean training loss over the last sixth of the steps: steadier than a score."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    end = max((step for step, _ in points), default=0)
    late = [loss for step, loss in points if step > end * 5 / 6]
    return sum(late) / len(late) if late else None


def _named(found: dict[str, float], split: str) -> dict[str, float]:
    skipped = ("runtime", "samples_per_second", "steps_per_second", "epoch")
    names = {name.removeprefix(f"{split}_"): value for name, value in found.items()}
    return {name: value for name, value in names.items() if name not in skipped}
