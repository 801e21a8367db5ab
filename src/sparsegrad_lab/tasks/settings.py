"""Settings of the data. Docstrings under fields are the command's help; importing this module is cheap."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from .conversations import CONVERSATION_COLUMNS
from .labels import repeated_class
from .metrics import METRICS
from .registry import TASKS


@dataclass
class DataArguments:
    """Which rows a run trains and evaluates on."""

    folder: str | None = None
    """glue/*: folder with the official files (glue/RTE/train.tsv, ...). oasst1: folder with .jsonl files. Default of
    both: the folder in $SPARSEGRAD_DATA, else the Hugging Face hub. quora, paraphrases: folder with
    qqp/dev.tsv; default: $SPARSEGRAD_DATA. images: folder with train/CLASS/*.png and validation/CLASS/*.png"""
    train_file: str | None = None
    "files, text: CSV, TSV, JSON or JSON lines file with training rows"
    validation_file: str | None = None
    "files, text: file with evaluation rows and the same columns"
    text: list[str] = field(default_factory=list)
    """files: one or two text columns. text: one column of texts; or two, prompt and answer, with the loss on the
    answer; or one column named messages, conversations or conversation (OpenAI, TRL or ShareGPT format), with the loss
    on the assistant's messages"""
    label: str = "label"
    "files: the label column"
    labels: list[str] | None = None
    "files: class names in the order of their numbers; default: the sorted labels of the training rows"
    regression: bool = False
    "files: labels are numbers to predict"
    quoting: Literal["minimal", "none"] | None = None
    """files, text: "minimal": fields of CSV and TSV files may be in quotation marks; "none": quotation marks are text;
    default: minimal for CSV, none for TSV"""
    metrics: list[str] | None = None
    "scores to compute; their mean (or the only one) selects the best evaluation; default: the task's metrics"
    train_rows: int | None = None
    "train on a random sample of this size, the same in each run; default: all rows"
    validation_rows: int | None = None
    "evaluate on a random sample of this size; default: all rows"
    development_share: float | None = None
    """share of the evaluation rows, the same rows in each run, that selects the best evaluation; only the other rows
    are scored; default: all rows select and are scored"""
    val_size: float | None = None
    """evaluate on this share of the rows, the same rows in each run, and train on the others. files, text: a share of
    the training file and of each class, in place of a validation_file. oasst1: a share of the conversations of all
    files; without it, the files with "validation" in their names. glue/*, quora, paraphrases: a share of the
    evaluation rows, where rows that share a text stay together; the training file is not read"""
    max_length: int = 128
    "maximum number of tokens per row; longer rows are truncated"
    language: str | None = None
    "oasst1: skip messages in other languages, such as en; default: all languages"
    unrelated: str | None = None
    """language models: a file with one text per line, or "cola" (sentences of GLUE's CoLA), that is not trained on. Its
    perplexity before and after training, in the result, shows what the model forgot"""
    template: Literal["plain"] | None = None
    """language models: "plain": write conversations as Human: and Assistant: turns, and prompts and answers unchanged;
    default: the model's chat template if it has one"""

    packing: bool = False
    """language models: pack several short training rows into one of max_length tokens, which saves padding; attention
    does not cross between them"""

    def problems(self, task: str, *, files: bool = True, given: Collection[str] = ()) -> list[str]:
        """Return one sentence per setting that is not valid for a task.

        Args:
            task: name of the task.
            files: also check its files, see `file_problems`.
            given: dotted names of the settings that the command line names.
        """
        problems = []
        source = TASKS.get(task)
        if source is None:
            problems.append(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        else:
            problems += self._unread(task, given) + self._without_effect(task, given)
            missing = [f"data.{name}" for name in source.needs if not getattr(self, name)]
            if (
                "validation_file" in source.reads
                and not self.validation_file
                and not (self.train_file and self.val_size)
            ):
                missing.insert(0, "data.validation_file (or data.train_file and data.val_size)")
            if missing:
                problems.append(f"task {task} needs {', '.join(missing)}")
            elif self.validation_file and self.val_size:
                problems.append("data.validation_file and data.val_size exclude each other; give one")
            elif files:
                problems += self.file_problems(task)
        if files and self.unrelated not in (None, "cola") and not Path(str(self.unrelated)).is_file():
            problems.append(f"data.unrelated: expected a text file or cola, found no file {self.unrelated}")
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown:
            problems.append(f"data.metrics: expected some of {', '.join(METRICS)}; found {', '.join(unknown)}")
        if len(self.text) > 2:
            problems.append(f"data.text: expected one or two columns, found {len(self.text)}")
        if len(set(self.text)) < len(self.text) or (self.label in self.text and source is not None):
            problems.append(
                f"data.text: expected columns that differ from each other and from the label column {self.label!r}, "
                f"found {', '.join(self.text)}"
            )
        if self.regression and self.labels is not None:
            problems.append("data.labels: a task with data.regression has no classes; give one of the two")
        if self.labels is not None and len(self.labels) < 2:
            problems.append(f"data.labels: expected at least two classes, found {len(self.labels)}")
        if (repeated := repeated_class(self.labels or ())) is not None:
            problems.append(f"data.labels: expected different classes, found {repeated!r} twice")
        for name in ("development_share", "val_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                problems.append(f"data.{name} must be between 0 and 1, found {value:g}")
        for name in ("train_rows", "validation_rows", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"data.{name} must be at least 1, found {value}")
        return problems

    def file_problems(self, task: str) -> list[str]:
        """Return a sentence if files or columns of a task are missing, or if a label of task files is not valid."""
        try:
            TASKS[task].check(self)
        except (OSError, ValueError) as error:
            return [str(error)]
        return []

    def _unread(self, task: str, given: Collection[str]) -> list[str]:
        """Return a sentence per setting that is set and that only other tasks read; a file may hold `max_length`."""
        default, problems = DataArguments(), []
        for name in (setting.name for setting in fields(self)):
            readers = [other for other, source in TASKS.items() if name in source.settings]
            is_set = f"data.{name}" in given if name == "max_length" else getattr(self, name) != getattr(default, name)
            if readers and task not in readers and is_set:
                shown = ", ".join(dict.fromkeys(_family(other) for other in readers))
                problems.append(f"data.{name} is for {shown}; task {task} does not read it; leave it out")
        return problems

    def _without_effect(self, task: str, given: Collection[str]) -> list[str]:
        """Return a sentence per setting that the command line names and that does nothing for these files."""
        problems, paths = [], [path for path in (self.train_file, self.validation_file) if path is not None]
        if "data.quoting" in given and paths and not any(path.lower().endswith((".csv", ".tsv")) for path in paths):
            problems.append(f"data.quoting is for CSV and TSV files, found {', '.join(paths)}; leave it out")
        texts = task == "text" and len(self.text) == 1 and self.text[0] not in CONVERSATION_COLUMNS
        if "data.template" in given and texts:
            problems.append(
                f"data.template is for conversations, and for prompts and answers; found one column of texts, "
                f"{self.text[0]!r}; leave it out"
            )
        return problems


def _family(task: str) -> str:
    return "glue/*" if task.startswith("glue/") else task
