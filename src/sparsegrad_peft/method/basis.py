"""Basis(U, V): the coordinates in which a group of layers is trained, as one module that the layers share."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .precision import HALF_PRECISION, exact_products
from .products import chain
from .sides import cast, check_selected, is_selected, kept_count, put, scaled

ORTHOGONALITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest allowed entry of `|U Uᵀ - I|`: a few hundred roundings of the storage type."""


BASIS_BUFFERS = ("U", "V", "scale_in", "scale_out")
"""The tensors of a basis that are saved, where they are not None."""


class Basis(nn.Module):
    """Coordinates for the gradients of a group of layers: `G_tilde = V G Uᵀ` (paper: preliminary phase).

    Each side is a matrix of orthonormal directions, strongest first, a vector of selected features, or the identity
    (`sides.py`). The core `S` (r, c) of a layer stands for the update

        ΔW = Vᵀ (diag(scale_out) S diag(scale_in)) U

    The scales set how far a step of the optimizer moves each entry: Adam moves every entry of `S` by about the learning
    rate, and so every entry of `ΔW` in the basis by the rate times its scale. `Statistics.basis` makes them from the
    spectrum.

    The layers of a group share this module. If they shared only its tensors, the first `.to()` would copy each tensor
    once for each layer. The bases follow the model to other devices, but keep their data type when the model is cast
    (`.half()`, `.to(torch.bfloat16)`). Rounded after training, they would no longer be the bases that the core was
    trained in.

    Args:
        U: the input side: (c, in) directions, (c,) int32 indices of features, or None for the identity.
        V: the output side: (r, out), (r,) or None.
        in_features: needed if `U` holds indices.
        out_features: needed if `V` holds indices.
        scale_in: (c,), positive; None is 1.
        scale_out: (r,), positive; None is 1.
        spectrum_in: gradient energy along the directions of the input side, descending; for inspection only.
        spectrum_out: the same for the output side.
        layers: names of the layers that the basis was calibrated on.

    Raises:
        ValueError: a matrix has more rows than columns, is not finite, or is not orthonormal within
            `ORTHOGONALITY_TOLERANCE`; indices are out of range or repeated; scales do not fit or are not positive.
    """

    U: Tensor | None
    V: Tensor | None
    scale_in: Tensor | None
    scale_out: Tensor | None
    spectrum_in: Tensor | None
    spectrum_out: Tensor | None

    def __init__(
        self,
        U: Tensor | None,
        V: Tensor | None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        scale_in: Float[Tensor, " c"] | None = None,
        scale_out: Float[Tensor, " r"] | None = None,
        spectrum_in: Float[Tensor, " known_in"] | None = None,
        spectrum_out: Float[Tensor, " known_out"] | None = None,
        layers: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.in_features = _check_side(U, in_features, "U")
        self.out_features = _check_side(V, out_features, "V")
        _check_scale(scale_in, U, "scale_in")
        _check_scale(scale_out, V, "scale_out")
        # Rows are gathered, which is many times faster if they are contiguous.
        self.register_buffer("U", None if U is None else U.contiguous())
        self.register_buffer("V", None if V is None else V.contiguous())
        self.register_buffer("scale_in", scale_in)
        self.register_buffer("scale_out", scale_out)
        self.register_buffer("spectrum_in", spectrum_in, persistent=False)
        self.register_buffer("spectrum_out", spectrum_out, persistent=False)
        self.layers = layers

    @classmethod
    def identity(cls) -> Basis:
        """Return the original space, for layers of any shape. With it, SparseGrad's selection is MeProp's."""
        return cls(None, None)

    @classmethod
    def allocate(
        cls,
        *,
        r: int,
        c: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype = torch.float32,
        selected: tuple[bool, bool] = (False, False),
        scales: bool = False,
    ) -> Basis:
        """Return a basis of zeros, to load numbers into.

        Args:
            r: rows of `V`.
            c: rows of `U`.
            out_features: features of the output side.
            in_features: features of the input side.
            dtype: of the directions.
            selected: True for a side (output, input) that selects features.
            scales: with room for scales.
        """
        basis = cls(None, None)
        basis.out_features, basis.in_features = out_features, in_features
        for name, rows, features, is_index in (("V", r, out_features, selected[0]), ("U", c, in_features, selected[1])):
            side = torch.zeros(rows, dtype=torch.int32) if is_index else torch.zeros(rows, features, dtype=dtype)
            setattr(basis, name, side)
        if scales:
            basis.scale_out, basis.scale_in = (torch.zeros(n, dtype=torch.float32) for n in (r, c))
        return basis

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale_out, scale_in)."""
        return self.scale_out, self.scale_in

    @property
    def is_scaled(self) -> bool:
        """True if the core's entries are scaled."""
        return self.scale_in is not None or self.scale_out is not None

    @property
    def is_rotation(self) -> bool:
        """True if the basis is the paper's: directions or the identity on both sides, no scales."""
        return not (self.is_scaled or is_selected(self.U) or is_selected(self.V))

    def to_basis(self, G: Float[Tensor, "out in"]) -> Float[Tensor, "r c"]:
        """Return the gradient of the core, `scale_out · V G Uᵀ · scale_in`, from the gradient of the weight."""
        return scaled(self._project(G), self.scales)

    def from_basis(self, S: Float[Tensor, "r c"]) -> Float[Tensor, "out in"]:
        """Return the update `ΔW` of a core: `Vᵀ (scale_out · S · scale_in) U`."""
        U, V = cast(self.U, S.dtype), cast(self.V, S.dtype)
        S = scaled(S, self.scales)
        if is_selected(V):  # the product of the chosen rows alone, and then zeros around it
            rows = put(S, U, _known(self.in_features)) if is_selected(U) else chain(S, U)
            return rows.new_zeros(_known(self.out_features), rows.shape[1]).index_copy_(0, V.long(), rows)
        if is_selected(U):
            return put(chain(None if V is None else V.T, S), U, _known(self.in_features))
        return chain(None if V is None else V.T, S, U)

    def coordinates(self, W: Float[Tensor, "out in"]) -> Float[Tensor, "r c"]:
        """Return the core whose update is nearest to `W`; equal to it, up to rounding, in a complete basis.

        A basis stored in half precision is only nearly orthogonal: `V (Vᵀ S U) Uᵀ` differs from `S` by up to a percent.
        So a complete basis is inverted by iterative refinement. Each round shrinks the error by more than a factor of
        ten.
        """
        S = self._coordinates(W)
        if self.is_complete and any(side.dtype in HALF_PRECISION for side in (self.U, self.V) if side is not None):
            for _ in range(6):
                S = S + self._coordinates(W - self.from_basis(S))
        return S

    def _coordinates(self, W: Tensor) -> Tensor:
        """The core whose update is the projection of `W` on the basis. Without scales it is `to_basis`."""
        inverse = [None if scale is None else scale.reciprocal() for scale in self.scales]
        return scaled(self._project(W), (inverse[0], inverse[1]))

    def _project(self, G: Tensor) -> Tensor:
        """`V G Uᵀ`."""
        U, V = cast(self.U, G.dtype), cast(self.V, G.dtype)
        if is_selected(V):
            G, V = G.index_select(0, V), None
        if is_selected(U):
            G, U = G.index_select(1, U), None
        return chain(V, G, None if U is None else U.T)

    def core_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return (r, c) for a layer of this shape.

        Raises:
            ValueError: the basis is for layers of another shape.
        """
        found = (
            out_features if self.out_features is None else self.out_features,
            in_features if self.in_features is None else self.in_features,
        )
        if found != (out_features, in_features):
            raise ValueError(
                f"the basis is for layers with (out, in) = {found}, found a layer with ({out_features}, {in_features})"
                "; layers of different shapes need a basis each (see group_linears)"
            )
        return kept_count(self.V, out_features), kept_count(self.U, in_features)

    @property
    def is_complete(self) -> bool:
        """True if both sides span the whole space, so that a change of basis loses nothing."""
        sides = ((self.U, self.in_features), (self.V, self.out_features))
        return all(side is None or len(side) == features for side, features in sides)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Basis:
        # Every cast and move of a module comes through here. Follow moves, ignore casts.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)
        return self

    @property
    def holders(self) -> WeakKeyDictionary[HoldsBasis, None]:
        """The layers that use this basis, in the order in which they began to."""
        holders: WeakKeyDictionary[HoldsBasis, None] = self.__dict__.setdefault("_holders", WeakKeyDictionary())
        return holders

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the holders, which cannot be pickled; copied layers enter themselves again."""
        return {name: value for name, value in self.__dict__.items() if name != "_holders"}

    def on_device(self, device: torch.device) -> Basis:
        """Return the basis if it is on the device, else a copy: `.to` would move it away from the other layers."""
        return self if all(buffer.device == device for buffer in self.buffers()) else deepcopy(self).to(device)

    def extra_repr(self) -> str:
        """Shapes of both sides, for `print(model)`."""
        sides = ["identity" if side is None else str(tuple(side.shape)) for side in (self.U, self.V)]
        scaled = ", scaled" if self.is_scaled else ""
        return f"U={sides[0]}, V={sides[1]}{scaled}, layers={len(self.layers)}"


