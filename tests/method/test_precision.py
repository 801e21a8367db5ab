"""Products of float32 are exact where bases are made, checked and changed, whatever the caller allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from helpers import TF32, max_difference, orthogonal
from sparsegrad_peft import Basis, SparseGradLinear, refresh
from sparsegrad_peft.method.basis import check_orthonormal
from sparsegrad_peft.method.hosvd import eigenbasis
from sparsegrad_peft.method.precision import exact_products

MATMUL = torch.backends.cuda.matmul
CPU = torch.device("cpu")


def by_matmul() -> None:
    MATMUL.fp32_precision = "tf32"


def by_the_older_function() -> None:
    torch.set_float32_matmul_precision("high")


def for_everything() -> None:
    torch.backends.fp32_precision = "tf32"


HOW = pytest.mark.parametrize("allow", [by_matmul, by_the_older_function, for_everything])


@pytest.fixture
def _settings_of_float32() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_settings_of_float32")
@HOW
def test_tf32_is_off_within_and_as_before_afterwards(allow: Callable[[], None]) -> None:
    allow()
    with exact_products(CPU):
        assert MATMUL.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == "tf32"
    if allow is by_the_older_function:
        assert torch.get_float32_matmul_precision() == "high"
    if allow is for_everything:  # not made a setting of its own
        torch.backends.fp32_precision = "ieee"
        assert MATMUL.fp32_precision == "ieee"


def test_the_older_functions_still_answer() -> None:
    before = torch.get_float32_matmul_precision()
    with exact_products(CPU):
        pass
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.usefixtures("_settings_of_float32")
@HOW
def test_bases_are_made_checked_and_changed_in_float32(allow: Callable[[], None]) -> None:
    """They were refused as not orthonormal, and a refresh rounded what was learnt."""
    U, directions = orthogonal(40, dtype=torch.float32), orthogonal(1024)
    gram = ((directions * torch.arange(1, 1025) ** -2.0) @ directions.T).float()
    layer = SparseGradLinear.from_linear(nn.Linear(40, 40), Basis(U, U))
    torch.nn.init.normal_(layer.core)
    learnt = layer.delta_weight()
    allow()
    with TF32():
        assert max_difference(U @ U.T, torch.eye(40)) > 1e-4
        check_orthonormal(U, "U")
        check_orthonormal(eigenbasis(gram, 8).vectors, "U")
        refresh([layer], Basis(orthogonal(40, dtype=torch.float32), None))
    assert max_difference(layer.delta_weight(), learnt) < 1e-5
