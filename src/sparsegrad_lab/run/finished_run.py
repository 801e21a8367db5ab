"""Use a finished run: evaluate, predict, merge."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

import sparsegrad_peft.tuner  # noqa: F401  # registers SparseGrad, so that PEFT can load its adapters

from ..tasks.kinds import KINDS
from ..tasks.kinds.packing import prepare_model
from ..tasks.kinds.text import text_logits
from ..tasks.library_logs import suppress_library_logs
from ..tasks.load import load_task
from ..tasks.model_folder import model_path
from ..tasks.pretrained import first_line, load_config
from ..tasks.read import Row, read_rows
from ..tasks.registry import kind_of
from ..tasks.task import LANGUAGE, LOSSES, Task
from .adapter_files import check_adapter
from .folder import RunFolder
from .inputs import compute_type, frozen_type, longest_first, unrelated_features
from .interrupts import interrupts_kept
from .parsing import arguments_of
from .settings import RunArguments
from .train import save_weights
from .whole_files import save_whole, write_whole

logger = logging.getLogger(__name__)


@dataclass
class FinishedRun:
    """Model with its adapter, tokenizer or image processor, and task (without rows) of a finished run."""

    folder: RunFolder
    arguments: RunArguments
    task: Task
    model: nn.Module
    processor: Any

    def logits(self, rows: Iterable[tuple[str, ...]]) -> np.ndarray[Any, Any]:
        """Logits (rows, classes) for rows of one or two texts."""
        return text_logits(self.model, self.processor, list(rows), self.arguments.data.max_length)

    @torch.inference_mode()
    def outputs(self, features: Dataset, arguments: RunArguments) -> np.ndarray[Any, Any]:
        """Outputs (rows, ...) for features with "labels", as `Kind.reduced` keeps them, in the run's precision."""
        kind = KINDS[self.task.kind]
        collate = kind.collator(self.processor, arguments.padded_length)
        size = kind.evaluation_batch_size(arguments.training.batch_size)
        device = next(self.model.parameters()).device
        kept = []
        for start in range(0, len(features), size):
            rows = [features[row] for row in range(start, min(start + size, len(features)))]
            batch = {name: value.to(device) for name, value in collate(rows).items()}
            labels = batch.pop("labels")
            with _precision(arguments, device):
                logits = self.model(**batch).logits
            kept.append(kind.reduced(logits, labels).float().cpu())
        return torch.cat(kept).numpy()


def _precision(arguments: RunArguments, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as in training. A CPU computes runs of fp16 in float32."""
    dtype = compute_type(arguments)
    if dtype == torch.float32 or (dtype == torch.float16 and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype)


def open_run(path: str | Path, *, unquantized: bool = False) -> FinishedRun:
    """Load a finished run.

    Args:
        path: folder of the run.
        unquantized: load the weights of the base in float32, also those that the run had in 4 or 16 bits.

    Raises:
        FileNotFoundError: this is not the folder of a finished run, or its pretrained model is gone.
    """
    folder, arguments, task = read_run(path)
    kind = KINDS[task.kind]
    processor = kind.processor(folder.path / kind.processor_folder)
    adapter = folder.path / "adapter"
    if adapter.is_dir():
        load_config(model_path(arguments.model))  # a clear error if the pretrained model is gone
        compute = compute_type(arguments) if arguments.load_in_4bit and not unquantized else None
        # The adapter overwrites the new head.
        dtype = torch.float32 if unquantized else frozen_type(arguments)
        base = kind.load_model(arguments.model, task, processor, four_bits=compute, dtype=dtype)
        model = load_adapter(base, adapter)
    else:
        model = kind.load_model(arguments.model, task, processor, folder.path / "model")
    if torch.cuda.is_available():
        model.cuda()
    return FinishedRun(folder, arguments, task, model.eval(), processor)


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Load an adapter onto its base model.

    Raises:
        FileNotFoundError, ValueError: see `check_adapter`.
    """
    whole = getattr(check_adapter(folder), "modules_to_save", None) or ()
    for name, module in base.named_modules():
        if any(name == one or name.endswith(f".{one}") for one in whole):
            module.float()  # they were trained in float32, and PEFT would round them to the base's type
    try:
        with suppress_library_logs():
            return cast(nn.Module, PeftModel.from_pretrained(base, str(folder)))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: the adapter cannot be loaded; adapter_model.safetensors or adapter_config.json is damaged, or "
            f"they do not belong together ({type(error).__name__}: {first_line(error)})"
        ) from error