class HoldsBasis(nn.Module):
    """A layer with a `Basis` that other layers may use too.

    One of them registers the basis as its child and saves it with its state. The others only refer to it, so a state
    dict holds each basis once, as safetensors requires. Moving any of these layers moves the basis.
    """

    basis: Basis
    weight_trained = True
    "whether the weight of the layer that this one replaces had `requires_grad`; `restore_linears` gives it back"

    def hold_basis(self, basis: Basis, *, register: bool) -> None:
        """Use this basis from now on, as a registered child or only as a reference."""
        for old in (self._modules.pop("basis", None), self.__dict__.pop("basis", None)):
            if isinstance(old, Basis):
                old.holders.pop(self, None)
        basis.holders[self] = None
        if register:
            self.basis = basis
        else:
            self.__dict__["basis"] = basis  # nn.Module.__setattr__ would register it

    @property
    def registers_basis(self) -> bool:
        """True if the basis is a registered child."""
        return "basis" in self._modules

    def _replicate_for_data_parallel(self) -> nn.Module:
        if not self.registers_basis:
            raise NotImplementedError(
                "found layers that share a basis in torch.nn.DataParallel, which does not copy it to the other GPUs; "
                "use DistributedDataParallel (torchrun), or a basis for each layer: group_linears(..., shared=False)"
            )
        return super()._replicate_for_data_parallel()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Enter a copy among the holders of its basis."""
        super().__setstate__(state)
        self.basis.holders[self] = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        keep_saved(self.basis)  # the layer that saved it may have been removed from the model
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        keep_saved(self.basis)  # likewise
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsBasis:
        super()._apply(fn, recurse)
        if recurse and not self.registers_basis:
            self.basis._apply(fn)
        return self


def keep_saved(basis: Basis) -> None:
    """Let one of the layers that hold a basis save it, if none does: the one that did has moved away."""
    holders = list(basis.holders)
    if holders and not any(holder.registers_basis for holder in holders):
        holders[0].hold_basis(basis, register=True)


def _known(features: int | None) -> int:
    """The number of features of a side that selects some, which `Basis` has checked."""
    assert features is not None
    return features


def _check_side(side: Tensor | None, features: int | None, name: str) -> int | None:
    """Check one side; return its number of features, None for the identity without one."""
    if side is None:
        return features
    if side.dim() == 1 and is_selected(side):
        if features is None:
            raise ValueError(f"{name} selects features: expected their total number as well, found None")
        check_selected(side, features, name)
        return features
    check_orthonormal(side, name)
    return side.shape[1]


def _check_scale(scale: Tensor | None, side: Tensor | None, name: str) -> None:
    if scale is None:
        return
    expected = None if side is None else (len(side),)
    if scale.dim() != 1 or (expected is not None and tuple(scale.shape) != expected):
        raise ValueError(f"{name}: expected a vector of shape {expected}, found {tuple(scale.shape)}")
    if bad := int((~((scale > 0) & scale.isfinite())).sum()):
        raise ValueError(f"{name}: expected positive, finite numbers, found {bad} others")


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
    with exact_products(matrix.device):
        product = accurate @ accurate.T
    product.diagonal().sub_(1)
    error = float(product.abs().max())
    if not error <= tolerance:  # also true for NaN
        raise ValueError(
            f"{side}: rows are not orthonormal, the largest entry of |{side} {side}ᵀ - I| is {error:.3g} and may be "
            f"{tolerance:g} in {matrix.dtype}; if your directions are columns, pass the transpose"
        )
