"""Rows of the bases, by the shape of a layer."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_peft.method.calibrate import Calibration
from sparsegrad_peft.method.gram import GramStatistics
from sparsegrad_peft.method.sizes import Sizes


@pytest.mark.parametrize(
    ("sizes", "out_features", "in_features", "counts"),
    [
        (Sizes(narrow=5, wide=3), 32, 8, (3, 5)),  # up-projection: the hidden size is its input
        (Sizes(narrow=5, wide=3), 8, 32, (5, 3)),  # down-projection
        (Sizes(narrow=5, wide=3), 8, 8, (3, 5)),  # a square layer: its input counts as the hidden side
        (Sizes(narrow=5, wide=3, c=7), 32, 8, (3, 7)),
        (Sizes(narrow=5, wide=3, c=7, r=2), 8, 32, (2, 7)),
        (Sizes(), 8, 32, (8, 32)),
        (Sizes(narrow=0.33, wide=0.03), 3072, 768, (96, 256)),
        (Sizes(narrow="energy:0.5", wide=0.03), 768, 3072, (None, 96)),
    ],
)
def test_counts(sizes: Sizes, out_features: int, in_features: int, counts: tuple[int | None, int | None]) -> None:
    assert sizes.counts(out_features, in_features) == counts


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (Sizes(narrow=9), r"narrow, group up: expected .* a count from 1 to 8"),
        (Sizes(wide=33), r"wide, group up: expected .* a count from 1 to 32"),
        (Sizes(c=9), r"c, group up: expected .* a count from 1 to 8"),
        (Sizes(r=33), r"r, group up: expected .* a count from 1 to 32"),
    ],
)
def test_too_many(sizes: Sizes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sizes.check(32, 8, "group up")


def test_of_groups_of_two_shapes() -> None:
    grams = {
        name: GramStatistics(name, (name,), torch.zeros(n_in, n_in), torch.zeros(n_out, n_out))
        for name, n_out, n_in in (("up", 32, 8), ("down", 8, 32))
    }
    generator = torch.Generator().manual_seed(0)
    for gram in grams.values():
        for _ in range(10):
            gram.add(torch.randn(len(gram.gram_out), len(gram.gram_in), generator=generator))
    bases = Calibration(grams).bases(sizes=Sizes(narrow=6, wide=4))
    assert {name: (len(basis.V), len(basis.U)) for name, basis in bases.items()} == {"up": (4, 6), "down": (6, 4)}


@pytest.mark.parametrize(
    ("sizes", "complete"),
    [
        (Sizes(c=1.0, r=1.0), True),
        (Sizes(1.0, "full"), True),
        (Sizes(c=1.0, r=0.999), False),
        (Sizes(None, None), False),
    ],
)
def test_a_fraction_of_one_is_complete(sizes: Sizes, complete: bool) -> None:
    assert sizes.complete is complete


def test_directions_on_both_sides_are_balanced() -> None:
    """The default makes the bases of the two sides about equally large, where a third of the hidden side allows it."""
    r, c = Sizes(None, None).counts(11008, 4096)
    assert (r, c) == (408, 1104)
    assert r * 11008 == pytest.approx(c * 4096, rel=0.02)
    assert r * c == pytest.approx(0.01 * 11008 * 4096, rel=0.01)
    assert Sizes(None, None).counts(384, 1536) == (128, 48)
