"""Step 2: the statistics of a group of layers -> its basis. What all kinds of statistics have in common.

    kind                   sums                                         file
    GramStatistics         Σ GᵀG, Σ GGᵀ                                 gram.py       (paper)
    PairStatistics         the same, and M = Σ G of each layer          pairs.py
    ProjectedStatistics    random projections of M of each layer        projected.py

Each kind gives the strongest directions of each side, or its strongest features, with their gradient energies.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .basis import Basis
from .hosvd import Eigenbasis, StrongestFeatures
from .precision import without_autocast
from .sizes import Rows, check_rows

logger = logging.getLogger(__name__)

_LEAST_SHARE = 1e-6  # a smaller one counts as so much, since a scale must not be 0


@dataclass
class Statistics(ABC):
    """Gradient statistics of one group of layers."""

    name: str
    "group name, see `group_linears`"
    layers: tuple[str, ...]
    "the layers whose gradients are in the sums"
    n_gradients: int = field(default=0, init=False)
    "number of gradients summed, over layers and steps"
    knows_common: ClassVar[bool] = True
    "the sums show which share of the energy different steps have in common"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the group's layers."""

    @torch.no_grad()
    def add(self, G: Tensor, layer: str = "", *, normalize: bool = False) -> None:
        """Add one gradient: (out, in), or (E, out, in) of fused experts, which is one matrix (see `experts.py`).

        Experts are cast and added one by one. `normalize` scales the gradient to Frobenius norm 1; a zero gradient adds
        nothing.
        """
        parts = G if G.dim() == 3 else G[None]
        out, in_ = parts.shape[1:]
        for number, part in enumerate(_cast_parts(parts, self._like, normalize)):
            # Fused experts whose neurons are outputs lie below each other, the others side by side.
            below = in_ == self.shape[1]
            rows = slice(number * out, (number + 1) * out) if below else slice(None)
            columns = slice(None) if below else slice(number * in_, (number + 1) * in_)
            with without_autocast(part.device):
                self._add_part(part, layer or self.layers[0], rows, columns)
        self.n_gradients += 1

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor with the type and the device of the sums."""

    @abstractmethod
    def _add_part(self, part: Tensor, layer: str, rows: slice, columns: slice) -> None:
        """Add the part of a layer's gradient that lies in these rows and columns: of one expert, or all of it."""

    @abstractmethod
    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        """Return the strongest directions of the output or the input side, or its strongest features if `selected`."""

    @torch.no_grad()
    def basis(
        self,
        *,
        c: Rows = "full",
        r: Rows = "full",
        selected: tuple[bool, bool] = (False, False),
        exponent: float = 0.0,
        dtype: torch.dtype = torch.float32,
        notes: list[str] | None = None,
    ) -> Basis:
        """Make the group's basis: its HOSVD factors (see `hosvd.eigenbasis`), or its strongest features.

        With an exponent `q`, the entries of the core are scaled by `(σ_i τ_j)^q`. `σ_i²` belongs to direction (or
        feature) i of the output side, and `τ_j²` to j of the input side. It is the share of the gradients' energy that
        different steps have in common (`Eigenbasis.common`). The scales of each side have a root mean square of 1. Adam
        moves every entry of a core by about the learning rate, so directions that are mostly noise then move less:
        q = 0 moves all alike. Where only single gradients were summed, the share is not known, and all scales are 1.

        Args:
            c: rows of `U` to keep: "full", a count, a fraction of `in`, or "energy:SHARE".
            r: rows of `V` to keep, likewise.
            selected: True for a side (output, input) whose strongest features are selected and not rotated.
            exponent: `q`.
            dtype: of the bases. The decomposition itself is computed in the type of the statistics.
            notes: gets one sentence for each side with more rows than the gradients have directions. None logs a
                warning, see `warn_of_completed`.

        Raises:
            ValueError: no gradient reached the group, its statistics are not finite, or they were collected for fewer
                rows. The message names the layers.
        """
        out_features, in_features = self.shape
        check_rows(c, in_features, f"c, {self}")
        check_rows(r, out_features, f"r, {self}")
        side_in = self.decompose(False, c, selected[1], f"{self}, input side")
        side_out = self.decompose(True, r, selected[0], f"{self}, output side")
        completed = [
            f"{self}, {which} side: the calibration gradients exceed rounding error in only {side.rank} of the "
            f"{len(side.vectors)} directions asked for"
            for which, side in (("input", side_in), ("output", side_out))
            if isinstance(side, Eigenbasis) and len(side.vectors) > side.rank
        ]
        if notes is None:
            warn_of_completed(completed)
        else:
            notes += completed
        return Basis(
            _rows_of(side_in, dtype),
            _rows_of(side_out, dtype),
            in_features=in_features,
            out_features=out_features,
            scale_in=_scale(side_in, exponent),
            scale_out=_scale(side_out, exponent),
            spectrum_in=side_in.spectrum,
            spectrum_out=side_out.spectrum,
            layers=self.layers,
        )

    def __str__(self) -> str:
        """The group's name and first layers, for messages."""
        first = ", ".join(self.layers[:3])
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        return f"group {self.name!r} ({first}{more})"


