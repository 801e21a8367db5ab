"""Basis(U, V): the two orthogonal bases of a group of layers, as one module that the layers share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .hosvd import Eigenbasis, eigenbasis
from .products import chain
from .sizes import Rows, check_rows
from .sketch import eigenbasis_of_sketch

if TYPE_CHECKING:
    from .calibrate import GramStatistics

logger = logging.getLogger(__name__)

ORTHOGONALITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest allowed entry of `|U Uᵀ - I|`: a few hundred roundings of the storage type."""


class Basis(nn.Module):
    """Two orthonormal bases, a direction a row, strongest first: `G_tilde = V G Uᵀ` (paper: preliminary phase).

    Share the module, not its tensors, between the layers of a group: a tensor that is a buffer of two modules becomes
    two tensors at the first `.to()`, a shared module stays one. The bases keep the data type they were made in when the
    model is cast (`.half()`, `.to(torch.bfloat16)`): rounded later, it would no longer be the one that the core was
    trained in. Devices are followed.

    Args:
        U: (c, in), the input side; c = in is a complete basis. None stands for the identity.
        V: (r, out), the output side, likewise.
        spectrum_in: gradient energy along the directions of the input side, descending; kept to look at.
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
        self.register_buffer(
            "U", None if U is None else U.contiguous()
        )  # rows are gathered: contiguous is many times faster
        self.register_buffer("V", None if V is None else V.contiguous())
        self.register_buffer("spectrum_in", spectrum_in, persistent=False)
        self.register_buffer("spectrum_out", spectrum_out, persistent=False)
        self.layers = layers

    @classmethod
    def identity(cls) -> Basis:
        """The original space, for layers of any shape: with it SparseGrad's selection is MeProp's."""
        return cls(None, None)

    @classmethod
    def allocate(
        cls, *, r: int, c: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
    ) -> Basis:
        """Room for a basis whose numbers are still to be loaded; zeros until then."""
        basis = cls(None, None)
        basis.U, basis.V = torch.zeros(c, in_features, dtype=dtype), torch.zeros(r, out_features, dtype=dtype)
        return basis

    @classmethod
    def from_gram(
        cls,
        gram: GramStatistics,
        *,
        c: Rows = "full",
        r: Rows = "full",
        dtype: torch.dtype = torch.float32,
        completed: list[str] | None = None,
    ) -> Basis:
        """HOSVD factors of a group's gradients from its Gram matrices (see `hosvd.eigenbasis`).

        Args:
            gram: what `calibrate` returned for the group.
            c: rows of `U` to keep: "full", a count, a fraction of `in`, or "energy:SHARE".
            r: rows of `V` to keep, likewise.
            dtype: of the bases; the decomposition itself is done in the type of the statistics.
            completed: gets a sentence for each side with more rows than the gradients have directions, in place of the
                warning; see `warn_of_completed`.

        Raises:
            ValueError: no gradient reached the group, its statistics are not finite, or they were made for fewer rows;
                the message names the layers.
        """
        whose = _named(gram)
        check_rows(c, gram.gram_in.shape[0], f"c, {whose}")
        check_rows(r, gram.gram_out.shape[0], f"r, {whose}")
        side_in = _eigenbasis(gram.gram_in, gram.probe_in, c, gram.energy, f"{whose}, input side")
        side_out = _eigenbasis(gram.gram_out, gram.probe_out, r, gram.energy, f"{whose}, output side")
        found = [
            f"{whose}, {which} side: the calibration gradients stand above rounding in {side.rank} of the "
            f"{side.vectors.shape[0]} directions asked for"
            for which, side in (("input", side_in), ("output", side_out))
            if side.vectors.shape[0] > side.rank
        ]
        if completed is None:
            warn_of_completed(found)
        else:
            completed += found
        return cls(
            _in_type(side_in.vectors, dtype),
            _in_type(side_out.vectors, dtype),
            spectrum_in=side_in.spectrum,
            spectrum_out=side_out.spectrum,
            layers=gram.layers,
        )

    def to_basis(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "r c"]:
        """`V G Uᵀ`: a weight or gradient of the original space, in the basis."""
        U, V = self._sides(G.dtype)
        return chain(V, G, None if U is None else U.T)

    def from_basis(self, S: Float[Tensor, "r c"]) -> Float[Tensor, "out in"]:
        """`Vᵀ S U`: back to the original space; the inverse of `to_basis` if both sides are complete."""
        U, V = self._sides(S.dtype)
        return chain(None if V is None else V.T, S, U)

    def _sides(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        return None if self.U is None else self.U.to(dtype), None if self.V is None else self.V.to(dtype)

    def core_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(r, c) for a layer of this shape.

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
        """True where both sides span the whole space, so that nothing is lost by the change of basis."""
        return all(side is None or side.shape[0] == side.shape[1] for side in (self.U, self.V))

    def truncated(self, c: int | None = None, r: int | None = None) -> Basis:
        """The leading `c` rows of `U` and `r` rows of `V` as a basis of its own (None keeps all)."""
        for what, side, count in (("c", self.U, c), ("r", self.V, r)):
            if count is not None and side is None:
                raise ValueError(f"{what}={count}: this side is the identity, which has no leading rows")
            if count is not None and side is not None:
                check_rows(count, side.shape[0], what)
        U = self.U if self.U is None or c is None else self.U[:c].clone()
        V = self.V if self.V is None or r is None else self.V[:r].clone()
        return Basis(U, V, spectrum_in=self.spectrum_in, spectrum_out=self.spectrum_out, layers=self.layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Basis:
        # Every cast and move of a module comes through here. Follow the move, not the cast.
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

    One of them registers the basis as its child, and so saves it with its state; the others only refer to it. That way
    a state dict holds each basis once, which safetensors insists on. Whichever of them is moved moves the basis.
    """

    basis: Basis

    def hold_basis(self, basis: Basis, *, register: bool) -> None:
        """Use this basis from now on, as a registered child or as a mere reference."""
        self._modules.pop("basis", None)
        self.__dict__.pop("basis", None)
        if register:
            self.basis = basis
        else:
            self.__dict__["basis"] = basis  # past nn.Module.__setattr__, which would register it

    @property
    def registers_basis(self) -> bool:
        """Whether the basis is a registered child."""
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
    with torch.autocast(matrix.device.type, enabled=False):
        product = accurate @ accurate.T
    product.diagonal().sub_(1)
    error = float(product.abs().max())
    if not error <= tolerance:  # also true for NaN
        raise ValueError(
            f"{side}: rows are not orthonormal, |{side} {side}ᵀ - I| is up to {error:.3g} and may be {tolerance:g} "
            f"in {matrix.dtype}; a basis is a direction a row, so pass the transpose if yours has them in columns"
        )


