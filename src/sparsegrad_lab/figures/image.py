"""A matrix as a small image of 8 bits a cell, for JSON: base64 text, and back."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

SIDE = 112
"""Largest number of cells on a side."""


def shrink(matrix: Tensor, how: str = "max", side: int = SIDE) -> Tensor:
    """A matrix in at most `side` x `side` cells, each the largest entry ("max") or the mean ("mean") of its block."""
    shape = (min(side, matrix.shape[0]), min(side, matrix.shape[1]))
    if shape == tuple(matrix.shape):
        return matrix
    pool = adaptive_max_pool2d if how == "max" else adaptive_avg_pool2d
    return pool(matrix[None, None], shape)[0, 0]


def encode(cells: Tensor, low: float, high: float) -> dict[str, Any]:
    """Cells (rows, columns) in 254 steps from `low` to `high`, clipped; what is not finite becomes an empty cell."""
    scaled = (cells.double() - low) / max(high - low, 1e-12) * 254 + 1
    levels = torch.where(cells.isfinite(), scaled.round().clamp(1, 255), 0).to(torch.uint8)
    return {
        "shape": list(cells.shape), "low": low, "high": high,
        "data": base64.b64encode(levels.cpu().numpy().tobytes()).decode(),
    }  # fmt: skip


def decode(image: dict[str, Any]) -> np.ma.MaskedArray[Any, Any]:
    """The cells again, empty ones masked."""
    levels = np.frombuffer(base64.b64decode(image["data"]), dtype=np.uint8).reshape(image["shape"])
    values = image["low"] + (levels.astype(float) - 1) / 254 * (image["high"] - image["low"])
    return np.ma.masked_array(values, levels == 0)


def log_pair(before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """Two matrices as images of `log10 |.|`, block maximum, on one scale; zeros are empty cells.

    The scale goes from the weakest hundredth of the cells to the strongest cell of both.
    """
    cells = [shrink(matrix.detach().abs().float()).log10() for matrix in (before, after)]
    both = torch.cat([image[image.isfinite()] for image in cells])
    low, high = (round(float(both.quantile(q)), 4) for q in (0.01, 1.0)) if len(both) else (-1.0, 0.0)
    return [encode(image, low, high) for image in cells]