def _cast_parts(parts: Tensor, like: Tensor, normalize: bool) -> Iterator[Tensor]:
    """Yield the parts of a gradient (E, out, in), cast one by one to the device and type of the sums.

    With `normalize` the whole gradient has norm 1. The squares in the norm neither overflow nor underflow.
    """
    largest, norm = _largest_and_norm(parts, like.dtype) if normalize else (None, None)
    for given in parts:
        part = given.to(like.device, like.dtype, copy=normalize)
        if largest is not None and norm is not None:
            part.div_(largest.to(part.device)).div_(norm.to(part.device))
        yield part


def _largest_and_norm(parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude of a gradient (E, out, in), and the norm of the gradient divided by it; 1 for 0."""

    def or_one(value: Tensor) -> Tensor:
        return torch.where(value == 0, 1, value)

    largest = or_one(torch.stack([torch.linalg.vector_norm(part.to(dtype), torch.inf) for part in parts]).max())
    norms = torch.stack([torch.linalg.vector_norm(part.to(dtype, copy=True).div_(largest)) for part in parts])
    return largest, or_one(torch.linalg.vector_norm(norms))


def warn_of_completed(completed: Sequence[str]) -> None:
    """Log one warning for all sides that have more rows than the gradients have directions."""
    if completed:
        more = len(completed) - 1
        others = f" (also in {more} other side{'s' if more > 1 else ''})" if more else ""
        logger.warning(
            "%s%s. The other rows only complete the basis. Take more calibration steps, use gram_dtype=torch.float64, "
            "or keep fewer rows.", completed[0], others,
        )  # fmt: skip


def _rows_of(side: Eigenbasis | StrongestFeatures, dtype: torch.dtype) -> Tensor:
    return side.features if isinstance(side, StrongestFeatures) else _cast_orthonormal(side.vectors, dtype)


def _scale(side: Eigenbasis | StrongestFeatures, exponent: float) -> Tensor | None:
    """`σ^q` for the common shares `σ²`, scaled to a root mean square of 1; None for q = 0."""
    if exponent == 0:
        return None
    rows = side.features if isinstance(side, StrongestFeatures) else side.vectors
    common = torch.ones(len(rows), device=rows.device) if side.common is None else side.common.double()
    scale = common.clamp_min(_LEAST_SHARE) ** (exponent / 2)
    return (scale / scale.square().mean().sqrt()).float()


def _cast_orthonormal(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast orthonormal rows (rows, n). In a wider type, two Newton-Schulz rounds remove the narrower type's rounding.

    Each round squares the error.
    """
    rows = vectors.to(dtype)
    if torch.finfo(dtype).eps < torch.finfo(vectors.dtype).eps:
        with without_autocast(vectors.device):
            for _ in range(2):
                rows = 1.5 * rows - 0.5 * (rows @ rows.T) @ rows
    return rows
