"""Matrices as small images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsegrad_lab.figures.cells import log_magnitude, pool_cells, share_of_cell
from sparsegrad_lab.figures.gradient_before_after import colour_range


def test_cells() -> None:
    matrix = torch.tensor([[100.0, -1.0], [0.0, 10.0]])
    assert np.nan_to_num(log_magnitude(matrix), nan=-9).tolist() == [[2, 0], [-9, 1]]
    assert colour_range(np.stack([log_magnitude(matrix)] * 2)) == (pytest.approx(0, abs=0.1), 2)
    zero = log_magnitude(torch.zeros(2, 2))
    assert np.isnan(zero).all()
    assert colour_range(zero) == (-1, 0)
    large = torch.zeros(8, 6)
    large[5, 1], large[0, 0] = 3.0, -7.0
    assert pool_cells(large, "max", 2).tolist() == [[0, 0], [3, 0]]
    twelfth = pytest.approx(1 / 12)
    assert pool_cells((large != 0).float(), "mean", 2).tolist() == [[twelfth, 0], [twelfth, 0]]
    assert np.nan_to_num(share_of_cell(large != 0), nan=-9).tolist()[0] == [1, -9, -9, -9, -9, -9]
