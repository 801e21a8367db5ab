"""What the sums of calibration take, and how wide their projections are. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .sizes import Sizes, row_count

_MOST_NUMBERS = 24_000_000
"""The sums of a model take at most so many numbers (96 MB in float32), or an eighth of the layers' entries. The random
vectors are not counted; sides of one size share them."""
_EXTRA = 8
_FEATURE_WIDTH = 32  # random vectors for products of rows or columns

Widths = tuple[int, int]
"""(w, w'), the numbers of random vectors of a layer."""


@dataclass(frozen=True)
class SumsOf:
    """What the sums of a group of layers take, or of several groups of one kind."""

    layers: int
    out: int
    in_: int
    sizes: Sizes | None
    groups: int = 1

    @property
    def entries(self) -> int:
        """Entries of the layers."""
        return self.groups * self.layers * self.out * self.in_

    @property
    def grams(self) -> int:
        """Numbers of the Gram matrices of both sides, or of the diagonal for a side that selects features."""
        select_out, select_in = (False, False) if self.sizes is None else self.sizes.selected(self.out, self.in_)
        of_group = (self.out if select_out else self.out**2) + (self.in_ if select_in else self.in_**2)
        return self.groups * of_group

    @property
    def whole(self) -> int:
        """Numbers of the whole sums: the Gram matrices, and `M` of each layer, see `pairs.py`."""
        return self.grams + self.entries

    def projected(self, widths: Widths) -> int:
        """Numbers of the projections of both halves."""
        return 2 * self.groups * self.layers * (widths[0] * self.in_ + widths[1] * self.out)

    @property
    def least_widths(self) -> Widths | None:
        """The widths for the rows asked for. None: these depend on the spectrum, or projections save less than half."""
        if self.sizes is None:
            return None
        r, c = self.sizes.of(self.out, self.in_)
        select_out, select_in = self.sizes.selected(self.out, self.in_)
        count_in, count_out = row_count(c, self.in_), row_count(r, self.out)
        if count_in is None or count_out is None:
            return None
        widths = (
            _FEATURE_WIDTH if select_in else 2 * count_in + _EXTRA,
            _FEATURE_WIDTH if select_out else 2 * count_out + _EXTRA,
        )
        return widths if 2 * self.projected(widths) <= self.whole else None


def projection_widths(groups: Mapping[str, SumsOf]) -> dict[str, Widths]:
    """Return the widths of the projections, for each group whose sums are projected.

    All sums stay whole if they take at most 24 million numbers together, or an eighth of the number of the layers'
    entries. If they take more, they are projected where that saves at least half, as wide as the limit allows.
    """
    limit = max(_MOST_NUMBERS, sum(group.entries for group in groups.values()) // 8)
    if sum(group.whole for group in groups.values()) <= limit:
        return {}
    least = {name: group.least_widths for name, group in groups.items()}
    whole = sum(group.whole for name, group in groups.items() if least[name] is None)
    projected = sum(groups[name].projected(widths) for name, widths in least.items() if widths is not None)
    wider = max(1.0, (limit - whole) / max(projected, 1))
    wanted = {
        name: (int(wider * widths[0]), int(wider * widths[1])) for name, widths in least.items() if widths is not None
    }
    return {name: widths for name, widths in wanted.items() if groups[name].projected(widths) < groups[name].whole}