def read_run(path: str | Path) -> tuple[RunFolder, RunArguments, Task]:
    """Read a finished run without its model: folder, settings, and the task without rows.

    Raises:
        FileNotFoundError: this is not a run folder, or the run is not finished.
    """
    folder = RunFolder(path)
    folder.check_finished()
    arguments = arguments_of(folder)
    result = folder.read_result()
    labels = None if result["labels"] is None else tuple(result["labels"])
    kind = kind_of(arguments.task)
    task = Task(result["task"], tuple(result["text"]), labels, tuple(result["metrics"]), {}, kind=kind)
    return folder, arguments, task


def evaluate(path: str | Path, split: str | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate a finished run on its task.

    Args:
        path: folder of the run.
        split: the split; None: all except "train".

    Returns:
        Split -> metric -> score. Of a task with classes also "classes" and "confusion", see `scores_by_class`. With
        `data.unrelated`, "unrelated" too: the scores of these texts.

    Raises:
        ValueError: the task has no such split, or other labels than the run was trained with; or the rows have changed,
            and `data.val_size` held some of them out.
        FileNotFoundError: see `open_run`.
    """
    folder, arguments, trained = read_run(path)
    task = load_task(arguments.task, arguments.data).with_label_order(trained.labels or ())
    if task.labels != trained.labels:
        raise ValueError(
            f"{task.source}: expected the labels that the run was trained with, {trained.labels}; found {task.labels}"
        )
    if split is not None and split not in task.splits:
        raise ValueError(f"{task.name} has splits {', '.join(task.splits)}; found {split!r}")
    names = [split] if split else task.evaluation_splits
    _check_rows(folder, arguments, task, names)
    run, kind = open_run(path), KINDS[task.kind]
    scores: dict[str, dict[str, Any]] = {}
    for name in names:
        with suppress_library_logs(), interrupts_kept():
            features = longest_first(kind.features(task, name, run.processor, arguments.data))
            if "position_ids" in features.column_names:
                prepare_model(run.model, features["input_ids"][0])
            kind.check_features(features, run.model, run.processor)
            outputs, labels = run.outputs(features, arguments), features["labels"][:]
            scores[name] = {
                **kind.score(task, outputs, labels), **(kind.score_by_class(task, outputs, labels) or {})
            }  # fmt: skip
    if split is None and (unrelated := unrelated_features(arguments, run.processor)) is not None:
        scores["unrelated"] = kind.score(
            replace(task, metrics=LOSSES), run.outputs(unrelated, arguments), unrelated["labels"][:]
        )
    return scores


def _check_rows(folder: RunFolder, arguments: RunArguments, task: Task, names: Sequence[str]) -> None:
    """Compare the rows to evaluate with those of the run; a run of an earlier version does not name its rows.

    Raises:
        ValueError: they differ, and the run may have trained on some of them: `data.val_size` divides changed rows in
            another way.
    """
    there = (folder.read_result().get("environment") or {}).get("rows_sha256") or {}
    here = task.hashes()
    changed = [name for name in names if name in there and there[name] != here[name]]
    divided = arguments.data.val_size is not None
    if changed and divided:
        raise ValueError(
            f"{folder}: the rows of {task.source} have changed since the run ({', '.join(changed)}), and data.val_size "
            "divides them in another way: the run has trained on rows that would be evaluated. Put the data back, or "
            "write the rows to evaluate into a file and use sparsegrad predict"
        )
    if changed:
        logger.warning("%s: the rows have changed since the run: %s", folder, ", ".join(changed))
    elif divided and not there:
        logger.warning(
            "%s: the run does not say which rows it has trained on. If they have changed since, or this version "
            "divides them in another way (data.val_size), some of them are evaluated here", folder,
        )  # fmt: skip


def predict(
    path: str | Path, file: str | Path | None = None, texts: Iterable[str] = (), *, max_new_tokens: int | None = None
) -> list[dict[str, Any]]:
    """Predict with a finished run.

    Args:
        path: folder of the run.
        file: CSV, TSV, JSON or JSON lines with the task's text columns; a language model needs only the first one.
        texts: rows in place of a file: one text per row, or two for tasks with two text columns.
        max_new_tokens: largest number of tokens that a language model generates. None: 128.

    Returns:
        The rows with their columns and "prediction"; for classes, the probability of each as well.

    Raises:
        ValueError: not exactly one of `file` and `texts` is given, a column is missing, or a row has the wrong number
            of texts.
        FileNotFoundError: see `open_run`.
    """
    _, arguments, task = read_run(path)
    kind = KINDS[task.kind]
    columns, given = kind.prompt_columns(task), list(texts)
    if (file is None) == (not given):
        raise ValueError(f"expected either a file or texts, found {'both' if given else 'neither'}")
    if max_new_tokens is not None and task.kind != LANGUAGE:
        raise ValueError(f"max_new_tokens is for language models; the run's task is {task.name}; leave it out")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if file is None:
        if len(given) % len(columns):
            raise ValueError(f"{task.name} takes two texts per row ({', '.join(columns)}), found {len(given)} texts")
        starts = range(0, len(given), len(columns))
        rows = [Row(zip(columns, given[start : start + len(columns)], strict=True)) for start in starts]
    else:
        rows = read_rows(Path(file), quoting=arguments.data.quoting)
        kind.check_rows(task, rows, str(file))
        written = {"prediction", *(f"p({name})" for name in task.labels or ())}
        if taken := sorted(written & {name for row in rows for name in row}):
            raise ValueError(f"{file}: found a column {taken[0]!r}, which predictions would replace; rename it")
    run = open_run(path)
    with _precision(arguments, next(run.model.parameters()).device):
        return kind.predict(run.model, run.processor, task, rows, arguments.data, max_new_tokens or 128)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write predictions as a CSV file."""
    buffer = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))  # objects of a JSON file may differ
    writer = csv.DictWriter(buffer, fieldnames=names)
    writer.writeheader()
    writer.writerows({name: _as_cell(value) for name, value in row.items()} for row in rows)
    write_whole(path, buffer.getvalue())


