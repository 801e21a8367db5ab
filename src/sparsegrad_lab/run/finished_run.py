"""A finished run, put to use: evaluate, predict, merge."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

import sparsegrad_peft.tuner  # noqa: F401  # registers the method, so that PEFT can load its adapters

from ..tasks.kinds import KINDS
from ..tasks.kinds.text import text_logits
from ..tasks.library_logs import suppress_library_logs
from ..tasks.load import load_task
from ..tasks.pretrained import load_config, model_path
from ..tasks.read import Row, read_rows
from ..tasks.registry import kind_of
from ..tasks.task import Task
from .base import load_model
from .folder import RunFolder, save_whole, write_whole
from .settings import RunArguments
from .train import save_weights


@dataclass
class Finished:
    """A run's model, with its adapter, its tokenizer (or what reads images) and its task, without rows."""

    folder: RunFolder
    config: dict[str, Any]
    task: Task
    model: nn.Module
    tokenizer: Any

    def logits(self, rows: Iterable[tuple[str, ...]]) -> np.ndarray[Any, Any]:
        """(rows, classes), for rows of one text or two."""
        return text_logits(self.model, self.tokenizer, list(rows), self.config["data"]["max_length"])

    @torch.inference_mode()
    def outputs(self, features: Dataset, arguments: RunArguments) -> np.ndarray[Any, Any]:
        """(rows, ...), what the kind of task keeps of the model's outputs; features: with "labels"."""
        kind = KINDS[self.task.kind]
        collate = kind.collator(self.tokenizer, arguments.padded_length)
        size = kind.evaluation_batch_size(arguments.training.batch_size)
        device = next(self.model.parameters()).device
        kept = []
        for start in range(0, len(features), size):
            rows = [features[row] for row in range(start, min(start + size, len(features)))]
            batch = {name: value.to(device) for name, value in collate(rows).items()}
            labels = batch.pop("labels")
            kept.append(kind.reduced(self.model(**batch).logits, labels).float().cpu())
        return torch.cat(kept).numpy()


def open_run(path: str | Path) -> Finished:
    """Load a finished run.

    Raises:
        FileNotFoundError: no run folder, a run that did not come to its end, or its pretrained model is gone.
    """
    folder, config, task = read_run(path)
    kind = KINDS[task.kind]
    tokenizer = kind.processor(folder.path / kind.processor_folder)
    adapter = folder.path / "adapter"
    if adapter.is_dir():
        load_config(model_path(config["model"]))  # whether there still is such a model, in plain words
        # The head's numbers are the adapter's; those of the new head that is made here are written over.
        base = load_model(config["model"], task, tokenizer)
        with suppress_library_logs():
            model: nn.Module = PeftModel.from_pretrained(base, str(adapter))
    else:
        model = load_model(config["model"], task, tokenizer, folder.path / "model")
    if torch.cuda.is_available():
        model.cuda()
    return Finished(folder, config, task, model.eval(), tokenizer)


def read_run(path: str | Path) -> tuple[RunFolder, dict[str, Any], Task]:
    """A finished run without its model: what was asked for, and the task, without rows.

    Raises:
        FileNotFoundError: no run folder, or a run that did not come to its end.
    """
    folder = RunFolder(path)
    config = folder.read_arguments()
    if not folder.finished:
        raise FileNotFoundError(
            f"{folder} holds a run that is not finished; go on with it by sparsegrad train "
            f"--config {folder.path / 'config.yaml'}"
        )
    result = folder.read_result()
    labels = None if result["labels"] is None else tuple(result["labels"])
    kind = kind_of(config["task"])
    return folder, config, Task(result["task"], tuple(result["text"]), labels, tuple(result["metrics"]), {}, kind=kind)


def evaluate(path: str | Path, split: str | None = None) -> dict[str, dict[str, float]]:
    """Scores of a finished run on its task's evaluation rows: split -> metric -> score.

    Raises:
        ValueError: the task has no such split; and what `open_run` raises.
    """
    _, config, learnt = read_run(path)
    arguments = RunArguments.from_dict(config)
    task = load_task(arguments.task, arguments.data)
    task = task.with_label_order(learnt.labels or ())
    if task.labels != learnt.labels:
        raise ValueError(
            f"{task.source}: expected the labels that the run learnt, {learnt.labels}; found {task.labels}"
        )
    if split is not None and split not in task.splits:
        raise ValueError(f"{task.name} has splits {', '.join(task.splits)}; found {split!r}")
    run, kind, scores = open_run(path), KINDS[task.kind], {}
    for name in [split] if split else task.evaluation_splits:
        with suppress_library_logs():
            features = kind.features(task, name, run.tokenizer, arguments.data)
            kind.check_features(features, run.model, run.tokenizer)
            scores[name] = kind.score(task, run.outputs(features, arguments), features["labels"][:])
    return scores


def predict(
    path: str | Path, file: str | Path | None = None, texts: Iterable[str] = (), *, max_new_tokens: int = 128
) -> list[dict[str, Any]]:
    """What a finished run says of new rows: their columns and "prediction"; of classes the probability of each as well.

    Args:
        path: the run.
        file: CSV, TSV, JSON or JSON lines with the task's text columns; for a language model, the first is enough.
        texts: rows in place of a file: one string per row, or two for tasks with two text columns.
        max_new_tokens: where a language model stops at the latest.

    Raises:
        ValueError: neither or both are given, a column is missing, a row has the wrong number of texts.
    """
    _, config, task = read_run(path)
    data = RunArguments.from_dict(config).data
    kind = KINDS[task.kind]
    columns, given = kind.prompt_columns(task), list(texts)
    if (file is None) == (not given):
        raise ValueError(f"expected either a file or texts, found {'both' if given else 'neither'}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if file is None:
        if len(given) % len(columns):
            raise ValueError(f"{task.name} takes two texts per row ({', '.join(columns)}), found {len(given)} texts")
        pairs = [given[start : start + len(columns)] for start in range(0, len(given), len(columns))]
        rows = [Row(zip(columns, texts, strict=True)) for texts in pairs]
    else:
        rows = read_rows(Path(file), quoting=data.quoting)
        kind.check_rows(task, rows, str(file))
    run = open_run(path)
    return kind.predict(run.model, run.tokenizer, run.task, rows, data, max_new_tokens)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Predictions as a CSV file."""
    buffer = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))  # objects of a JSON file may differ
    writer = csv.DictWriter(buffer, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def merge(path: str | Path) -> tuple[Path, bool]:
    """The model with what was learnt in its weights, as a plain `transformers` folder `merged/` of the run.

    Returns:
        The folder, and whether it was made now: False if it was there already.

    Raises:
        ValueError: the run has no adapter: its `model/` is already plain.
    """
    folder = RunFolder(path)
    folder.read_arguments()
    target = folder.path / "merged"
    if (target / "config.json").is_file():
        return target, False
    if (folder.path / "model").is_dir():
        raise ValueError(f"{folder} trained the weights themselves, there is nothing to merge: {folder.path / 'model'}")
    run = open_run(path)
    assert isinstance(run.model, PeftModel)
    plain = run.model.merge_and_unload(safe_merge=True)

    def save(draft: Path) -> None:
        save_weights(plain, draft)
        run.tokenizer.save_pretrained(draft)

    save_whole(target, save)
    return target, True
