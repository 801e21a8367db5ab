"""The layers that are measured."""

from __future__ import annotations

from sparsegrad_lab.figures.setup import evenly_spaced


def test_evenly_spaced() -> None:
    assert evenly_spaced(list("abc"), 6) == list("abc")
    assert evenly_spaced([str(n) for n in range(24)], 4) == ["0", "8", "15", "23"]