def _as_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def merge(path: str | Path) -> tuple[Path, bool]:
    """Write the model with the adapter merged into its weights, as a plain transformers folder `merged/` in the run.

    The adapter of a 4-bit base is merged into the unquantized weights: 4 bits would lose most of the update.

    Returns:
        The folder, and True if it was written now, False if it was there before and is not older than the
        adapter.

    Raises:
        ValueError: the run has no adapter; its `model/` is plain already.
        FileNotFoundError: see `open_run`.
    """
    folder = RunFolder(path)
    folder.read_arguments()
    target = folder.path / "merged"
    if _is_up_to_date(target / "config.json", folder.path / "adapter" / "adapter_model.safetensors"):
        return target, False
    if (folder.path / "model").is_dir():
        raise ValueError(f"{folder} has no adapter to merge; {folder.path / 'model'} is a plain model already")
    run = open_run(path, unquantized=True)
    assert isinstance(run.model, PeftModel)
    merged_model = run.model.merge_and_unload(safe_merge=True)

    def save(draft: Path) -> None:
        save_weights(merged_model, draft)
        run.processor.save_pretrained(draft)

    save_whole(target, save)
    return target, True


def _is_up_to_date(file: Path, source: Path) -> bool:
    return file.is_file() and (not source.is_file() or file.stat().st_mtime_ns >= source.stat().st_mtime_ns)