def _in_type(vectors: Float[Tensor, "rows n"], dtype: torch.dtype) -> Float[Tensor, "rows n"]:
    """Orthonormal rows in another type. In a wider one, what rounding in the narrower left is taken out (Newton-Schulz:
    each round squares the error).
    """
    rows = vectors.to(dtype)
    if torch.finfo(dtype).eps < torch.finfo(vectors.dtype).eps:
        with torch.autocast(vectors.device.type, enabled=False):
            for _ in range(2):
                rows = 1.5 * rows - 0.5 * (rows @ rows.T) @ rows
    return rows


def _eigenbasis(gram: Tensor, probe: Tensor | None, rows: Rows, energy: float, name: str) -> Eigenbasis:
    if probe is None:
        return eigenbasis(gram, rows, name=name)
    return eigenbasis_of_sketch(gram, probe, rows, energy, name=name)


def _named(gram: GramStatistics) -> str:
    first = ", ".join(gram.layers[:3])
    return f"group {gram.name!r} ({first}{f' and {len(gram.layers) - 3} more' if len(gram.layers) > 3 else ''})"


def warn_of_completed(found: list[str]) -> None:
    """One warning for all sides of which more rows were asked for than the gradients have directions."""
    if found:
        others = f" (and so in {len(found) - 1} other side{'s' if len(found) > 2 else ''})" if len(found) > 1 else ""
        logger.warning(
            "%s%s; the other rows only complete the basis. More calibration steps, gram_dtype=torch.float64, or fewer "
            "rows help.", found[0], others,
        )  # fmt: skip
