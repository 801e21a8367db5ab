"""Bytes of each method, by hand and against the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
)

from helpers import state_bytes, tiny_model
from sparsegrad_lab.inspection.inspect import Inspection, inspect
from sparsegrad_peft import (
    Basis,
    SparseGradAdamW,
    param_groups,
    replace_linears,
)
from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.tuner.targets import TARGETS


def method(inspection: Inspection, key: str) -> Any:
    return next(row for row in inspection.methods if row.key == key)


def test_bytes_by_hand() -> None:
    """BERT-base with the defaults: 24 cores of 368 neurons x 64 directions of the hidden side."""
    inspection = inspect(BertConfig(), density=0.01)
    total, layers, entries = 109_482_240, 24 * 768 * 3072, 24 * 368 * 64
    # Projections for the hidden side and for the neurons, 1.985 times as wide as needed: 24 million numbers in all.
    # Layers of a role have the same random vectors.
    wider = 24e6 / (24 * 2 * (768 * (2 * 64 + 8) + 3072 * 32))
    left, right = int(wider * (2 * 64 + 8)), int(wider * 32)
    sums = 24 * 2 * 4 * (768 * left + 3072 * right) + 4 * (3072 * left + 768 * right)
    complete = 2 * 4 * (768**2 + 3072**2)
    bases = 24 * (2 * 64 * 768 + 4 * 368 + 4 * (368 + 64))  # directions, indices, scales
    k, k_complete = 24 * 235, 24 * 23592
    rank = 6
    assert [(g.r, g.c, g.k_per_layer) for g in inspection.groups] == [(368, 64, 235), (64, 368, 235)]
    assert (inspection.layers, inspection.entries, inspection.k, inspection.lora_rank) == (24, entries, k, rank)
    assert inspection.calibration_bytes == sums + 2 * 4 * 768 * 3072  # a gradient, and a copy of norm 1
    lora = rank * 24 * (768 + 3072)
    assert abs(lora - entries) <= 24 * (768 + 3072) / 2
    expected = {  # trained entries; bytes of weights, bases, gradients, optimizer at first and at most
        "full": (total, 4 * total, 0, 4 * total, 8 * total, 8 * total),
        "layers": (layers, 4 * total, 0, 4 * layers, 8 * layers, 8 * layers),
        "lora": (lora, 4 * (total + lora), 0, 4 * lora, 8 * lora, 8 * lora),
        "block": (entries, 4 * (total + entries), bases, 4 * entries, 8 * entries, 8 * entries),
        "topk": (entries, 4 * (total + entries), bases, 4 * entries, 12 * k, 12 * entries),
        "published": (layers, 4 * total, complete, 20 * k_complete, 12 * k_complete, 12 * layers),
        "published_plain": (layers, 4 * total, complete, 4 * layers, 12 * k_complete, 12 * layers),
    }
    assert [row.key for row in inspection.methods] == list(expected)
    for row in inspection.methods:
        found = (row.trained, row.weights_bytes, row.bases_bytes, row.gradients_bytes, row.optimizer_bytes_low,
                 row.optimizer_bytes_high)  # fmt: skip
        assert found == expected[row.key], row.key
        assert row.total_bytes_high == sum(found[1:4]) + found[5]


def test_frozen_weights_in_half_precision() -> None:
    wide, half = inspect(BertConfig()), inspect(BertConfig(), dtype=torch.bfloat16)
    layers = 24 * 768 * 3072
    assert half.dtype == "bfloat16"
    assert method(half, "full") == method(wide, "full")  # what trains is float32
    assert method(half, "layers").weights_bytes == 2 * (109_482_240 - layers) + 4 * layers
    assert method(half, "block").weights_bytes == 2 * 109_482_240 + 4 * half.entries
    assert method(half, "block").optimizer_bytes_high == method(wide, "block").optimizer_bytes_high
    assert half.calibration_bytes - wide.calibration_bytes == -2 * 768 * 3072  # the gradient
    assert (wide.calibration_copy_bytes, half.calibration_copy_bytes) == (4 * layers, 2 * layers)


def test_optimizer_state_is_what_the_optimizer_keeps() -> None:
    """The lower bound, against one step of `SparseGradAdamW` on a model with `replace_linears`."""
    model = tiny_model("bert")
    groups = group_linears(model, TARGETS["bert"])
    inspection = inspect(model, c="full", r="full", density=0.05)
    model.requires_grad_(False)
    replace_linears(model, groups, {name: Basis.identity() for name in groups})
    optimizer = SparseGradAdamW(param_groups(model, density=0.05))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert state_bytes(optimizer) == method(inspection, "topk").optimizer_bytes_low
