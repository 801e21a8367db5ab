"""Step 2: Gram matrices -> orthogonal factors and spectra (paper: preliminary phase). Pure linear algebra.

The mode-n factor of a higher-order SVD holds the left singular vectors of the mode-n unfolding of the stack of
gradients. These are the eigenvectors of that unfolding's Gram matrix: `Σ GᵀG` for the input side, `Σ GGᵀ` for the
output side. So the stack (276 MB for BERT-base in the paper) is never built, and a symmetric eigendecomposition
replaces its SVD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import exact_products
from .sizes import Rows, check_rows, parse_energy, row_count

# Subspace iteration finds the leading rows if they are few and the matrix is large. Below this size the full
# decomposition takes well under a second.
_ITERATE_ABOVE = 1024
_ITERATE_FRACTION = 0.15
_ENERGY_TOLERANCE = 1e-4  # relative gain in captured energy under which the iteration stops
_MAX_ITERATIONS = 24


@dataclass(frozen=True)
class Eigenbasis:
    """One side of the decomposition of one group.

    Attributes:
        vectors: (rows, n), orthonormal rows, strongest direction first.
        spectrum: the known eigenvalues, descending: all n, or one per row if only the leading ones were computed. An
            eigenvalue is the gradient energy (sum of squares over all calibration gradients) along its direction.
        energy: the total energy, the trace of the Gram matrix.
        common: (rows,) share of the gradients' energy along each row that different steps have in common, 0 to 1: the
            mean product of two steps over the mean square of one. None if it is not known: only single gradients were
            summed, or no direction has a product above rounding.
        rank: number of directions with an energy above rounding, that is above √n eps times the strongest one's. Rows
            beyond it only complete the basis. An eigenvalue is a square, so float32 sums resolve directions down to
            about a thousandth of the strongest gradient, and float64 sums down to a ten-millionth.
    """

    vectors: Float[Tensor, "rows n"]
    spectrum: Float[Tensor, " known"]
    energy: float
    rank: int
    common: Float[Tensor, " rows"] | None = None

    @property
    def captured(self) -> float:
        """Share of the gradient energy in the rows kept, 0 to 1."""
        return min(1.0, float(self.spectrum[: self.vectors.shape[0]].sum()) / self.energy)


def eigenbasis(gram: Float[Tensor, "n n"], rows: Rows = "full", *, name: str = "the Gram matrix") -> Eigenbasis:
    """Return the eigenvectors of a Gram matrix as rows, strongest first, with deterministic signs (`fix_signs`).

    The rows come from one symmetric eigendecomposition, or from subspace iteration if only a small leading part of a
    large matrix is asked for. The iteration stops when a round gains less than 1e-4 of the captured energy.

    Args:
        gram: (n, n), symmetric positive semi-definite, float32 or float64.
        rows: how many rows to keep, see `Rows`.
        name: of the matrix in messages, such as "group intermediate.dense, input side".

    Raises:
        ValueError: `gram` is not square, not finite, not symmetric, has a negative trace, or is zero; `rows` is out of
            range.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"{name}: expected a square Gram matrix, found {tuple(gram.shape)}")
    n = gram.shape[0]
    check_rows(rows, n, name)
    diagonal = gram.diagonal()
    energy = float(diagonal.sum())
    check_energy(gram, energy, name)
    asymmetry = float((gram - gram.T).abs().max())
    if asymmetry > 1e-3 * float(diagonal.max()):
        raise ValueError(
            f"{name}: expected a symmetric matrix, found entries that differ from their mirror by {asymmetry:g}"
        )

    count = row_count(rows, n)
    if count is not None and n >= _ITERATE_ABOVE and count <= _ITERATE_FRACTION * n:
        with exact_products(gram.device):
            spectrum, vectors = _leading(gram, count)
    else:
        spectrum, columns = eigh(gram)  # ascending
        spectrum, vectors = spectrum.flip(0), columns.flip(1).T
    spectrum = spectrum.clamp_min(0)  # rounding leaves tiny negative values in place of 0
    # Rounding in the sums and in the eigensolver is of the order of √n eps of the strongest eigenvalue.
    rank = int((spectrum > math.sqrt(n) * torch.finfo(gram.dtype).eps * spectrum[0]).sum())
    if count is None:
        count = count_by_energy(spectrum, str(rows))
    vectors = vectors[:count].contiguous()
    return Eigenbasis(fix_signs(vectors), spectrum, energy, rank)


def eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues, ascending, and eigenvectors as columns.

    LAPACK's solver may not converge in float32 if many eigenvalues are 0, as for features without a gradient. It does
    in float64.
    """
    try:
        values, columns = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, columns = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), columns.to(matrix.dtype)


@dataclass(frozen=True)
class StrongestFeatures:
    """The features of one side that hold the most gradient energy: the other way to choose `k` coordinates.

    Attributes:
        features: (k,) int32 indices, ascending.
        energies: (k,) their gradient energies, in the same order.
        spectrum: (n,) the energies of all features, descending.
        common: (k,) see `Eigenbasis`.
    """

    features: Int[Tensor, " k"]
    energies: Float[Tensor, " k"]
    spectrum: Float[Tensor, " n"]
    common: Float[Tensor, " k"] | None = None


def strongest_features(energies: Float[Tensor, " n"], rows: Rows, *, name: str = "the side") -> StrongestFeatures:
    """Return the features with the most gradient energy. Of equal ones the first is taken.

    Args:
        energies: (n,) sums of squared gradients over each feature: the diagonal of the Gram matrix.
        rows: how many to keep, see `Rows`.
        name: what to call the side in messages.

    Raises:
        ValueError: the energies are not finite, or all zero.
    """
    check_rows(rows, len(energies), name)
    check_energy(energies, float(energies.sum()), name)
    order = energies.argsort(descending=True, stable=True)
    count = row_count(rows, len(energies))
    if count is None:
        count = count_by_energy(energies[order], str(rows))
    kept = order[:count].sort().values  # ascending: neighbours in memory are read together
    return StrongestFeatures(kept.int(), energies[kept], energies[order])


def fix_signs(vectors: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Flip each row so that its entry of largest magnitude (the first, if several) is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def check_energy(sums: Tensor, energy: float, name: str) -> None:
    """Raise unless the sums are finite and the energy is positive."""
    if not bool(sums.isfinite().all()):
        raise ValueError(
            f"{name} holds {int((~sums.isfinite()).sum())} entries that are not finite: a calibration gradient or its "
            "square overflowed; calibrate in float32 or bfloat16, with normalize=True"
        )
    if energy <= 0:
        raise ValueError(
            f"{name} has energy {energy:g}: no gradient reached these layers during calibration, or the squares of the "
            "gradients underflowed; check that the layers take part in the loss and that nothing before it is "
            "detached, or calibrate with normalize=True"
        )


def count_by_energy(spectrum: Tensor, rows: str) -> int:
    """How many of the strongest energies hold the share in "energy:SHARE"."""
    share = parse_energy(rows) or 1.0
    cumulated = spectrum.double().cumsum(0)
    return min(int((cumulated < share * cumulated[-1]).sum()) + 1, len(spectrum))


def _leading(gram: Float[Tensor, "n n"], count: int) -> tuple[Float[Tensor, " count"], Float[Tensor, "count n"]]:
    """Return the `count` strongest eigenpairs, by subspace iteration with Rayleigh-Ritz from a fixed start.

    Follows Halko, Martinsson and Tropp (2011), algorithm 4.4, with a stopping rule. Extra directions (a tenth, at least
    16) speed up convergence.
    """
    n = gram.shape[0]
    width = min(n, count + max(16, count // 10))
    generator = torch.Generator(device="cpu").manual_seed(0)  # on the CPU: the same start on every device
    start = torch.randn(n, width, generator=generator, dtype=gram.dtype, device="cpu").to(gram.device)
    Q = torch.linalg.qr(gram @ start).Q
    captured = 0.0
    for _ in range(_MAX_ITERATIONS):
        image = gram @ Q  # (n, width)
        values, ritz = eigh(Q.T @ image)  # ascending
        gained = float(values[-count:].sum())
        converged = gained - captured < _ENERGY_TOLERANCE * gained
        captured = gained
        if converged:
            break
        Q = torch.linalg.qr(image).Q
    vectors = (Q @ ritz[:, -count:]).flip(1).T
    return values[-count:].flip(0), vectors
