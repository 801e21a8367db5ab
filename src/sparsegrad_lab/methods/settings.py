"""Settings of the methods. The docstring under a field is its help on the command line. Light: imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sparsegrad_peft.method.sizes import DEFAULT_NARROW, DEFAULT_WIDE, Sizes, check_rows


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, and their description for error messages."""

    description: str
    contains: Callable[[float], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SELECTED_SHARE = Range("above 0 and at most 1", lambda value: 0 < value <= 1)


def range_problems(group: str, settings: Any, ranges: Mapping[str, Range]) -> list[str]:
    """Fields of a dataclass that are outside their range. None is valid if the field's type allows it.

    Args:
        group: name of the dataclass in `RunArguments`, for the messages.
        settings: an instance of the dataclass.
        ranges: field name -> valid numbers.
    """
    optional = {field.name for field in fields(settings) if "None" in str(field.type)}
    problems = []
    for name, expected in ranges.items():
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not expected.contains(value):
            problems.append(f"{group}.{name} must be {expected.description}, found {value}")
    return problems


@dataclass
class AdapterArguments:
    """The adapter of the MLP layers."""

    narrow: int | float | str = DEFAULT_NARROW
    """sparsegrad: basis vectors of a layer's smaller side: "full", a count, a fraction of the side, or "energy:0.9"
    (enough for this share of the gradients' energy)"""
    wide: int | float | str = DEFAULT_WIDE
    "sparsegrad: basis vectors of a layer's larger side, in the same forms"
    c: int | float | str | None = None
    "sparsegrad: basis vectors of each layer's input side (rows of U); replaces narrow and wide"
    r: int | float | str | None = None
    "sparsegrad: basis vectors of each layer's output side (rows of V); replaces narrow and wide; not a LoRA rank"
    shared: bool = False
    "sparsegrad, literal: layers with the same role and shape share one pair of bases; default: each layer has its own"
    prefer: Literal["memory", "speed"] = "memory"
    'sparsegrad: "memory" saves the projected input for backward; "speed" takes the fewest multiply-adds'
    density: float | None = None
    """sparsegrad, meprop, literal: share of a layer's trained entries that each step updates; default: all for
    sparsegrad, 0.01 for meprop and literal"""
    k: int | None = None
    "sparsegrad, meprop, literal: number of entries that each step updates in a layer; replaces density"
    products: Literal["regular", "sparse"] = "regular"
    'literal: "regular" uses dense matrix products, "sparse" the paper\'s sparse-by-dense products'
    rank: int | None = None
    """lora: rank; default: the rank that trains about as many entries as sparsegrad with the sizes above. galore: rank
    of the projected gradients; default: a quarter of the layers' smallest side"""
    target_modules: str | list[str] | None = None
    "layers to adapt, as in PEFT: name endings or a regular expression; default: the MLP layers"
    layers: list[int] | None = None
    "adapt only the blocks with these numbers, counted from 0; default: all"

    @property
    def sizes(self) -> Sizes:
        """Sizes of the bases, by the shape of a layer."""
        return Sizes(self.narrow, self.wide, self.c, self.r)

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        problems = range_problems("adapter", self, {"density": SELECTED_SHARE, "k": COUNT, "rank": COUNT})
        for name in ("narrow", "wide", "c", "r"):
            rows = getattr(self, name)
            try:
                if rows is not None or name in ("narrow", "wide"):
                    check_rows(rows, None, f"adapter.{name}")
            except (TypeError, ValueError) as error:
                problems.append(str(error))
        if self.prefer not in ("memory", "speed"):
            problems.append(f"adapter.prefer: expected memory or speed, found {self.prefer!r}")
        if self.density is not None and self.k is not None:
            problems.append(f"adapter.density ({self.density}) and adapter.k ({self.k}) exclude each other; give one")
        if self.layers is not None and not (self.layers and min(self.layers) >= 0):
            problems.append(f"adapter.layers: expected block numbers, counted from 0; found {self.layers}")
        return problems


@dataclass
class CalibrationArguments:
    """sparsegrad, literal: the backward passes from which the bases are computed."""

    n_steps: int = 30
    "number of backward passes"
    walk: float | None = 1e-4
    """step size of a short trial training along which the gradients are collected; it is undone afterwards; null:
    collect all gradients at the pretrained weights"""
    normalize: bool = True
    "scale each gradient to norm 1, so that all backward passes count the same"
    refresh: int | None = None
    "compute new bases every so many training steps; only for complete bases (adapter.c and r: full); default: never"

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        return range_problems("calibration", self, {"n_steps": COUNT, "refresh": COUNT, "walk": POSITIVE})
