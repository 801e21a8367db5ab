"""Positions for the packed core: the entries with the most gradient energy, and training with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import check_equal, train
from sparsegrad_peft import (
    Basis,
    SparseGradAdamW,
    calibrate,
    group_linears,
    param_groups,
    replace_linears,
    select_positions,
)
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.refresh import renew_positions


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], dict[str, list[str]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6), nn.Linear(6, 1)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    batches = [(part, (part[:, :1] * part[:, 1:2])) for part in x.chunk(4)]
    return model, batches, group_linears(model, ["0", "2"])


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_positions_are_those_of_the_largest_sum_of_squares() -> None:
    model, batches, groups = problem()
    bases = calibrate(
        model, batches, groups=groups, loss_fn=loss_fn, n_steps=4, gram_dtype=torch.float64, progress=False
    ).bases(c=4, r=5, dtype=torch.float64)
    found = select_positions(model, groups, bases, batches, k=3, n_steps=4, loss_fn=loss_fn, progress=False)
    assert list(found) == ["0", "2"]
    for group, names in groups.items():
        for name in names:
            total = torch.zeros(5, 4, dtype=torch.float64)
            for batch in batches:
                (G,) = torch.autograd.grad(loss_fn(model, batch), model.get_parameter(f"{name}.weight"))
                total += bases[group].to_basis(G) ** 2
            expected = reference.topk_mask(total, 3).reshape(-1).nonzero().squeeze(1)
            assert found[name].dtype == torch.int32
            assert found[name].tolist() == expected.tolist()
    shares = select_positions(model, groups, bases, batches, density=0.5, n_steps=1, loss_fn=loss_fn, progress=False)
    assert {name: len(positions) for name, positions in shares.items()} == {"0": 10, "2": 10}


def test_bases_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a calibration with `gram_device="cpu"`; bases on `meta` stand for them, and a copy for moving them."""
    model, batches, groups = problem()
    bases = {
        group: Basis(torch.eye(model[int(names[0])].in_features), None).double() for group, names in groups.items()
    }
    options: dict[str, Any] = {"k": 3, "n_steps": 1, "loss_fn": loss_fn, "progress": False}
    expected = select_positions(model, groups, bases, batches, **options)
    away = {group: copy.deepcopy(basis).to("meta") for group, basis in bases.items()}
    there = {away[group]: bases[group] for group in groups}
    monkeypatch.setattr(Basis, "on_device", lambda basis, device: there[basis])
    check_equal(select_positions(model, groups, away, batches, **options), expected)


def test_training_packed_and_renewing_the_positions() -> None:
    """A packed adapter from start to end: choose, pack, train, choose again while keeping what was learnt, train on."""
    model, batches, groups = problem()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bases = {group: Basis.identity() for group in groups}
    chosen = select_positions(model, groups, bases, batches, k=8, n_steps=4, loss_fn=loss_fn, progress=False)
    layers = replace_linears(model, groups, bases)
    for name, layer in layers.items():
        layer.pack(chosen[name])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16
    optimizer = SparseGradAdamW(param_groups(model), lr=0.02)

    first = sum(train(model, optimizer, 5 * batches, loss_fn))
    outputs = model(batches[0][0])
    renewed = select_positions(model, groups, bases, batches, k=8, n_steps=4, loss_fn=loss_fn, progress=False)
    new = sum(renew_positions(layers[name], positions, optimizer) for name, positions in renewed.items())
    assert new > 0
    torch.testing.assert_close(model(batches[0][0]), outputs, rtol=1e-12, atol=1e-12)
    assert sum(train(model, optimizer, 5 * batches, loss_fn)) < first
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16


def test_errors() -> None:
    model, batches, groups = problem()
    with pytest.raises(ValueError, match=r"expected a basis for each group, found groups .* and bases"):
        select_positions(model, groups, {}, batches, k=3)
    bases = {group: Basis.identity() for group in groups}
    with pytest.raises(ValueError, match="k must be between 1 and the 60 entries there are, found 61"):
        select_positions(model, groups, bases, batches, k=61, loss_fn=loss_fn, progress=False)
    with pytest.raises(ValueError, match="expected exactly one of k"):
        select_positions(model, groups, bases, batches, loss_fn=loss_fn, progress=False)
