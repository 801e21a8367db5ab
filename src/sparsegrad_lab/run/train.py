"""Train: model + task + method -> `transformers.Trainer` -> run folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import pvariance
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from ..methods.registry import find_method
from ..methods.training.trainer import MethodTrainer
from ..tasks.kinds import KINDS
from ..tasks.library_logs import suppress_library_logs
from ..tasks.model_folder import hub_id
from ..tasks.task import LANGUAGE
from .calibration import calibrate_unquantized
from .card import make_card
from .checkpoints import writing
from .console import ProgressCallback
from .doubts import doubts, label_doubts, mean_loss
from .folder import RunFolder, output_folder
from .hub import create_repository, push
from .inputs import Inputs, load_inputs
from .machine import environment, slow_precision_warning
from .plots import plot_curves
from .processes import is_rank0, joined, on_rank0, process_count
from .settings import RunArguments
from .trainer import MeasureTraining, make_trainer
from .whole_files import save_whole, write_whole


def train(
    arguments: RunArguments, *, progress: bool = True, callbacks: Sequence[TrainerCallback] = ()
) -> list[dict[str, Any]]:
    """Train once per seed. Finished runs are skipped, interrupted ones are resumed from their last checkpoint.

    Under `torchrun` or `accelerate launch` the processes train together with DDP. All of them call this; rank 0 writes.

    Args:
        arguments: the settings.
        progress: print and show a progress bar.
        callbacks: more callbacks for the Trainer.

    Returns:
        The content of `result.json`, one per seed.

    Raises:
        RefusedError: the settings are not valid; the message lists every problem.
        ValueError: the task has no training rows, or it, the model and the method do not fit.
        FileExistsError: the folder holds another run.
        TrainingDivergedError: the loss is not finite.
        OSError: a file could not be written. The files written before are complete.
    """
    arguments.check()
    several = len(arguments.seeds) > 1
    output = output_folder(arguments)
    if several and (output / "config.yaml").is_file():
        raise FileExistsError(f"{output} holds the run of one seed; choose another output folder for several seeds")
    results = []
    with joined():
        if (repository := arguments.push_to_hub) is not None:
            on_rank0(partial(create_repository, repository))
        for seed in arguments.seeds:
            single = copy.deepcopy(arguments)
            single.seeds = [seed]
            single.output = str(output / f"seed-{seed}" if several else output)
            folder = RunFolder(single.output)
            try:
                with writing(folder.path):
                    results.append(_train_one(single, folder, progress, callbacks))
            finally:
                folder.release()
            if repository is not None:
                on_rank0(partial(push, folder, repository))
    return results


def _train_one(
    arguments: RunArguments, folder: RunFolder, progress: bool, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any]:
    reporter = ProgressCallback(folder, show=progress)
    if (finished := on_rank0(lambda: _finished_result(folder, arguments))) is not None:
        reporter.say(f"{folder}: this run is finished; nothing to do")
        return finished
    inputs = load_inputs(arguments)
    checkpoint = on_rank0(lambda: _start(folder, inputs, arguments, reporter))
    if arguments.load_in_4bit and checkpoint is None and inputs.adapted.calibration is not None:
        calibrate_unquantized(arguments, folder, inputs)
    reporter.metric = inputs.task.main_metric
    measure = MeasureTraining()
    trainer = make_trainer(arguments, folder, inputs, [reporter, measure, *callbacks])
    with suppress_library_logs():
        before = _perplexity(trainer, inputs.unrelated)
        score_before = None if before is None else _score(trainer, inputs)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except OSError:
            if is_rank0():
                folder.drop_broken_checkpoints()  # the disk is full: the checkpoint being written is of no use
            raise
        finally:
            reporter.stop()
            measure.stop()
        parameter_counts = trainer.parameter_counts(inputs.adapted.targets)
        trainer.make_plain()
        scores, by_class = _final_scores(trainer, inputs)
        after = _perplexity(trainer, inputs.unrelated)

    def finish() -> dict[str, Any]:
        _save(trainer, arguments, inputs, folder, by_class)
        result = {
            **_describe(arguments, inputs, scores, trainer.state),
            "by_class": by_class,
            "doubts": [
                *label_doubts(inputs.task),
                *doubts(by_class, trainer.state.log_history, _label_variance(inputs)),
            ],
            "tokens": inputs.tokens,
            "score_before": score_before,
            "unrelated_perplexity": None if before is None else {"before": before, "after": after},
            "trained_entries": parameter_counts,
            "weights_bytes": sum(file.stat().st_size for file in folder.weights.glob("*.safetensors")),
            "calibration": folder.read_json("calibration.json"),
            "training": measure.phase.as_dict(),
            "resumed": checkpoint is not None,
            "config": arguments.as_dict(),
            "environment": folder.read_json("environment.json"),
        }
        adapter_config = getattr(trainer.model, "peft_config", {}).get("default")
        write_whole(folder.weights / "README.md", make_card(result, adapter_config))
        folder.write_json("result.json", result)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return folder.read_result()

    return on_rank0(finish)


def _finished_result(folder: RunFolder, arguments: RunArguments) -> dict[str, Any] | None:
    """The result of a finished run; None if it is still to be done. Checks that the run may use the folder."""
    folder.check(arguments)
    if not folder.finished:
        return None
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # left behind if the run was killed while it ended
    return folder.read_result()


def _start(folder: RunFolder, inputs: Inputs, arguments: RunArguments, reporter: ProgressCallback) -> Path | None:
    """Write the settings into the folder, now that the inputs were accepted. Returns the checkpoint to resume from."""
    folder.start(arguments)
    folder.write_json("environment.json", _described_environment(folder, inputs, arguments))
    return _find_checkpoint(folder, inputs, arguments, reporter)


def _described_environment(folder: RunFolder, inputs: Inputs, arguments: RunArguments) -> dict[str, Any]:
    """Machine, versions, seed and rows of the run; of a resumed run also the commits of its earlier parts.

    Raises:
        ValueError: the run began with other rows.
    """
    here = {**environment(), "seed": arguments.seeds[0], "rows_sha256": inputs.task.hashes()}
    before = folder.read_json("environment.json") or {}
    rows = before.get("rows_sha256")  # none in runs of earlier versions, which did not hash images
    if rows and rows != here["rows_sha256"]:
        different = [split for split, sha in here["rows_sha256"].items() if rows.get(split) != sha]
        raise ValueError(
            f"{folder}: the run began with other rows ({', '.join(different) or 'other splits'}); put the data back, "
            "or start a new run in another folder"
        )
    commits = [*before.get("earlier_commits", ()), before.get("commit")]
    here["earlier_commits"] = [commit for commit in dict.fromkeys(commits) if commit not in (None, here["commit"])]
    return here


def _find_checkpoint(
    folder: RunFolder, inputs: Inputs, arguments: RunArguments, reporter: ProgressCallback
) -> Path | None:
    """The checkpoint to resume from. Tells the user what is about to run."""
    skipped = folder.drop_broken_checkpoints()
    checkpoint = folder.last_checkpoint()
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in inputs.features.items())
    tokens = inputs.tokens
    counted = f"; {tokens['train']:,} tokens to train on, {tokens['learnt']:,} learnt" if tokens else ""
    reporter.say(
        f"{inputs.task.name} ({sizes} rows{counted}), "
        f"{arguments.method} on {arguments.model}, seed {arguments.seeds[0]}"
        f"{f', {process_count()} processes' if process_count() > 1 else ''}: {folder}"
    )
    if warning := slow_precision_warning(arguments.training.precision):
        reporter.say(warning)
    for doubt in label_doubts(inputs.task):
        reporter.say(f"check this run: {doubt}")
    if skipped:
        reporter.say(f"Skipped damaged checkpoints: {', '.join(skipped)}")
    if checkpoint is not None:
        reporter.say(f"Resuming from step {checkpoint.name.rpartition('-')[2]}")
    return checkpoint


def _final_scores(trainer: MethodTrainer, inputs: Inputs) -> tuple[dict[str, dict[str, float]], Any]:
    """Evaluate with the weights of the best evaluation, which the trainer has loaded.

    Returns:
        Split -> metric -> score; and `scores_by_class` of the scored split, None for a task without classes.
    """
    task, kind, scores, by_class = inputs.task, KINDS[inputs.task.kind], {}, None
    for split in task.evaluation_splits:
        found = trainer.predict(inputs.features[split], metric_key_prefix=split)
        scores[split] = _without_prefix(found.metrics, split)
        if split == task.scored_split:
            by_class = kind.score_by_class(task, found.predictions, found.label_ids)
    return scores, by_class


def _score(trainer: MethodTrainer, inputs: Inputs) -> float:
    """The score of the model as it is."""
    split = inputs.task.scored_split
    found = trainer.predict(inputs.features[split], metric_key_prefix=split).metrics
    return float(found[f"{split}_{inputs.task.main_metric}"])


def _perplexity(trainer: MethodTrainer, unrelated: Dataset | None) -> float | None:
    """Perplexity of the texts that are not trained on; None if there are none."""
    if unrelated is None:
        return None
    found = trainer.predict(unrelated, metric_key_prefix="unrelated").predictions
    return float(np.exp(found[:, 0].sum() / found[:, 1].sum()))


def _save(trainer: MethodTrainer, arguments: RunArguments, inputs: Inputs, folder: RunFolder, by_class: Any) -> None:
    """Write the weights, the tokenizer or image processor, the log and the plot."""
    task, log = inputs.task, trainer.state.log_history
    method = find_method(arguments.method)

    def save(path: Path) -> None:
        save_weights(trainer.model, path)
        set_base(path, hub_id(arguments.model))
        inputs.processor.save_pretrained(path)  # so that the folder can be used without the run

    save_whole(folder.path / method.leaves, save)
    save_whole(folder.path / KINDS[task.kind].processor_folder, lambda path: inputs.processor.save_pretrained(path))
    folder.write_json("metrics.json", log)
    title = f"{task.name}, {arguments.method}, seed {arguments.seeds[0]}"
    write_whole(folder.path / "curves.png", plot_curves(log, task.main_metric, title, by_class))


def save_weights(model: nn.Module, path: Path) -> None:
    """Write an adapter or a model as safetensors."""
    with suppress_library_logs():
        model.save_pretrained(path)  # type: ignore[operator]


def set_base(adapter: Path, base: str | None) -> None:
    """Name the pretrained model in an adapter's configuration, which PEFT gives the path on this machine."""
    path = adapter / "adapter_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")


