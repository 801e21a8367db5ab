"""Figure 5: shares of energy in several bases, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsegrad_lab.figures.ageing import energy_shares
from sparsegrad_lab.figures.collect import ORIGINAL
from sparsegrad_lab.figures.setup import AGEING_BATCHES, Setup
from sparsegrad_peft import Basis


def test_ageing(data: dict[str, Any]) -> None:
    found = data["ageing"]
    assert (found["half"], found["measured"], len(found["ways"])) == (2, 4, 5)
    steps = {point["step"]: set(point["shares"]) for point in found["points"]}
    renewed = "along a trajectory, shared, renewed at step 2"
    assert steps[0] == set(found["ways"]) - {renewed}
    assert steps[2] == steps[4] == set(found["ways"])
    assert data["calibrated"] == "along a trajectory, per layer"  # what a run with c and r does by default


def test_energy_shares_by_hand(setup: Setup) -> None:
    """The original space, and a basis that puts a gradient of rank 1 into one entry. The model is restored."""
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    name = setup.layers[0]
    setup.model.train()
    setup.model(**next(setup.batches(AGEING_BATCHES))).loss.backward()
    G = setup.weight(name).grad
    assert G is not None
    squares = G.square().flatten().sort(descending=True).values
    expected = float(squares[:5].sum() / squares.sum())  # 1 % of 512
    U, _, V = torch.linalg.svd(G)
    setup.model.zero_grad()
    rotated = Basis(V.contiguous(), U.T.contiguous())
    bases = {ORIGINAL: {name: Basis.identity()}, "svd": {name: rotated}}
    shares = energy_shares(setup, bases, 1, lambda *_: None)
    assert shares[ORIGINAL] == {"up": pytest.approx(expected, abs=1e-5)}
    diagonal = rotated.to_basis(G).diagonal().square()
    assert shares["svd"] == {"up": pytest.approx(float(diagonal[:5].sum() / squares.sum()), abs=1e-4)}
    assert all(torch.equal(value, before[key]) for key, value in setup.model.state_dict().items())
