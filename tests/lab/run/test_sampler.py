"""Batches by length contain every row once and little padding, in an order set by seed and epoch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsegrad_lab.run.sampler import LengthSampler
from sparsegrad_lab.run.train import train


def padding(lengths: list[int], order: list[int], batch: int) -> int:
    rows = [[lengths[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    return sum(max(row) * len(row) - sum(row) for row in rows)


def test_order() -> None:
    lengths = random.Random(0).choices(range(5, 129), k=400)
    sampler, other = LengthSampler(16, lengths, seed=3), LengthSampler(16, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    assert list(other) == first == list(sampler)
    other.set_epoch(1)
    second = list(other)
    assert second != first
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert padding(lengths, first, 16) < 0.25 * padding(lengths, list(range(400)), 16)


class Seen(TrainerCallback):
    """Records the width of each training batch."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def look(module: Any, args: Any, options: dict[str, Any]) -> None:
            if module.training:
                self.widths.append(options["input_ids"].shape[1])

        model.register_forward_pre_hook(look, with_kwargs=True)


def test_a_run_has_narrower_batches(arguments: Callable[..., Any], tmp_path: Path) -> None:
    widths = {}
    for batches in ("random", "by_length"):
        seen = Seen()
        asked = arguments(tmp_path / batches, "--method", "lora", "--training.batch_size", "2",
                          "--training.epochs", "1", "--training.batches", batches)  # fmt: skip
        train(asked, progress=False, callbacks=[seen])
        widths[batches] = seen.widths
    assert len(widths["random"]) == len(widths["by_length"]) == 24
    assert sum(widths["by_length"]) < sum(widths["random"])
