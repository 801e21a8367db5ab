"""Figure 4: spectra and cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.figures.collect import collect
from sparsegrad_lab.figures.settings import FiguresArguments
from sparsegrad_lab.figures.spectrum import DIRECTIONS, NEURONS, draw
from sparsegrad_lab.run.settings import RunArguments


def test_spectrum(data: dict[str, Any]) -> None:
    """Half of each side was asked for (c = r = 0.5)."""
    sides = data["spectrum"]
    assert [(side["role"], side["side"], side["size"], side["kept"]) for side in sides] == [
        ("up", "input", 16, 8), ("up", "output", 32, 16), ("down", "input", 32, 16), ("down", "output", 16, 8),
    ]  # fmt: skip
    assert {side["kind"] for side in sides} == {DIRECTIONS}
    for side in sides:
        assert side["at"].tolist() == list(range(1, side["size"] + 1))  # few enough for all
        assert side["each"].tolist() == sorted(side["each"], reverse=True)
        assert side["summed"][-1] == pytest.approx(1)
        assert sum(side["each"][: side["kept"]]) == pytest.approx(side["share_kept"], rel=1e-3)
        assert side["summed"][side["kept"] - 1] == pytest.approx(side["share_kept"], abs=1e-6)


def test_the_wide_side_of_the_default_form_has_neurons(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Its curve is the energy of the neurons, so it lies below that of the directions of the same side."""
    short = FiguresArguments(steps=2, points=2, batches=1)
    kinds, summed = {}, {}
    for neurons in (True, False):
        run = arguments(tmp_path / "out", "--adapter.c", "null", "--adapter.r", "null", "--adapter.wide", "4")
        run.adapter.narrow, run.adapter.neurons = 4, neurons
        data = collect(run, short, progress=False)
        kinds[neurons] = {(side["role"], side["side"]): side["kind"] for side in data["spectrum"]}
        summed[neurons] = {(side["role"], side["side"]): side["summed"][3] for side in data["spectrum"]}
        drawing = draw(data)
        assert ("up, output: 4 of 32 neurons" in drawing.alt.replace("intermediate.dense", "up")) == neurons
    wide = [("up", "output"), ("down", "input")]
    assert [kinds[True][side] for side in wide] == [NEURONS, NEURONS]
    assert [kinds[True][side] for side in (("up", "input"), ("down", "output"))] == [DIRECTIONS, DIRECTIONS]
    assert set(kinds[False].values()) == {DIRECTIONS}
    assert all(0 < summed[True][side] < summed[False][side] for side in wide)
