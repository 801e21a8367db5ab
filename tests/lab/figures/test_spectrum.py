"""Figure 4: spectra and cuts."""

from __future__ import annotations

from typing import Any

import pytest


def test_spectrum(data: dict[str, Any]) -> None:
    """Half of each side was asked for (c = r = 0.5)."""
    sides = data["spectrum"]
    assert [(side["role"], side["side"], side["size"], side["kept"]) for side in sides] == [
        ("up", "input", 16, 8), ("up", "output", 32, 16), ("down", "input", 32, 16), ("down", "output", 16, 8),
    ]  # fmt: skip
    for side in sides:
        assert side["at"].tolist() == list(range(1, side["size"] + 1))  # few enough for all
        assert side["each"].tolist() == sorted(side["each"], reverse=True)
        assert side["summed"][-1] == pytest.approx(1)
        assert sum(side["each"][: side["kept"]]) == pytest.approx(side["share_kept"], rel=1e-3)
        assert side["summed"][side["kept"] - 1] == pytest.approx(side["share_kept"], abs=1e-6)
