"""Bases without calibration: orthonormal in every type, the same each time, and cheap."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_peft.method.data_free import data_free_basis, data_free_rows, is_data_free

SIZES = [(1, 1), (1, 7), (3, 7), (6, 7), (7, 7), (20, 64), (304, 3072)]


@pytest.mark.parametrize(("rows", "n"), [size for size in SIZES if size[0] < size[1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_orthonormal_and_use_every_column(rows: int, n: int, dtype: torch.dtype) -> None:
    matrix = data_free_rows(rows, n, dtype)
    assert matrix is not None
    assert matrix.shape == (rows, n)
    assert matrix.dtype == dtype
    assert ((matrix != 0).sum(0) == 1).all()
    product = matrix.double() @ matrix.double().T
    torch.testing.assert_close(product, torch.eye(rows, dtype=torch.float64), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_the_same_rows_each_time(rows: int, n: int) -> None:
    torch.manual_seed(1)
    first = data_free_rows(rows, n)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with torch.device("meta"):
        second = data_free_rows(rows, n)
    assert torch.equal(torch.get_rng_state(), state)
    assert is_data_free(first, n)
    if rows == n:
        assert first is second is None
    else:
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
        assert not is_data_free(first.roll(1, 1), n)


def test_energy_of_a_random_gradient() -> None:
    torch.manual_seed(0)
    basis, G = data_free_basis(r=16, c=32, out_features=64, in_features=128), torch.randn(64, 128)
    share = float(basis.to_basis(G).square().sum() / G.square().sum())
    assert abs(share - 16 / 64 * 32 / 128) < 0.02


@pytest.mark.parametrize("rows", [0, 8])
def test_too_few_or_too_many_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=f"expected between 1 and 7 rows, found {rows}"):
        data_free_rows(rows, 7)
