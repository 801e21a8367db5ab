"""How many rows of a basis to keep: the forms a user may give, and the row count for a layer. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

Rows = int | float | str
"""How many rows of a basis to keep: `"full"`, a count (int), a fraction (float), or a share of energy (`"energy:0.9"`).

A fraction that makes 16 rows or more gives the nearest multiple of 8: 0.1 of 768 directions is 80, of 3072 it is 304.
"""

DEFAULT_SHARE = 0.01
"""Default share of a layer's entries that train."""
DEFAULT_EXPONENT = 1.5
"""Default exponent in the scales of the core's entries, see `Statistics.basis`."""
_DIRECTIONS = 1 / 32  # default rows for a layer's smaller side, the hidden size
_FEWEST_DIRECTIONS, _MOST_DIRECTIONS = 64, 128
_LARGEST_NARROW = 0.33  # and, to rounding, never more than this share of it

_INDEX = 4  # bytes of an int32
_ALIGN = 8  # a size that the matrix units of CPUs and GPUs are made for


def default_form(neurons: bool | None, exponent: float | None, *, plain: bool, shared: bool) -> tuple[bool, float]:
    """Return (neurons, exponent of the scales) with the defaults in place of None.

    Args:
        neurons: see `Sizes`.
        exponent: see `Statistics.basis`.
        plain: the sizes are given by side (`c`, `r`), as for the paper's bases: no neurons and no scales by default.
        shared: layers share their bases, and neurons of different layers have nothing in common.
    """
    if neurons is None:
        neurons = not plain and not shared
    if exponent is None:
        exponent = 0.0 if plain else DEFAULT_EXPONENT
    return neurons, exponent


def check_rows(rows: Rows, n: int | None, what: str) -> None:
    """Raise unless `rows` is a valid size for a side of `n` directions (None if the layers are not known yet).

    `what` names the side in the message.
    """
    count = "a count of at least 1" if n is None else f"a count from 1 to {n}"
    expected = f'expected "full", {count}, a fraction in (0, 1], or "energy:SHARE" with a share in (0, 1]'
    if isinstance(rows, bool) or not isinstance(rows, int | float | str):
        raise TypeError(f"{what}: {expected}; found {rows!r}")
    if isinstance(rows, int):
        valid = rows >= 1 and (n is None or rows <= n)
    elif isinstance(rows, float):
        valid = 0 < rows <= 1
    else:
        valid = rows == "full" or parse_energy(rows) is not None
    if not valid:
        raise ValueError(f"{what}: {expected}; found {rows!r}")


def parse_energy(rows: str) -> float | None:
    """Return the share in "energy:SHARE", or None if `rows` has another form."""
    name, _, share = rows.partition(":")
    try:
        return float(share) if name == "energy" and 0 < float(share) <= 1 else None
    except ValueError:
        return None


def row_count(rows: Rows, n: int) -> int | None:
    """Return the row count, or None if it depends on the spectrum."""
    if isinstance(rows, int):
        return rows
    if isinstance(rows, float):
        rounding = 1e-9  # 3/47 of 47 is 3, not the 2.9999999999999996 that floats make of it
        if rows * n >= 2 * _ALIGN - rounding and rows < 1:
            return min(n, _ALIGN * round(rows * n / _ALIGN))
        return max(1, math.floor(rows * n + rounding))
    return n if rows == "full" else None


def default_directions(hidden_size: int) -> int:
    """Return a thirty-second of the hidden size, but from 64 to 128, and at most about a third of it."""
    wanted = min(max(row_count(_DIRECTIONS, hidden_size) or 1, _FEWEST_DIRECTIONS), _MOST_DIRECTIONS)
    return min(wanted, row_count(_LARGEST_NARROW, hidden_size) or hidden_size)


def balanced_directions(hidden_size: int, wide_size: int, share: float) -> int:
    """Return how many directions of the hidden side make the two bases of a layer equally large, at most about a third.

    With `c` directions of the hidden side and `r` of the wide side, the bases hold `c·hidden + r·wide` numbers. For a
    given `r·c = share·hidden·wide` that is least at `c = √share · wide`.
    """
    wanted = row_count(min(share**0.5, 1.0), wide_size) or 1
    return min(wanted, row_count(_LARGEST_NARROW, hidden_size) or hidden_size)


