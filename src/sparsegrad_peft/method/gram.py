"""Step 1b: sums over the gradients of a group of layers, and the bases made from them (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

`hosvd.py` decomposes the sums. If a large side needs few directions, `sketch.py` replaces its Gram matrix. For a
side that selects features instead of rotating, the diagonal is enough.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .hosvd import Eigenbasis, StrongestFeatures, eigenbasis, strongest_features
from .precision import without_autocast
from .sizes import Rows, check_rows
from .sketch import eigenbasis_of_sketch

logger = logging.getLogger(__name__)

_LEAST_ENERGY = 1e-12  # of the strongest direction: below it an energy is rounding


@dataclass
class GramStatistics:
    """Gradient statistics of one group of layers."""

    name: str
    "group name, see `group_linears`"
    layers: tuple[str, ...]
    "the layers whose gradients are in the sums"
    gram_in: Tensor
    "`Σ GᵀG` (in, in); with `probe_in`, its product with that (in, width); for a selected side, its diagonal (in,)"
    gram_out: Tensor
    "`Σ GGᵀ` (out, out); with `probe_out`, its product with that (out, width); for a selected side, its diagonal (out,)"
    n_gradients: int = 0
    "number of gradients summed, over layers and steps"
    probe_in: Tensor | None = None
    "(in, width), the random vectors of the input side if only a few leading directions are wanted (see `sketch`)"
    probe_out: Tensor | None = None
    "(out, width), the same for the output side"
    energy: float = 0.0
    "`Σ ‖G‖²`, summed only if there are random vectors; otherwise it is the trace of either Gram matrix"

    @torch.no_grad()
    def add(self, G: Tensor, *, normalize: bool = False) -> None:
        """Add one gradient: (out, in), or (E, out, in) of fused experts, which is one matrix (see `experts.py`).

        Experts are cast and added one by one. `normalize` scales the gradient to Frobenius norm 1; a zero gradient adds
        nothing.
        """
        parts = G if G.dim() == 3 else G[None]
        largest, norm = _largest_and_norm(parts, self.gram_in.dtype) if normalize else (None, None)
        for number, given in enumerate(parts):
            part = given.to(self.gram_in.device, self.gram_in.dtype, copy=normalize)
            if largest is not None and norm is not None:
                part.div_(largest.to(part.device)).div_(norm.to(part.device))
            gram_in = _of_expert(self.gram_in, number, len(parts))
            gram_out = _of_expert(self.gram_out, number, len(parts))
            with without_autocast(part.device):
                _add_side(gram_in, part, self.probe_in)
                _add_side(gram_out, part.T, self.probe_out)
            if self.probe_in is not None or self.probe_out is not None:
                self.energy += float(part.square().sum())
        self.n_gradients += 1

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

        With an exponent `q`, the entries of the core are scaled by `(σ_i τ_j)^q`, where `σ_i²` and `τ_j²` are the
        gradient energies of direction (or feature) i of the output side and j of the input side. The scales of each
        side have a root mean square of 1. Weak directions then move less in a step of Adam: q = 0 moves all alike.

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
        check_rows(c, self.gram_in.shape[0], f"c, {self}")
        check_rows(r, self.gram_out.shape[0], f"r, {self}")
        side_in = self._side(self.gram_in, self.probe_in, c, selected[1], "input")
        side_out = self._side(self.gram_out, self.probe_out, r, selected[0], "output")
        completed = [
            f"{self}, {which} side: the calibration gradients stand above rounding in {side.rank} of the "
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
            in_features=len(self.gram_in),
            out_features=len(self.gram_out),
            scale_in=_scale(side_in, exponent),
            scale_out=_scale(side_out, exponent),
            spectrum_in=side_in.spectrum,
            spectrum_out=side_out.spectrum,
            layers=self.layers,
        )

    def _side(
        self, gram: Tensor, probe: Tensor | None, rows: Rows, selected: bool, which: str
    ) -> Eigenbasis | StrongestFeatures:
        name = f"{self}, {which} side"
        if selected and probe is None:
            return strongest_features(gram if gram.dim() == 1 else gram.diagonal(), rows, name=name)
        if selected or gram.dim() == 1:
            found, expected = ("directions", "features") if selected else ("features", "directions")
            raise ValueError(
                f"{name}: the statistics were collected for {found}, expected {expected}; calibrate with the sizes of "
                "the bases"
            )
        if probe is None:
            return eigenbasis(gram, rows, name=name)
        return eigenbasis_of_sketch(gram, probe, rows, self.energy, name=name)

    def __str__(self) -> str:
        """The group's name and first layers, for messages."""
        first = ", ".join(self.layers[:3])
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        return f"group {self.name!r} ({first}{more})"


@torch.no_grad()
def _add_side(sums: Tensor, G: Tensor, probe: Tensor | None) -> None:
    """Add `GᵀG` (n, n) for a gradient (m, n), its product with the random vectors (n, width), or its diagonal (n,)."""
    if sums.dim() == 1:
        sums.add_(G.square().sum(0))
    else:
        sums.addmm_(G.T, G if probe is None else G @ probe)


def _of_expert(sums: Tensor, number: int, count: int) -> Tensor:
    """Return the part of the sums that belongs to one of `count` experts: its neurons, or all of the hidden side."""
    return sums if count == 1 or sums.dim() == 2 else sums.view(count, -1)[number]


def _largest_and_norm(parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude of a gradient (E, out, in), and the norm of the gradient divided by it; 1 for 0.

    The squares in the norm neither overflow nor underflow. Parts are cast one by one.
    """

    def or_one(value: Tensor) -> Tensor:
        return torch.where(value == 0, 1, value)

    largest = or_one(torch.stack([torch.linalg.vector_norm(part.to(dtype), torch.inf) for part in parts]).max())
    norms = torch.stack([torch.linalg.vector_norm(part.to(dtype, copy=True).div_(largest)) for part in parts])
    return largest, or_one(torch.linalg.vector_norm(norms))


def _rows_of(side: Eigenbasis | StrongestFeatures, dtype: torch.dtype) -> Tensor:
    return side.features if isinstance(side, StrongestFeatures) else _cast_orthonormal(side.vectors, dtype)


def _scale(side: Eigenbasis | StrongestFeatures, exponent: float) -> Tensor | None:
    """`σ^q`, scaled to a root mean square of 1; None for q = 0. Energies that are 0 count as the least above it."""
    if exponent == 0:
        return None
    kept = side.spectrum[: len(side.vectors)] if isinstance(side, Eigenbasis) else side.energies
    energies = kept.double().clamp_min(float(kept.max()) * _LEAST_ENERGY)
    scale = energies ** (exponent / 2)
    return (scale / scale.square().mean().sqrt()).float()


def warn_of_completed(completed: Sequence[str]) -> None:
    """Log one warning for all sides that have more rows than the gradients have directions."""
    if completed:
        more = len(completed) - 1
        others = f" (also in {more} other side{'s' if more > 1 else ''})" if more else ""
        logger.warning(
            "%s%s. The other rows only complete the basis. Take more calibration steps, use gram_dtype=torch.float64, "
            "or keep fewer rows.", completed[0], others,
        )  # fmt: skip


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
