"""Step 1b, the other way: what the gradients of a layer have in common, and the basis made from it (not in the paper).

    M₁, M₂ = sums of every other gradient (out, in)
    U: eigenvectors of (M₁ᵀM₂ + M₂ᵀM₁) / 2, V: of (M₁M₂ᵀ + M₂M₁ᵀ) / 2

A gradient of a few rows is mostly noise. In `Σ GᵀG` the noise of all steps adds up. The two sums are of different
batches, so in the product of one with the other the noise has mean zero, and what the steps have in common remains.
This holds as long as calibration takes no batch twice. docs/method.md compares the two ways.

For a large layer, two random projections of each sum are enough. They are linear, so they are summed as gradients
arrive:

    left  = Ψᵀ M / √w    (w, in)      left₁ᵀ left₂ ≈ M₁ᵀM₂        Ψ (out, w) random and fixed
    right = M Ω / √w'    (out, w')    right₁ right₂ᵀ ≈ M₁M₂ᵀ      Ω (in, w')

A rotated side of k rows takes a little more than 2 k random vectors (Halko, Martinsson and Tropp, 2011). The products
of single rows or columns, which is all that a selected side needs, take 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .hosvd import Eigenbasis, StrongestFeatures, eigenbasis_of_halves, strongest_features_of_halves
from .precision import without_autocast
from .sizes import Rows, Sizes, row_count
from .statistics import Statistics, cast_parts

_SMALLEST_SIDE = 512  # below it the whole sums take little memory
_EXTRA = 8
_FEATURE_WIDTH = 32  # random vectors for products of rows or columns


def projection_widths(sizes: Sizes | None, out_features: int, in_features: int) -> tuple[int, int] | None:
    """Return (w, w'), the widths of the projections of a layer's sums, or None to keep the sums themselves.

    The sums are needed if a number of rows depends on the whole spectrum ("energy:0.9"). They are kept for small layers
    too, and where the projections would save less than half.
    """
    if sizes is None or min(out_features, in_features) < _SMALLEST_SIDE:
        return None
    r, c = sizes.of(out_features, in_features)
    select_out, select_in = sizes.selected(out_features, in_features)
    count_in, count_out = row_count(c, in_features), row_count(r, out_features)
    if count_in is None or count_out is None:
        return None
    left = _FEATURE_WIDTH if select_in else 2 * count_in + _EXTRA
    right = _FEATURE_WIDTH if select_out else 2 * count_out + _EXTRA
    saves_half = 2 * (left * in_features + right * out_features) <= out_features * in_features
    return (left, right) if saves_half else None


def random_vectors(n: int, width: int, like: Tensor) -> Float[Tensor, "n width"]:
    """Return random vectors with the same numbers on every device and process."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(n, width, generator=generator).to(like)


@dataclass
class WholeSums:
    """`M₁` and `M₂` of one layer."""

    M: Float[Tensor, "2 out in"]
    n_gradients: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.M.shape[1], self.M.shape[2]

    def add(self, part: Tensor, rows: slice, columns: slice) -> None:
        """Add a gradient, or the part of it in these rows and columns."""
        self.M[self.n_gradients % 2, rows, columns].add_(part)

    def factors(self, output: bool) -> Float[Tensor, "2 m n"]:
        """Return `F₁` and `F₂`, with `F₁ᵀF₂ = M₁ᵀM₂`, or `M₁M₂ᵀ` for the output side."""
        return self.M.mT if output else self.M

    @property
    def tensors(self) -> list[Tensor]:
        """What is summed."""
        return [self.M]


@dataclass
class ProjectedSums:
    """Two random projections each of one layer's `M₁` and `M₂`."""

    left: Float[Tensor, "2 w in"]
    right: Float[Tensor, "2 out v"]
    psi: Float[Tensor, "out w"]
    omega: Float[Tensor, "in v"]
    n_gradients: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.right.shape[1], self.left.shape[2]

    def add(self, part: Tensor, rows: slice, columns: slice) -> None:
        """Add a gradient, or the part of it in these rows and columns."""
        half = self.n_gradients % 2
        with without_autocast(part.device):
            self.left[half, :, columns].addmm_(self.psi[rows].T, part, alpha=self.psi.shape[1] ** -0.5)
            self.right[half, rows].addmm_(part, self.omega[columns], alpha=self.omega.shape[1] ** -0.5)

    def factors(self, output: bool) -> Float[Tensor, "2 m n"]:
        """Return `F₁` and `F₂`, with `F₁ᵀF₂` nearly `M₁ᵀM₂`, or `M₁M₂ᵀ` for the output side."""
        return self.right.mT if output else self.left

    @property
    def tensors(self) -> list[Tensor]:
        """What is summed."""
        return [self.left, self.right]


@dataclass
class MeanStatistics(Statistics):
    """The sums of every other gradient of each layer of a group, or random projections of them."""

    sums: dict[str, WholeSums | ProjectedSums] = field(default_factory=dict)
    "layer name -> its sums"

    @property
    def shape(self) -> tuple[int, int]:
        return next(iter(self.sums.values())).shape

    @torch.no_grad()
    def add(self, G: Tensor, layer: str = "", *, normalize: bool = False) -> None:
        sums = self.sums[layer or self.layers[0]]
        parts = G if G.dim() == 3 else G[None]
        out, in_ = parts.shape[1:]
        below_each_other = in_ == sums.shape[1]  # of fused experts: their neurons are outputs
        everything = slice(None)
        for number, part in enumerate(cast_parts(parts, sums.tensors[0], normalize)):
            if below_each_other:
                sums.add(part, slice(number * out, (number + 1) * out), everything)
            else:
                sums.add(part, everything, slice(number * in_, (number + 1) * in_))
        sums.n_gradients += 1
        self.n_gradients += 1

    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        factors = [_of_two(sums.factors(output), sums.n_gradients) for sums in self.sums.values()]
        if selected:
            return strongest_features_of_halves(factors, rows, name=name)
        known = sum(2 * pair.shape[1] for pair in factors)
        count = row_count(rows, factors[0].shape[2])
        if any(isinstance(sums, ProjectedSums) for sums in self.sums.values()) and (count is None or count > known):
            raise ValueError(
                f"{name}: {rows!r} rows were asked for, and the statistics hold the leading {known} directions at "
                "most; calibrate with the sizes wanted, or with sizes=None to keep whole gradients"
            )
        return eigenbasis_of_halves(factors, rows, name=name)


def _of_two(factors: Tensor, n_gradients: int) -> Tensor:
    """Return the factors; a single gradient stands for both halves."""
    return factors if n_gradients > 1 else factors[:1].expand(2, -1, -1)
