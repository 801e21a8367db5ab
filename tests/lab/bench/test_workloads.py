"""Batches of the benchmarks."""

from __future__ import annotations

import torch

from sparsegrad_lab.bench.workloads import find_workload


def test_padding_is_padding() -> None:
    batch = find_workload("bert-base-padded").batch(1024, 0, torch.device("cpu"))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (8, 128)
    assert (int(lengths.min()), int(lengths.max())) == (16, 128)
