"""Step 1b: sums over the gradients of a group of layers, and the bases made from them (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

`hosvd.py` decomposes the sums. If a large side needs few directions, `sketch.py` replaces its Gram matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .hosvd import Eigenbasis, eigenbasis
from .precision import unit_norm_, without_autocast
from .processes import sum_over_processes
from .sizes import Rows, check_rows
from .sketch import eigenbasis_of_sketch

logger = logging.getLogger(__name__)


@dataclass
class GramStatistics:
    """Gradient statistics of one group of layers."""

    name: str
    "group name, see `group_linears`"
    layers: tuple[str, ...]
    "the layers whose gradients are in the sums"
    gram_in: Tensor
    "`Σ GᵀG` (in, in); with `probe_in`, its product with that (in, width)"
    gram_out: Tensor
    "`Σ GGᵀ` (out, out); with `probe_out`, its product with that (out, width)"
    n_gradients: int = 0
    "number of gradients summed, over layers, steps and processes"
    probe_in: Tensor | None = None
    "(in, width), the random vectors of the input side if only a few leading directions are wanted (see `sketch`)"
    probe_out: Tensor | None = None
    "(out, width), the same for the output side"
    energy: float = 0.0
    "`Σ ‖G‖²`, summed only if there are random vectors; otherwise it is the trace of either Gram matrix"

    @torch.no_grad()
    def add(self, G: Tensor, *, normalize: bool = False) -> None:
        """Add one gradient (out, in). `normalize` scales it to Frobenius norm 1; a zero gradient adds nothing."""
        given, G = G, G.to(self.gram_in.device, self.gram_in.dtype)
        if normalize:
            G = unit_norm_(G.clone() if G is given else G)
        with without_autocast(G.device):
            self.gram_in.addmm_(G.T, G if self.probe_in is None else G @ self.probe_in)
            self.gram_out.addmm_(G, G.T if self.probe_out is None else G.T @ self.probe_out)
        if self.probe_in is not None or self.probe_out is not None:
            self.energy += float(G.square().sum())
        self.n_gradients += 1

    def sum_over_processes(self) -> None:
        """Add up the statistics of all processes, on each of them."""
        count, energy = torch.tensor(self.n_gradients), torch.tensor(self.energy, dtype=torch.float64)
        for tensor in (self.gram_in, self.gram_out, count, energy):
            sum_over_processes(tensor)
        self.n_gradients, self.energy = int(count), float(energy)

    def basis(
        self,
        *,
        c: Rows = "full",
        r: Rows = "full",
        dtype: torch.dtype = torch.float32,
        notes: list[str] | None = None,
    ) -> Basis:
        """Make the group's basis, its HOSVD factors (see `hosvd.eigenbasis`).

        Args:
            c: rows of `U` to keep: "full", a count, a fraction of `in`, or "energy:SHARE".
            r: rows of `V` to keep, likewise.
            dtype: of the bases. The decomposition itself is computed in the type of the statistics.
            notes: gets one sentence for each side with more rows than the gradients have directions. None logs a
                warning, see `warn_of_completed`.

        Raises:
            ValueError: no gradient reached the group, its statistics are not finite, or they were collected for fewer
                rows. The message names the layers.
        """
        check_rows(c, self.gram_in.shape[0], f"c, {self}")
        check_rows(r, self.gram_out.shape[0], f"r, {self}")
        side_in = self._side(self.gram_in, self.probe_in, c, "input")
        side_out = self._side(self.gram_out, self.probe_out, r, "output")
        completed = [
            f"{self}, {which} side: the calibration gradients stand above rounding in {side.rank} of the "
            f"{len(side.vectors)} directions asked for"
            for which, side in (("input", side_in), ("output", side_out))
            if len(side.vectors) > side.rank
        ]
        if notes is None:
            warn_of_completed(completed)
        else:
            notes += completed
        return Basis(
            _cast_orthonormal(side_in.vectors, dtype),
            _cast_orthonormal(side_out.vectors, dtype),
            spectrum_in=side_in.spectrum,
            spectrum_out=side_out.spectrum,
            layers=self.layers,
        )

    def _side(self, gram: Tensor, probe: Tensor | None, rows: Rows, which: str) -> Eigenbasis:
        name = f"{self}, {which} side"
        if probe is None:
            return eigenbasis(gram, rows, name=name)
        return eigenbasis_of_sketch(gram, probe, rows, self.energy, name=name)

    def __str__(self) -> str:
        """The group's name and first layers, for messages."""
        first = ", ".join(self.layers[:3])
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        return f"group {self.name!r} ({first}{more})"


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
