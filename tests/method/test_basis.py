"""Basis: orthonormality is checked, layers share the module, and casts of the model leave its type alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, GramStatistics, SparseGradLinear
from sparsegrad_peft.method.basis import ORTHOGONALITY_TOLERANCE, check_orthonormal


def statistics(out: int = 6, in_: int = 9, dtype: torch.dtype = torch.float32, layers: int = 2) -> GramStatistics:
    names = tuple(f"layer.{i}" for i in range(layers))
    gram = GramStatistics("mlp", names, torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype))
    for G in torch.randn(12, out, in_, dtype=F64):
        gram.add(G)
    return gram


class TwoLayers(nn.Module):
    """A group of two layers with one basis, and another layer beside it."""

    def __init__(self, basis_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        basis = statistics().basis(c=5, r=4, dtype=basis_dtype)
        self.first, self.second = (
            SparseGradLinear.from_linear(nn.Linear(9, 6), basis) for _ in range(2)
        )  # fmt: skip
        self.other = nn.Linear(6, 2)


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """Turn off the test run's shape checks, so that the library's own messages are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# What is a basis


@pytest.mark.parametrize(("dtype", "tolerance"), list(ORTHOGONALITY_TOLERANCE.items()))
def test_orthonormal_within_the_types_tolerance(dtype: torch.dtype, tolerance: float) -> None:
    """Rounding an accurate basis to the type passes; an error of twice the tolerance is refused."""
    assert tolerance == {F64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for rows in (1, 40, 64):
        check_orthonormal(orthogonal(64, rows, dtype), "U")
    for row, column in ((1, 1), (1, 2)):  # a length that is not 1, an angle that is not right
        U = torch.eye(3, 4, dtype=F64)
        U[row, column] += 2 * tolerance if row != column else tolerance
        with pytest.raises(ValueError, match=r"U: rows are not orthonormal, the largest entry of \|U Uᵀ - I\| is .*"):
            Basis(U.to(dtype), None)
        U = torch.eye(3, 4, dtype=F64)
        U[row, column] += 0.7 * tolerance if row != column else 0.35 * tolerance
        Basis(U.to(dtype), None)


def test_not_orthonormal() -> None:
    """The message names the side, the error, the tolerance, and the usual reason."""
    with pytest.raises(
        ValueError,
        match=r"V: rows are not orthonormal, .* is 3 and may be 0\.0001 in torch\.float32; .*transpose",
    ):
        Basis(None, 2 * torch.eye(3))
    # Directions in columns, as linalg.svd gives U: not orthonormal by rows where it is truncated.
    with pytest.raises(ValueError, match=r"U: expected a matrix with directions as rows, .* found shape \(7, 3\)"):
        Basis(orthogonal(7)[:, :3], None)
    U = torch.eye(3)
    U[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"U: rows are not orthonormal, .* is nan"):
        Basis(U, None)


@pytest.mark.usefixtures("_shapes_unchecked")
@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (), (0, 4)])
def test_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"V: expected a matrix with directions as rows, at most as many as columns"):
        Basis(None, torch.ones(shape))


@pytest.mark.usefixtures("_shapes_unchecked")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_not_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"U: expected a floating point matrix, found {dtype}"):
        Basis(torch.eye(3).to(dtype), None)


