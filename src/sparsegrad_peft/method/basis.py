"""Basis(U, V): the two orthogonal bases of a group of layers, as one module that the layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .precision import without_autocast
from .products import chain
from .sizes import check_rows

ORTHOGONALITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest allowed entry of `|U Uᵀ - I|`: a few hundred roundings of the storage type."""


class Basis(nn.Module):
    """Two orthonormal bases, one direction per row, strongest first: `G_tilde = V G Uᵀ` (paper: preliminary phase).

    The layers of a group share the module, not its tensors: a tensor that is a buffer of two modules becomes two
    tensors at the first `.to()`, and a shared module stays one. The bases follow the model to other devices, but keep
    their data type when the model is cast (`.half()`, `.to(torch.bfloat16)`). Rounded after training, they would no
    longer be the bases that the core was trained in.

    Args:
        U: (c, in), the input side; c = in is a complete basis. None is the identity.
        V: (r, out), the output side, likewise.
        spectrum_in: gradient energy along the directions of the input side, descending; for inspection only.
        spectrum_out: the same for the output side.
        layers: names of the layers that the basis was calibrated on.

    Raises:
        ValueError: a side is not a matrix, has more rows than columns, is not finite, or is not orthonormal within
            `ORTHOGONALITY_TOLERANCE`.
    """

    U: Tensor | None
    V: Tensor | None
    spectrum_in: Tensor | None
    spectrum_out: Tensor | None

    def __init__(
        self,
        U: Float[Tensor, "c in"] | None,
        V: Float[Tensor, "r out"] | None,
        *,
        spectrum_in: Float[Tensor, " known_in"] | None = None,
        spectrum_out: Float[Tensor, " known_out"] | None = None,
        layers: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        for side, matrix in (("U", U), ("V", V)):
            if matrix is not None:
                check_orthonormal(matrix, side)
        # Rows are gathered, which is many times faster if they are contiguous.
        self.register_buffer("U", None if U is None else U.contiguous())
        self.register_buffer("V", None if V is None else V.contiguous())
        self.register_buffer("spectrum_in", spectrum_in, persistent=False)
        self.register_buffer("spectrum_out", spectrum_out, persistent=False)
        self.layers = layers

    @classmethod
    def identity(cls) -> Basis:
        """Return the original space, for layers of any shape. With it, SparseGrad's selection is MeProp's."""
        return cls(None, None)

    @classmethod
    def allocate(
        cls, *, r: int, c: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
    ) -> Basis:
        """Return a basis of zeros, to load numbers into."""
        basis = cls(None, None)
        basis.U, basis.V = torch.zeros(c, in_features, dtype=dtype), torch.zeros(r, out_features, dtype=dtype)
        return basis

    def to_basis(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "r c"]:
        """Return `V G Uᵀ`: a weight or gradient of the original space, in the basis."""
        U, V = self._sides(G.dtype)
        return chain(V, G, None if U is None else U.T)

    def from_basis(self, S: Float[Tensor, "r c"]) -> Float[Tensor, "out in"]:
        """Return `Vᵀ S U`, in the original space. The inverse of `to_basis` if both sides are complete."""
        U, V = self._sides(S.dtype)
        return chain(None if V is None else V.T, S, U)

    def _sides(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        return None if self.U is None else self.U.to(dtype), None if self.V is None else self.V.to(dtype)

    def core_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return (r, c) for a layer of this shape.

        Raises:
            ValueError: the basis is for layers of another shape.
        """
        found = (
            out_features if self.V is None else self.V.shape[1],
            in_features if self.U is None else self.U.shape[1],
        )
        if found != (out_features, in_features):
            raise ValueError(
                f"the basis is for layers with (out, in) = {found}, found a layer with ({out_features}, {in_features})"
                "; layers of different shapes need a basis each (see group_linears)"
            )
        return (
            out_features if self.V is None else self.V.shape[0],
            in_features if self.U is None else self.U.shape[0],
        )

    @property
    def is_complete(self) -> bool:
        """True if both sides span the whole space, so that a change of basis loses nothing."""
        return all(side is None or side.shape[0] == side.shape[1] for side in (self.U, self.V))

    def truncated(self, c: int | None = None, r: int | None = None) -> Basis:
        """Return a basis of the leading `c` rows of `U` and `r` rows of `V` (None keeps all)."""
        for what, side, count in (("c", self.U, c), ("r", self.V, r)):
            if count is not None and side is None:
                raise ValueError(f"{what}={count}: this side is the identity, which has no leading rows")
            if count is not None and side is not None:
                check_rows(count, side.shape[0], what)
        U = self.U if self.U is None or c is None else self.U[:c].clone()
        V = self.V if self.V is None or r is None else self.V[:r].clone()
        return Basis(U, V, spectrum_in=self.spectrum_in, spectrum_out=self.spectrum_out, layers=self.layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Basis:
        # Every cast and move of a module comes through here. Follow moves, ignore casts.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)
        return self

    def extra_repr(self) -> str:
        """Shapes of both sides, for `print(model)`."""
        sides: list[Any] = ["identity" if side is None else tuple(side.shape) for side in (self.U, self.V)]
        return f"U={sides[0]}, V={sides[1]}, layers={len(self.layers)}"


class HoldsBasis(nn.Module):
    """A layer with a `Basis` that other layers may use too.

    One of them registers the basis as its child and saves it with its state. The others only refer to it, so a state
    dict holds each basis once, as safetensors requires. Moving any of these layers moves the basis.
    """

    basis: Basis

    def hold_basis(self, basis: Basis, *, register: bool) -> None:
        """Use this basis from now on, as a registered child or only as a reference."""
        self._modules.pop("basis", None)
        self.__dict__.pop("basis", None)
        if register:
            self.basis = basis
        else:
            self.__dict__["basis"] = basis  # nn.Module.__setattr__ would register it

    @property
    def registers_basis(self) -> bool:
        """True if the basis is a registered child."""
        return "basis" in self._modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsBasis:
        super()._apply(fn, recurse)
        if recurse and not self.registers_basis:
            self.basis._apply(fn)
        return self


def check_orthonormal(matrix: Float[Tensor, "rows n"], side: str) -> None:
    """Raise unless the rows are orthonormal within `ORTHOGONALITY_TOLERANCE` of their data type."""
    shape = tuple(matrix.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= shape[1]:
        raise ValueError(
            f"{side}: expected a matrix with directions as rows, at most as many as columns, found shape {shape}"
        )
    tolerance = ORTHOGONALITY_TOLERANCE.get(matrix.dtype)
    if tolerance is None:
        raise TypeError(f"{side}: expected a floating point matrix, found {matrix.dtype}")
    accurate = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    with without_autocast(matrix.device):
        product = accurate @ accurate.T
    product.diagonal().sub_(1)
    error = float(product.abs().max())
    if not error <= tolerance:  # also true for NaN
        raise ValueError(
            f"{side}: rows are not orthonormal, the largest entry of |{side} {side}ᵀ - I| is {error:.3g} and may be "
            f"{tolerance:g} in {matrix.dtype}; if your directions are columns, pass the transpose"
        )