def _describe(
    arguments: RunArguments, inputs: Inputs, scores: dict[str, dict[str, float]], state: Any
) -> dict[str, Any]:
    """The first part of `result.json`: what was trained, and how well."""
    task, log = inputs.task, state.log_history
    return {
        "task": task.name,
        "method": arguments.method,
        "model": arguments.model,
        "seed": arguments.seeds[0],
        "text": task.text,
        "labels": task.labels,
        "metrics": task.metrics,
        "rows": {split: len(rows) for split, rows in inputs.features.items()},
        "metric": task.main_metric,
        "score": scores[task.scored_split][task.main_metric],
        "selection_score": scores[task.evaluation_splits[0]][task.main_metric],
        "scores": scores,
        "steps": state.global_step,
        "evaluations": [
            {"step": entry["step"], **_without_prefix(entry, "eval")}
            for entry in log
            if f"eval_{task.main_metric}" in entry
        ],
        "best_step": state.best_global_step,
        "learning_rate": arguments.learning_rate,
        "training_loss_last_sixth": mean_loss(log, 5 / 6, 1),  # it varies less between seeds than a score
    }


def _label_variance(inputs: Inputs) -> float | None:
    """Variance of the labels of the rows that are evaluated during training, for regression."""
    if inputs.task.kind == LANGUAGE or inputs.task.labels is not None:
        return None
    return pvariance(inputs.features[inputs.task.evaluation_splits[0]]["labels"])


def _without_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Metrics under their plain names, without the Trainer's timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "epoch")
    plain = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if name not in timings}