@dataclass(frozen=True)
class Sizes:
    """Rows of `U` and `V` for layers of any shape.

    An MLP's layers have the hidden size on one side and a larger size on the other; up- and down-projection swap the
    two. A direction of the hidden side costs a fraction of one of the wide side, in memory and in multiply-adds, so the
    two sides have separate sizes.
    """

    narrow: Rows | None = "full"
    """rows for a layer's smaller side, the hidden size; the input side if both are equal. None: `default_directions`
    where the larger side selects features, else `balanced_directions`"""
    wide: Rows | None = "full"
    "rows for its larger side. None: as many as make `share` of the layer's entries"
    c: Rows | None = None
    "rows for the input side (`U`) of every layer, in place of the two above"
    r: Rows | None = None
    "rows for the output side (`V`) of every layer, likewise"
    share: float = DEFAULT_SHARE
    "share of a layer's entries that train, where `wide` is None"
    neurons: bool = False
    "the larger side selects features (an MLP's neurons) and rotates nothing"

    def selected(self, out_features: int, in_features: int) -> tuple[bool, bool]:
        """Return whether (the output side, the input side) of a layer of that shape selects features."""
        return self.neurons and in_features <= out_features, self.neurons and in_features > out_features

    def of(self, out_features: int, in_features: int) -> tuple[Rows, Rows]:
        """Return (r, c) for a layer of that shape, with the defaults in place of None.

        `share` may need more directions than the default of `narrow`, even with all rows of the wide side. If `narrow`
        is a share of energy, the default of `wide` is that for the default of `narrow`; `Calibration.bases` puts the
        number of directions in its place.
        """
        small, large, wide = min(out_features, in_features), max(out_features, in_features), self.wide
        usual = default_directions(small) if self.neurons else balanced_directions(small, large, self.share)
        least = math.ceil(self.share * small) if wide is None else 0  # directions for the share, with all wide rows
        default = max(usual, least)
        narrow = default if self.narrow is None else self.narrow
        if wide is None:
            fraction = self.share * small / (row_count(narrow, small) or default)
            wide = fraction if fraction < 1 else "full"
        r, c = (wide, narrow) if in_features <= out_features else (narrow, wide)
        return (r if self.r is None else self.r, c if self.c is None else self.c)

    @property
    def by_side(self) -> bool:
        """True if the sizes are given as `c` or `r`, as for the paper's bases."""
        return self.c is not None or self.r is not None

    @property
    def complete(self) -> bool:
        """True if both sides of every layer are complete."""
        return all(row_count(rows, 1 << 20) == 1 << 20 for shape in ((1, 2), (2, 1)) for rows in self.of(*shape))

    def check(self, out_features: int, in_features: int, whose: str) -> tuple[Rows, Rows]:
        """Return (r, c) for a layer of that shape, checked against it.

        Raises:
            ValueError: one of them is above the layer's size. The message names the setting and `whose` layer it is.
        """
        r, c = self.of(out_features, in_features)
        small_in = in_features <= out_features
        r_name = "r" if self.r is not None else "wide" if small_in else "narrow"
        c_name = "c" if self.c is not None else "narrow" if small_in else "wide"
        check_rows(r, out_features, f"{r_name}, {whose}")
        check_rows(c, in_features, f"{c_name}, {whose}")
        return r, c

    def counts(self, out_features: int, in_features: int) -> tuple[int | None, int | None]:
        """Return (r, c) as row counts; None if one depends on the spectrum."""
        r, c = self.of(out_features, in_features)
        return row_count(r, out_features), row_count(c, in_features)

    def basis_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """Return the bytes of the basis of a layer: directions of `itemsize` bytes a number, int32 indices of features.

        A side whose size depends on the spectrum counts as 0.
        """
        r, c = self.counts(out_features, in_features)
        select_out, select_in = self.selected(out_features, in_features)
        V = (r or 0) * (_INDEX if select_out else out_features * itemsize)
        U = (c or 0) * (_INDEX if select_in else in_features * itemsize)
        return V + U

    def __str__(self) -> str:
        default = "a thirty-second, from 64 to 128" if self.neurons else "as many as make both bases equally large"
        narrow = default if self.narrow is None else self.narrow
        wide = f"{self.share:g} of the entries" if self.wide is None else self.wide
        given = {"narrow": narrow, "wide": wide, "c": self.c, "r": self.r}
        if self.c is not None and self.r is not None:
            given = {"c": self.c, "r": self.r}
        return ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None)
