"""What all kinds of statistics do alike: GramStatistics, PairStatistics, ProjectedStatistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import F64
from sparsegrad_peft import GramStatistics, PairStatistics, ProjectedStatistics
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.experts import ExpertLayout
from sparsegrad_peft.method.hosvd import StrongestFeatures
from sparsegrad_peft.method.projected import Projections, random_vectors
from sparsegrad_peft.method.statistics import Statistics, _scale

Selected = tuple[bool, bool]
"""Whether the output and the input side select features."""
Make = Callable[..., Statistics]


def grams(out: int, in_: int, dtype: torch.dtype, selected: Selected) -> tuple[Tensor, Tensor]:
    """Return zeros for the input and the output side."""
    return tuple(
        torch.zeros((n,) if diagonal else (n, n), dtype=dtype)
        for n, diagonal in ((in_, selected[1]), (out, selected[0]))
    )  # type: ignore[return-value]


def make_gram(
    out: int, in_: int, dtype: torch.dtype = F64, selected: Selected = (False, False), layer: str = "a"
) -> Statistics:
    return GramStatistics("g", (layer,), *grams(out, in_, dtype, selected))


def make_pairs(
    out: int, in_: int, dtype: torch.dtype = F64, selected: Selected = (False, False), layer: str = "a"
) -> Statistics:
    M = {layer: torch.zeros(out, in_, dtype=dtype)}
    return PairStatistics("g", (layer,), *grams(out, in_, dtype, selected), M)


def make_projected(
    out: int, in_: int, dtype: torch.dtype = F64, selected: Selected = (False, False), layer: str = "a"
) -> Statistics:
    like = torch.empty(0, dtype=dtype)
    sums = Projections(torch.zeros(2, 4, in_, dtype=dtype), torch.zeros(2, out, 5, dtype=dtype))
    return ProjectedStatistics("g", (layer,), random_vectors(out, 4, like), random_vectors(in_, 5, like), {layer: sums})


def sums_of(statistics: Statistics) -> list[Tensor]:
    if isinstance(statistics, ProjectedStatistics):
        return [side for sums in statistics.sums.values() for side in (sums.left, sums.right)]
    assert isinstance(statistics, GramStatistics)
    whole = list(statistics.M.values()) if isinstance(statistics, PairStatistics) else []
    return [statistics.gram_in, statistics.gram_out, *whole]


kinds = pytest.mark.parametrize("make", [make_gram, make_pairs, make_projected])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("normalize", [True, False])
def test_add_leaves_the_gradient_alone_and_a_zero_gradient_adds_nothing(
    make: Make, dtype: torch.dtype, normalize: bool
) -> None:
    """A trajectory's update uses the same gradient afterwards."""
    statistics, G = make(4, 6, dtype), torch.randn(4, 6, dtype=dtype)
    given = G.clone()
    statistics.add(G, normalize=normalize)
    before = [tensor.clone() for tensor in sums_of(statistics)]
    statistics.add(torch.zeros_like(G), normalize=normalize)
    assert torch.equal(G, given)
    assert all(map(torch.equal, sums_of(statistics), before))
    assert statistics.n_gradients == 2


@kinds
@pytest.mark.parametrize("stacks_out", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_fused_experts_are_one_matrix(make: Make, stacks_out: bool, normalize: bool) -> None:
    layout = ExpertLayout(3, 4, 5, stacks_out, False) if stacks_out else ExpertLayout(3, 5, 4, stacks_out, False)
    whole, fused = (make(*layout.shape, selected=(stacks_out, not stacks_out)) for _ in range(2))
    gradients = torch.randn(3, 3, layout.out, layout.in_, dtype=F64)
    gradients[:, 1] = 0  # an expert without tokens
    for G in gradients:
        fused.add(G, normalize=normalize)
        whole.add(reference.stacked(G, stacks_out), normalize=normalize)
    for found, expected in zip(sums_of(fused), sums_of(whole), strict=True):
        torch.testing.assert_close(found, expected)


@kinds
@pytest.mark.parametrize(
    ("value", "message"), [(0.0, r"has energy 0: no gradient reached"), (float("nan"), "not finite")]
)
@pytest.mark.parametrize("selected", [True, False])
def test_nothing_to_choose_from(make: Make, value: float, message: str, selected: bool) -> None:
    statistics = make(6, 5, torch.float32, layer="mlp.fc")
    statistics.add(torch.full((6, 5), value))
    with pytest.raises(ValueError, match=rf"group 'g' \(mlp\.fc\), (input|output) side.*{message}"):
        statistics.basis(c=1, r=1, selected=(selected, False))


@pytest.mark.parametrize("make", [make_pairs, make_projected])
@pytest.mark.parametrize("selected", [True, False])
def test_the_share_that_steps_have_in_common(make: Make, selected: bool) -> None:
    """A signal in the first feature of either side, and noise of a known size in all entries."""
    torch.manual_seed(0)
    statistics, signal = make(40, 30), 6.0
    for _ in range(300):
        G = torch.randn(40, 30, dtype=F64)
        G[0, 0] += signal
        statistics.add(G)
    for output, n in ((False, 40), (True, 30)):  # the other side's features are what the noise is summed over
        side = statistics.decompose(output, 1, selected, "g")
        assert side.common is not None
        assert float(side.common) == pytest.approx(
            signal**2 / (signal**2 + n), rel=0.35 if make is make_projected else 0.1
        )


@pytest.mark.parametrize("make", [make_pairs, make_projected])
@pytest.mark.parametrize("selected", [True, False])
def test_steps_that_disagree_everywhere_count_as_one(make: Make, selected: bool) -> None:
    """No direction and no neuron has a positive product then. The basis is that of the sum of all gradients."""
    G = torch.randn(5, 6, dtype=F64)
    found, expected = make(5, 6), make(5, 6)
    found.add(3 * G)
    found.add(-G)
    expected.add(2 * G)
    one, other = (s.basis(c=2, r=3, selected=(selected, False), exponent=0.5, dtype=F64) for s in (found, expected))
    for name, value in one.named_buffers():
        torch.testing.assert_close(value, other.get_buffer(name))


def test_directions_that_are_all_noise_have_equal_scales() -> None:
    """No share is above 0, and no scale is NaN."""
    noise = StrongestFeatures(torch.arange(3), torch.ones(3), torch.ones(3), common=torch.zeros(3))
    assert _scale(noise, 1.5).tolist() == [1.0, 1.0, 1.0]
