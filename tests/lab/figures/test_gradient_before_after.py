"""Figure 2: shares of energy agree with the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_gradient(data: dict[str, Any]) -> None:
    assert list(data["gradient"]) == ["up", "down"]
    for role, shape in (("up", (32, 16)), ("down", (16, 32))):
        layer = data["gradient"][role]
        assert layer["images"].shape == (2, *shape)
        for image, share in zip(layer["images"], layer["shares"], strict=True):
            # The share computed again from the logarithms in the image: 5 of 512 entries.
            squares = np.sort(100 ** image.astype(float).ravel())[::-1]
            assert squares[:5].sum() / squares.sum() == pytest.approx(share, abs=0.02)
