"""Find the leading directions of a Gram matrix without building it: sum its product with a few random vectors.

    A = Σ G Gᵀ             (n, n)
    Y = A Ω = Σ G (Gᵀ Ω)   (n, width), Ω random and fixed
    A ≈ Y (Ωᵀ Y)⁺ Yᵀ       Nyström's approximation, exact if A has at most `width` directions

This takes one pass over the gradients, as `A` itself does, and holds `n · width` numbers instead of `n²`. For the 96
leading directions of BERT-base's wide side that is 2.6 MB instead of 38, and an eighth of the multiply-adds. Separate
bases for each layer then become affordable. With twice as many random vectors as wanted directions, the directions
found hold nearly all the energy of the exact ones (`tests/integration/test_minilm.py`). Follows Tropp, Yurtsever, Udell
and Cevher (2017).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .hosvd import Eigenbasis, fix_signs, no_energy
from .precision import without_autocast
from .sizes import Rows, row_count

_SMALLEST_SIDE = 512  # below it the Gram matrix itself takes less than 1 MB
_EXTRA = 16


def sketch_width(rows: Rows, n: int) -> int | None:
    """Return the number of random vectors for the leading `rows` of `n` directions, or None to sum the Gram matrix.

    The Gram matrix is needed if the number of rows depends on the whole spectrum ("energy:0.9"), and better if a sketch
    would save less than half.
    """
    count = row_count(rows, n)
    if count is None or n < _SMALLEST_SIDE:
        return None
    width = 2 * count + _EXTRA
    return width if 2 * width <= n else None


def random_vectors(n: int, width: int, like: Tensor) -> Float[Tensor, "n width"]:
    """Return Ω, with the same numbers on every device and process, so that their sums can be added up."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(n, width, generator=generator).to(like)


def eigenbasis_of_sketch(
    product: Float[Tensor, "n width"], probe: Float[Tensor, "n width"], rows: Rows, energy: float, *, name: str
) -> Eigenbasis:
    """Do what `hosvd.eigenbasis` does, from the product of the Gram matrix with random vectors.

    Args:
        product: `Y`.
        probe: `Ω`.
        rows: how many rows to keep; at most as many as there are random vectors.
        energy: trace of the Gram matrix, which the sketch does not hold.
        name: of the side in messages.

    Raises:
        ValueError: the sums are not finite or zero, or the sketch is too small for so many rows.
    """
    n, width = product.shape
    count = row_count(rows, n)
    if count is None or count > width:
        raise ValueError(
            f"{name}: {rows!r} rows were asked for, and the statistics hold the leading {width} directions at most; "
            "calibrate with the sizes wanted, or with sizes=None to keep the whole Gram matrices"
        )
    if not bool(product.isfinite().all()):
        raise ValueError(
            f"{name}: the sums hold {int((~product.isfinite()).sum())} entries that are not finite: a calibration "
            "gradient or its square overflowed; calibrate in float32 or bfloat16, with normalize=True"
        )
    if energy <= 0:
        raise ValueError(no_energy(name, energy))
    eps = torch.finfo(product.dtype).eps
    with without_autocast(product.device):
        Y, omega = product.double(), probe.double()
        Q, R = torch.linalg.qr(Y)
        inner = omega.T @ Y
        weights, mixing = torch.linalg.eigh((inner + inner.T) / 2)
        # Rounding turns eigenvalues of 0 into noise, whose inverse would swamp the others.
        known = weights > math.sqrt(n) * eps * weights[-1]
        root = R @ mixing[:, known] / weights[known].sqrt()
        spectrum, rotation = torch.linalg.eigh(root @ root.T)  # ascending
        vectors = (Q @ rotation[:, -count:]).flip(1).T.to(product.dtype)
    spectrum = spectrum.flip(0).clamp_min(0).to(product.dtype)
    rank = int((spectrum > math.sqrt(n) * eps * spectrum[0]).sum())
    return Eigenbasis(fix_signs(vectors.contiguous()), spectrum, energy, rank)
