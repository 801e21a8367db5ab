"""Matrices as small images: each cell stands for a block of entries."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

SIDE = 112
"Largest number of cells along a side."


def pool_cells(matrix: Tensor, how: str, side: int = SIDE) -> Tensor:
    """Reduce a matrix to at most `side` x `side` cells: the "max" or the "mean" of each block of entries."""
    shape = (min(side, matrix.shape[0]), min(side, matrix.shape[1]))
    if shape == tuple(matrix.shape):
        return matrix
    pool = adaptive_max_pool2d if how == "max" else adaptive_avg_pool2d
    return pool(matrix[None, None], shape)[0, 0]


def log_magnitude(matrix: Tensor) -> np.ndarray[Any, Any]:
    """Return log10 of the largest magnitude in each cell; NaN where every entry is exactly zero."""
    cells = pool_cells(matrix.detach().abs().float(), "max").log10()
    return as_image(cells, cells.isfinite())


def share_of_cell(mask: Tensor) -> np.ndarray[Any, Any]:
    """Return the share of entries in each cell that are True; NaN where none is."""
    cells = pool_cells(mask.float(), "mean")
    return as_image(cells, cells > 0)


def as_image(cells: Tensor, filled: Tensor) -> np.ndarray[Any, Any]:
    """Return float16 cells, NaN where `filled` is False."""
    return cells.where(filled, float("nan")).cpu().numpy().astype(np.float16)
