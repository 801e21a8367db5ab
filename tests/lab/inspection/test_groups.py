"""Groups and trained entries are those of `group_linears` and of an adapter."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from peft import get_peft_model

from helpers import TINY_MODELS, tiny_batch, tiny_model
from sparsegrad_lab.inspection.inspect import inspect
from sparsegrad_peft import (
    SparseGradConfig,
    calibrate_adapter,
)
from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.tuner.layer import SparseGradLayer
from sparsegrad_peft.tuner.targets import TARGETS


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("shared", [True, False])
def test_groups_are_those_of_group_linears(kind: str, shared: bool) -> None:
    model = tiny_model(kind)
    groups = group_linears(model, TARGETS[kind])
    rows = inspect(model, shared=shared, c=0.25, r=0.5, density=0.1).groups
    assert [row.name for row in rows] == list(groups)
    for row, names in zip(rows, groups.values(), strict=True):
        assert row.layers == len(names)
        assert (row.out, row.in_) == linear_shape(model.get_submodule(names[0]), names[0])
        assert row.entries_per_layer == row.r * row.c
        assert row.entries == row.layers * row.r * row.c
    # Gram matrices for each group or each layer, by default beside the sum of each layer's gradients; float32.
    pairs = group_linears(model, TARGETS[kind], shared=shared)
    shapes = [linear_shape(model.get_submodule(names[0]), names[0]) for names in pairs.values()]
    assert sum(row.sums_bytes for row in rows) == sum(4 * (out**2 + in_**2) for out, in_ in shapes)
    of_layers = [linear_shape(model.get_submodule(name), name) for names in groups.values() for name in names]
    M = sum(out * in_ for out, in_ in of_layers)
    neurons_of_their_own = sum(max(shape) ** 2 - max(shape) for shape in shapes)
    grams = sum(out**2 + in_**2 for out, in_ in shapes) - (0 if shared else neurons_of_their_own)
    assert sum(row.sums_bytes for row in inspect(model, shared=shared).groups) == 4 * (M + grams)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["dense"]}, {"target_modules": "all-linear"}], ids=str)
def test_the_adapter_takes_the_same_layers(options: dict[str, Any]) -> None:
    inspection = inspect(tiny_model("bert"), **options, task_type="SEQ_CLS")
    adapted = get_peft_model(tiny_model("bert"), SparseGradConfig(task_type="SEQ_CLS", **options))
    names = [n for n, m in adapted.base_model.model.named_modules() if isinstance(m, SparseGradLayer)]
    roles = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    assert {group.name: group.layers for group in inspection.groups} == roles


@pytest.mark.parametrize("options", [{"trained_share": 0.1}, {"narrow": 4}, {"neurons": False}], ids=str)
def test_trained_entries_are_those_of_the_adapter(options: dict[str, Any]) -> None:
    adapted = get_peft_model(tiny_model("bert"), SparseGradConfig(**options))
    assert inspect(tiny_model("bert"), **options).entries == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("shared", [True, False])
def test_trained_entries_are_those_of_a_calibrated_adapter(shared: bool) -> None:
    inspection = inspect(tiny_model("bert"), c=0.5, r=0.25, shared=shared)
    adapted = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.25, shared=shared))
    assert inspection.entries == adapted.get_nb_trainable_parameters()[0]  # before calibration too
    calibration = calibrate_adapter(adapted, [tiny_batch("bert")], n_steps=2, progress=False)
    cores = [p for n, p in adapted.named_parameters() if "sparsegrad_S" in n]
    assert inspection.entries == sum(core.numel() for core in cores)
    grams = [gram for group in calibration.groups.values() for gram in (group.gram_in, group.gram_out)]
    held = sum(gram.numel() * gram.element_size() for gram in grams)
    assert held == sum(group.sums_bytes for group in inspection.groups)
    assert inspection.calibration_bytes == held + 2 * 32 * 16 * 4
    bases = [b for n, b in adapted.named_buffers() if n.endswith((".U", ".V"))]  # one module for all layers of a group
    assert sum(b.numel() * b.element_size() for b in bases) == sum(group.bases_bytes for group in inspection.groups)


def test_calibration_is_counted_for_the_default_form() -> None:
    inspection = inspect(tiny_model("bert"))
    adapted = get_peft_model(tiny_model("bert"), SparseGradConfig())
    calibration = calibrate_adapter(adapted, [tiny_batch("bert")], n_steps=2, progress=False)
    sums = [(group.gram_in, group.gram_out, *group.M.values()) for group in calibration.groups.values()]
    held = sum(tensor.numel() * tensor.element_size() for of_group in sums for tensor in of_group)
    assert held == sum(group.sums_bytes for group in inspection.groups)
