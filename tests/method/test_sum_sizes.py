"""What the sums of calibration take, and when they are projected."""

from __future__ import annotations

import pytest

from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.method.sum_sizes import SumsOf, Widths, projection_widths

NEURONS = Sizes(None, None, neurons=True)


def of_model(blocks: int, hidden: int, inner: int, sizes: Sizes | None = NEURONS) -> dict[str, SumsOf]:
    """The sums of the MLPs of a LLaMA-like model, a basis for each layer."""
    return {
        "gate": SumsOf(1, inner, hidden, sizes, blocks),
        "up": SumsOf(1, inner, hidden, sizes, blocks),
        "down": SumsOf(1, hidden, inner, sizes, blocks),
    }


def numbers(groups: dict[str, SumsOf], widths: dict[str, Widths]) -> int:
    return sum(group.projected(widths[name]) if name in widths else group.whole for name, group in groups.items())


def test_counts() -> None:
    up = SumsOf(2, 30, 20, Sizes(4, 5, neurons=True))
    assert up.grams == 20 * 20 + 30
    assert up.whole == up.grams + 2 * 30 * 20
    assert up.projected((6, 7)) == 2 * 2 * (6 * 20 + 30 * 7)
    assert SumsOf(2, 30, 20, None).grams == 20 * 20 + 30 * 30
    several = SumsOf(2, 30, 20, Sizes(4, 5, neurons=True), groups=3)
    assert (several.grams, several.whole, several.projected((6, 7))) == (
        3 * up.grams, 3 * up.whole, 3 * up.projected((6, 7)),
    )  # fmt: skip


def test_the_sums_of_a_small_model_stay_whole() -> None:
    assert projection_widths(of_model(6, 384, 1536)) == {}
    assert projection_widths(of_model(6, 576, 1536)) == {}  # a part of a larger one


@pytest.mark.parametrize(("blocks", "hidden", "inner"), [(30, 576, 1536), (24, 1024, 4096), (32, 4096, 11008)])
def test_those_of_a_large_model_are_as_wide_as_the_limit_allows(blocks: int, hidden: int, inner: int) -> None:
    groups = of_model(blocks, hidden, inner)
    widths = projection_widths(groups)
    assert set(widths) == set(groups)
    limit = max(24_000_000, 3 * blocks * hidden * inner // 8)
    taken, least = numbers(groups, widths), sum(g.projected(g.least_widths) for g in groups.values() if g.least_widths)
    assert 0.97 * limit < taken <= max(limit, least)
    rows = NEURONS.counts(inner, hidden)[1]
    assert rows is not None
    assert widths["up"][0] >= 2 * rows + 8
    assert widths["up"][1] >= 32
    assert widths["down"] == widths["up"][::-1]


def test_llama_2_7b() -> None:
    """The default's calibration holds at most 4 GB there, and its adapter, with float32 cores, at most 400 MB."""
    groups = of_model(32, 4096, 11008)
    assert 2.0e9 < 4 * numbers(groups, projection_widths(groups)) < 2.2e9
    wide, narrow = map(int, NEURONS.counts(11008, 4096))  # type: ignore[arg-type]
    assert 96 * (4 * wide * narrow + 2 * narrow * 4096 + 4 * wide) == 275_030_016 < 400e6


@pytest.mark.parametrize("sizes", [None, Sizes("energy:0.9", 66, neurons=True), Sizes("full", 66, neurons=True)])
def test_sizes_that_need_the_whole_spectrum_keep_the_whole_sums(sizes: Sizes | None) -> None:
    assert projection_widths(of_model(30, 576, 1536, sizes)) == {}


def test_a_group_that_cannot_be_projected_takes_from_the_limit() -> None:
    groups = {**of_model(60, 576, 1536), "other": SumsOf(1, 1000, 1000, None, 4)}
    alone, beside = projection_widths(of_model(60, 576, 1536)), projection_widths(groups)
    assert set(beside) == set(alone)
    assert beside["up"] <= alone["up"]
