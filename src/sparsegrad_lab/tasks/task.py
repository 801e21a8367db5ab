"""The result of loading a task: data sets, columns, labels and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checksums import sha256_of
from .hold_out import split_apart

if TYPE_CHECKING:
    from datasets import Dataset

TEXT, LANGUAGE, IMAGES = "text classification", "causal language modelling", "image classification"
"""Kinds of task. Text regression belongs to the first kind."""

DEVELOPMENT = "development"
"""Evaluation split that selects the best evaluation, where another one is scored."""

LOSSES = ("loss", "perplexity")
"""Metrics for which lower is better."""


@dataclass(frozen=True)
class Task:
    """A loaded task.

    Attributes:
        name: such as "glue/rte".
        text: the input columns: one or two.
        labels: class names in the order of their numbers; None for regression and language modelling.
        metrics: names in `metrics.METRICS`.
        splits: "train" and evaluation splits ("validation", ...), with the columns of `text`, and with "label" except
            for language modelling.
        source: where the rows come from, for messages.
        kind: `TEXT`, `LANGUAGE` or `IMAGES`.
        apart: whether rows that share a text stay together where the evaluation rows are split once more.
        positive: the class that the metric "f1" scores; None: the last of `labels`.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    splits: Mapping[str, Dataset] = field(repr=False)
    source: str = ""
    kind: str = TEXT
    apart: bool = False
    positive: str | None = None

    @property
    def evaluation_splits(self) -> list[str]:
        """All splits except "train". The first one selects the best evaluation."""
        return [name for name in self.splits if name != "train"]

    @property
    def scored_split(self) -> str:
        """The evaluation split that gives a run its score."""
        return next(name for name in self.evaluation_splits if name != DEVELOPMENT)

    @property
    def main_metric(self) -> str:
        """The metric that selects the best evaluation."""
        return main_metric(self.metrics)

    @property
    def positive_number(self) -> int:
        """The number of the class that the metric "f1" scores; -1 without classes."""
        labels = self.labels or ()
        return labels.index(self.positive) if self.positive is not None else len(labels) - 1

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the rows of each split, in their order.

        In place of an image's path, a row has the path below `source` and the SHA-256 of the file.
        """
        found = {}
        for name, data in self.splits.items():
            digest = sha256()
            for batch in data.iter(batch_size=1000):
                if self.kind == IMAGES:
                    batch[self.text[0]] = [self._of_image(image) for image in batch[self.text[0]]]
                digest.update(json.dumps(batch, sort_keys=True).encode())
            found[name] = digest.hexdigest()
        return found

    def _of_image(self, image: Any) -> Any:
        if not isinstance(image, str):  # rows of grey values
            return image
        path = Path(image)
        return path.relative_to(self.source).as_posix(), sha256_of([path])

    def limited(self, train: int | None, validation: int | None) -> Task:
        """Return the task with at most so many rows per split: a random sample, the same in each run."""
        splits = {}
        for name, data in self.splits.items():
            limit = train if name == "train" else validation
            whole = limit is None or limit >= len(data)
            splits[name] = data if whole else data.shuffle(seed=0).select(range(limit))  # type: ignore[arg-type]
        return replace(self, splits=splits)

    def with_development_split(self, share: float) -> Task:
        """Return the task with a random share of the first evaluation split, the same in each run, as "development".

        Raises:
            ValueError: one of both parts would be empty.
        """
        name = self.evaluation_splits[0]
        rows = self.splits[name].shuffle(seed=0)
        if self.apart:
            scored, chosen = split_apart(rows, share, self.text, "data.development_share")
        else:
            count = round(share * len(rows))
            if not 0 < count < len(rows):
                raise ValueError(
                    f"data.development_share: expected rows to select and rows to score, found {len(rows)} rows in "
                    f"split {name} and a share of {share:g}"
                )
            scored, chosen = rows.select(range(count, len(rows))), rows.select(range(count))
        parts = {DEVELOPMENT: chosen, name: scored}
        others = {other: data for other, data in self.splits.items() if other not in ("train", name)}
        train = {"train": self.splits["train"]} if "train" in self.splits else {}
        return replace(self, splits={**train, **parts, **others})

    def with_label_order(self, labels: Sequence[str]) -> Task:
        """Return the task with its classes numbered in another order.

        Args:
            labels: the same class names in the new order; upper and lower case may differ.

        Returns:
            The renumbered task, with the task's own spelling of the names and the same `positive` class; the task
            itself if the names differ.
        """
        if self.labels is None:
            return self
        spelling = {name.casefold(): name for name in self.labels}
        order = [spelling.get(str(name).casefold()) for name in labels]
        if sorted(map(str, order)) != sorted(self.labels) or order == list(self.labels):
            return self
        number = [order.index(name) for name in self.labels]  # old number -> new number
        splits = {
            name: data.remove_columns("label").add_column("label", [number[old] for old in data["label"]])
            for name, data in self.splits.items()
        }
        positive = self.labels[self.positive_number]
        return replace(self, labels=tuple(map(str, order)), splits=splits, positive=positive)


def main_metric(metrics: Sequence[str]) -> str:
    """Return the metric that selects the best evaluation: the only one, the first loss, or else "combined_score"."""
    return metrics[0] if len(metrics) == 1 or not higher_is_better(metrics[0]) else "combined_score"


def higher_is_better(metric: str) -> bool:
    """Return False for losses."""
    return metric not in LOSSES


def display_name(metric: str) -> str:
    """Return the metric's name for tables and pictures."""
    return metric.replace("_", " ")