def test_orthonormality_is_checked_in_full_precision() -> None:
    """Under autocast the check's own product would be rounded to bfloat16, and every basis refused."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Basis(orthogonal(64, 40, torch.float32), orthogonal(64))
        statistics().basis(c=5)


def test_rows_are_stored_one_after_the_other() -> None:
    """Selection gathers rows, which is many times faster if they are contiguous."""
    U, V = orthogonal(5).contiguous().T, orthogonal(7).contiguous().T[:3]
    assert not U.is_contiguous()
    basis = Basis(U, V)
    assert basis.U.is_contiguous()
    assert basis.V.is_contiguous()


# Into the basis and back


def test_there_and_back() -> None:
    basis = Basis(orthogonal(7), orthogonal(11))
    G = torch.randn(11, 7, dtype=F64)
    assert basis.is_complete
    torch.testing.assert_close(basis.to_basis(G), basis.V @ G @ basis.U.T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(basis.from_basis(basis.to_basis(G)), G, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(basis.to_basis(G).norm(), G.norm())  # nothing is lost


@pytest.mark.parametrize(("c", "r"), [(3, 5), (7, 5), (3, 11), (1, 1)])
def test_truncated_there_and_back_is_a_projection(c: int, r: int) -> None:
    basis = Basis(orthogonal(7, c), orthogonal(11, r))
    G, S = torch.randn(11, 7, dtype=F64), torch.randn(r, c, dtype=F64)
    assert not basis.is_complete
    torch.testing.assert_close(basis.to_basis(G), basis.V @ G @ basis.U.T, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(basis.from_basis(S), basis.V.T @ S @ basis.U, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(basis.to_basis(basis.from_basis(S)), S, rtol=1e-12, atol=1e-13)
    assert float(basis.to_basis(G).norm()) < float(G.norm())


def test_a_missing_side_is_the_identity() -> None:
    U, V = orthogonal(7, 3), orthogonal(11, 5)
    G = torch.randn(11, 7, dtype=F64)
    eye_in, eye_out = torch.eye(7, dtype=F64), torch.eye(11, dtype=F64)
    for basis, written_out in ((Basis(U, None), Basis(U, eye_out)), (Basis(None, V), Basis(eye_in, V))):
        torch.testing.assert_close(basis.to_basis(G), written_out.to_basis(G))
        S = basis.to_basis(G)
        torch.testing.assert_close(basis.from_basis(S), written_out.from_basis(S))
        assert basis.core_shape(11, 7) == written_out.core_shape(11, 7)
        assert not basis.is_complete
    assert Basis(orthogonal(7), None).is_complete


def test_identity() -> None:
    basis = Basis.identity()
    G = torch.randn(11, 7)
    assert torch.equal(basis.to_basis(G), G)
    assert torch.equal(basis.from_basis(G), G)
    assert basis.is_complete
    assert basis.core_shape(11, 7) == (11, 7)
    assert basis.core_shape(2, 3) == (2, 3)  # of layers of any shape
    assert not basis.state_dict()
    assert basis.to(F64) is basis


def test_core_shape() -> None:
    basis = Basis(orthogonal(7, 3), orthogonal(11, 5))
    assert basis.core_shape(11, 7) == (5, 3)
    for shape in ((7, 11), (11, 8), (12, 7)):
        with pytest.raises(
            ValueError,
            match=rf"layers with \(out, in\) = \(11, 7\), found a layer with \({shape[0]}, {shape[1]}\); .*each",
        ):
            basis.core_shape(*shape)
    with pytest.raises(ValueError, match=r"\(out, in\) = \(4, 7\), found a layer with \(4, 6\)"):
        Basis(orthogonal(7, 3), None).core_shape(4, 6)


# In a model: casts, moves, copies, checkpoints


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.empty(0, dtype=F64)),
        lambda m: m.half().double(),
    ],
    ids=["half", "bfloat16", "double", "float", "to bfloat16", "to cpu float16", "to like", "half double"],
)
@pytest.mark.parametrize("basis_dtype", [torch.float32, F64])
def test_casts_leave_the_basis(cast: Callable[[nn.Module], nn.Module], basis_dtype: torch.dtype) -> None:
    """A rounded basis would no longer be orthogonal. Layers beside it follow the cast."""
    model = TwoLayers(basis_dtype)
    before = {name: buffer.clone() for name, buffer in model.first.basis.named_buffers()}
    assert len(before) == 4
    cast(model)
    plain = cast(nn.Linear(2, 2))
    assert model.other.weight.dtype == model.first.weight.dtype == plain.weight.dtype
    for name, buffer in model.first.basis.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert model.first.basis is model.second.basis


def test_moves_are_followed() -> None:
    """Also with a cast in the same call. The device is `meta`, which every machine has."""
    for move in (lambda b: b.to("meta"), lambda b: b.to("meta", torch.bfloat16)):
        basis = move(statistics().basis(c=5, r=4))
        assert {(str(b.device), b.dtype) for b in basis.buffers()} == {("meta", torch.float32)}


@pytest.mark.parametrize(
    "work",
    [
        lambda m: m.to(F64),
        lambda m: m.half(),
        copy.deepcopy,
        lambda m: copy.deepcopy(m.to(F64)),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
    ids=["to", "half", "deepcopy", "to and deepcopy", "to_empty"],
)
def test_layers_go_on_sharing(work: Callable[[nn.Module], Any]) -> None:
    model = work(TwoLayers())
    assert model.first.basis is model.second.basis
    assert model.first.basis.U.data_ptr() == model.second.basis.U.data_ptr()
    assert len({b.untyped_storage().data_ptr() for b in model.buffers()}) == 4  # U, V and two spectra, once


def test_copies_are_of_their_own() -> None:
    model = TwoLayers()
    twin = copy.deepcopy(model)
    assert twin.first.basis is not model.first.basis
    assert twin.first.basis.U.data_ptr() != model.first.basis.U.data_ptr()
    assert twin.first.basis.layers == model.first.basis.layers
    assert torch.equal(twin.first.basis.U, model.first.basis.U)


def test_state_dict() -> None:
    """The directions are saved, the spectra are not. Loading fills the one shared basis."""
    model, twin = TwoLayers(), TwoLayers()
    assert not torch.equal(model.first.basis.U, twin.first.basis.U)
    state = model.state_dict()
    assert {name.split("basis.")[-1] for name in state if "basis" in name} == {"U", "V"}
    twin.load_state_dict(state)
    assert torch.equal(twin.first.basis.U, model.first.basis.U)
    assert torch.equal(twin.second.basis.V, model.second.basis.V)
    assert twin.first.basis is twin.second.basis
    x = torch.randn(3, 9)
    assert torch.equal(model.second(x), twin.second(x))


def test_a_basis_is_not_trained() -> None:
    model = TwoLayers()
    assert not list(model.first.basis.parameters())
    assert all(not buffer.requires_grad for buffer in model.first.basis.buffers())


def test_printed() -> None:
    basis = Basis(orthogonal(7, 3), None, layers=("a", "b"))
    assert basis.extra_repr() == "U=(3, 7), V=identity, layers=2"
    assert repr(basis) == "Basis(U=(3, 7), V=identity, layers=2)"
    assert Basis.identity().extra_repr() == "U=identity, V=identity, layers=0"


def test_room_for_scales_is_float32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        basis = Basis.allocate(r=2, c=3, out_features=4, in_features=5, scales=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [scale.dtype for scale in basis.scales if scale is not None] == [torch.float32] * 2


def test_an_infinite_scale_is_counted() -> None:
    with pytest.raises(ValueError, match="expected positive, finite numbers, found 1 others"):
        Basis(torch.eye(2), torch.eye(2), scale_in=torch.tensor([1.0, torch.inf]))
