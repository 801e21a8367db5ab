"""Step 1b for large models: random projections in place of the sums of `pairs.py` (not in the paper).

The sums of a layer take as much memory as its weight. Two random projections of them take a part of it. They are
linear, so they are summed as gradients arrive, every other gradient in one of two halves `M₁` and `M₂`:

    left  = Ψᵀ M / √w    (w, in)      left₁ᵀ left₂ ≈ M₁ᵀM₂        Ψ (out, w) random and fixed
    right = M Ω / √w'    (out, w')    right₁ right₂ᵀ ≈ M₁M₂ᵀ      Ω (in, w')

The halves share no batch, so the noise has mean zero in the product of one with the other. `U` is made of the
eigenvectors of `(left₁ᵀ left₂ + left₂ᵀ left₁) / 2`, `V` of those of the right side. The difference of the two
means is only noise. The scales take the noise of each direction from it.

A rotated side of k rows takes a little more than 2 k random vectors (Halko, Martinsson and Tropp, 2011). The products
of single rows or columns, which is all that a selected side needs, take 32. If memory is left, both take more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .common_energy import eigenbasis_of_halves, strongest_features_of_halves
from .hosvd import Eigenbasis, StrongestFeatures
from .sizes import Rows, row_count
from .statistics import Statistics
from .sum_sizes import Widths


def random_vectors(n: int, width: int, like: Tensor) -> Float[Tensor, "n width"]:
    """Return random vectors with the same numbers on every device and process."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(n, width, generator=generator, device="cpu").to(like)


@dataclass
class Projections:
    """Two random projections each of one layer's `M₁` and `M₂`."""

    left: Float[Tensor, "2 w in"]
    right: Float[Tensor, "2 out v"]
    n_gradients: int = 0


@dataclass
class ProjectedStatistics(Statistics):
    """Random projections of the sums of every other gradient, of each layer of a group."""

    psi: Float[Tensor, "out w"]
    omega: Float[Tensor, "in v"]
    sums: dict[str, Projections] = field(default_factory=dict)
    "layer name -> its projections"

    @classmethod
    def empty(
        cls, name: str, layers: tuple[str, ...], out: int, in_: int, widths: Widths,
        vectors: dict[tuple[int, int, torch.device], Tensor], **where: Any,
    ) -> ProjectedStatistics:  # fmt: skip
        """Return projections of zeros. `vectors` holds the random vectors of other groups, and gets those of this."""

        def random(n: int, width: int) -> Tensor:
            like = torch.empty(0, **where)
            key = (n, width, like.device)
            if key not in vectors:
                vectors[key] = random_vectors(n, width, like)
            return vectors[key]

        left, right = widths
        sums = {
            layer: Projections(torch.zeros(2, left, in_, **where), torch.zeros(2, out, right, **where))
            for layer in layers
        }
        return cls(name, layers, random(out, left), random(in_, right), sums)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.psi), len(self.omega)

    @property
    def _like(self) -> Tensor:
        return self.psi

    def add(self, G: Tensor, layer: str = "", *, normalize: bool = False) -> None:
        super().add(G, layer, normalize=normalize)
        self.sums[layer or self.layers[0]].n_gradients += 1

    def _add_part(self, part: Tensor, layer: str, rows: slice, columns: slice) -> None:
        sums = self.sums[layer]
        half = sums.n_gradients % 2
        sums.left[half, :, columns].addmm_(self.psi[rows].T, part, alpha=self.psi.shape[1] ** -0.5)
        sums.right[half, rows].addmm_(part, self.omega[columns], alpha=self.omega.shape[1] ** -0.5)

    def decompose(self, output: bool, rows: Rows, selected: bool, name: str) -> Eigenbasis | StrongestFeatures:
        factors = [_factors(sums, output) for sums in self.sums.values()]
        mean = round(self.n_gradients / len(self.sums))  # experts of one group may see different numbers of steps
        steps = (mean + 1) // 2, mean // 2
        if selected:
            return strongest_features_of_halves(factors, steps, rows, name=name)
        known = sum(2 * pair.shape[1] for pair in factors)
        count = row_count(rows, factors[0].shape[2])
        if count is None or count > known:
            raise ValueError(
                f"{name}: {rows!r} rows were asked for, and the statistics hold the leading {known} directions at "
                "most; calibrate with the sizes wanted, or with sizes=None to keep whole gradients"
            )
        return eigenbasis_of_halves(factors, steps, count, name=name)


def _factors(sums: Projections, output: bool) -> Float[Tensor, "2 m n"]:
    """Return `F₁` and `F₂`, with `F₁ᵀF₂` nearly `M₁ᵀM₂`, or `M₁M₂ᵀ` for the output side.

    A single gradient stands for both halves.
    """
    factors = sums.right.mT if output else sums.left
    return factors if sums.n_gradients > 1 else factors[:1].expand(2, -1, -1)
