"""Settings of the methods. The docstring under a field is its help on the command line. Light: imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sparsegrad_peft.method.sizes import DEFAULT_SHARE, Sizes, check_rows, default_form

from .ranges import COUNT, POSITIVE, SELECTED_SHARE, pattern_problems, range_problems


@dataclass
class AdapterArguments:
    """The adapter of the MLP layers."""

    narrow: int | float | str | None = None
    """sparsegrad: number of directions of a layer's smaller side (the hidden size): "full", a count, a fraction of the
    side, or "energy:0.9" (enough for this share of the gradients' energy); default: hidden size / 32, from 64 to 128;
    with neurons false: as many as make both bases equally large; at most about a third of the side"""
    wide: int | float | str | None = None
    """sparsegrad: number of neurons (or directions) of a layer's larger side, in the same forms; default: as many as
    make trained_share"""
    trained_share: float = DEFAULT_SHARE
    "sparsegrad: share of a layer's entries that train, if wide is not given"
    neurons: bool | None = None
    """sparsegrad: the larger side selects neurons and has no directions; default: true, but false with shared, c
    or r"""
    exponent: float | None = None
    """sparsegrad: from 0 to 2. 0: all entries move alike; larger: entries of noisy directions move less; default: 1.5,
    but 0 with c or r"""
    c: int | float | str | None = None
    "sparsegrad: number of directions of each layer's input side (rows of U); with r, in place of narrow and wide"
    r: int | float | str | None = None
    "sparsegrad: number of directions of each layer's output side (rows of V); with c; not a LoRA rank"
    shared: bool = False
    "sparsegrad, literal: layers with the same role and shape share one pair of bases; default: each layer has its own"
    prefer: Literal["memory", "speed"] = "memory"
    """sparsegrad with directions on both sides: "memory" saves the projected input for backward; "speed" takes the
    fewest multiply-adds"""
    density: float | None = None
    """sparsegrad, meprop, literal: share of a layer's trained entries that each step updates; default: all for
    sparsegrad, 0.01 for meprop and literal"""
    k: int | None = None
    "sparsegrad, meprop, literal: number of entries that each step updates in a layer; replaces density"
    products: Literal["regular", "sparse"] = "regular"
    'literal: "regular" uses dense matrix products, "sparse" the paper\'s sparse-by-dense products'
    rank: int | None = None
    """not for sparsegrad. lora: its rank; default: the rank that trains about as many entries as sparsegrad with the
    sizes above. galore: rank of the projected gradients; default: a quarter of the layers' smallest side"""
    target_modules: str | list[str] | None = None
    "layers to adapt, as in PEFT: name endings or a regular expression; default: the MLP layers"
    layers: list[int] | None = None
    "adapt only the blocks with these numbers, counted from 0; default: all"

    def resolved(self) -> dict[str, Any]:
        """The settings with defaults in their place, without those that have no effect; equal for equal adapters."""
        neurons, exponent = self.form
        return {**asdict(self), "neurons": neurons, "exponent": exponent, **dict.fromkeys(self.replaced)}

    @property
    def replaced(self) -> dict[str, str]:
        """Sizes that have no effect, and the settings that decide in their place."""
        if self.c is not None and self.r is not None:
            return dict.fromkeys(("narrow", "wide", "trained_share"), "c and r")
        decided = self.wide is not None and (self.narrow is not None or self.form[0])
        return {"trained_share": "wide"} if decided else {}

    @property
    def sizes(self) -> Sizes:
        """Sizes of the bases, by the shape of a layer."""
        return Sizes(self.narrow, self.wide, self.c, self.r, self.trained_share, self.form[0])

    @property
    def form(self) -> tuple[bool, float]:
        """(neurons, exponent), with their defaults."""
        plain = self.c is not None or self.r is not None
        return default_form(self.neurons, self.exponent, plain=plain, shared=self.shared)

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        ranges = {"density": SELECTED_SHARE, "trained_share": SELECTED_SHARE, "k": COUNT, "rank": COUNT}
        problems = range_problems("adapter", self, ranges)
        if self.exponent is not None and not 0 <= self.exponent <= 2:
            problems.append(f"adapter.exponent must be from 0 to 2, found {self.exponent}")
        if self.neurons and self.shared:
            problems.append("adapter.neurons and adapter.shared exclude each other: layers share no neurons")
        for name in ("narrow", "wide", "c", "r"):
            rows = getattr(self, name)
            try:
                if rows is not None:
                    check_rows(rows, None, f"adapter.{name}")
            except (TypeError, ValueError) as error:
                problems.append(str(error))
        if (self.c is None) != (self.r is None):
            problems.append(f"adapter.c and adapter.r belong together, found c = {self.c} and r = {self.r}")
        if self.prefer not in ("memory", "speed"):
            problems.append(f"adapter.prefer: expected memory or speed, found {self.prefer!r}")
        if self.density is not None and self.k is not None:
            problems.append(f"adapter.density ({self.density}) and adapter.k ({self.k}) exclude each other; give one")
        problems += pattern_problems("adapter.target_modules", self.target_modules)
        if self.layers is not None and not (self.layers and min(self.layers) >= 0):
            problems.append(f"adapter.layers: expected block numbers, counted from 0; found {self.layers}")
        return problems


@dataclass
class CalibrationArguments:
    """sparsegrad, literal: the backward passes from which the bases are computed."""

    n_steps: int = 30
    "number of backward passes"
    walk: float | None = 1e-4
    """learning rate of the trajectory: a short training run along which calibration collects gradients, and which is
    undone afterwards; null: collect all gradients at the pretrained weights"""
    normalize: bool = True
    "scale each gradient to norm 1, so that all backward passes count the same"
    mean_gradient: bool | None = None
    """compute the bases from products of the gradients of different steps, in which their noise cancels; false: from
    the Gram matrix of every single gradient, as in the paper; default: yes, but no with adapter.c or r"""
    refresh: int | None = None
    "compute new bases every so many training steps; only for complete bases (adapter.c and r: full); default: never"

    def resolved(self, sizes: Sizes) -> CalibrationArguments:
        """The settings with the default of `mean_gradient` for these sizes in its place."""
        given = self.mean_gradient
        return replace(self, mean_gradient=not sizes.by_side if given is None else given)

    def problems(self) -> list[str]:
        """What is wrong with these settings, one message each."""
        return range_problems("calibration", self, {"n_steps": COUNT, "refresh": COUNT, "walk": POSITIVE})


def updated(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's nested settings with what an earlier version did without saying so.

    It had directions on both sides, unscaled, and decomposed single gradients.
    """
    adapter, calibration = settings["adapter"], {"mean_gradient": False, **settings["calibration"]}
    earlier = {} if "neurons" in adapter else {"neurons": False, "exponent": 0.0}
    return {**settings, "adapter": {**adapter, **earlier}, "calibration": calibration}


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings, of this or an earlier version, in a form that is equal for equal runs.

    Raises:
        KeyError, TypeError: they are no settings of a run.
    """
    settings = updated(settings)
    adapter = AdapterArguments(**settings["adapter"])
    calibration = CalibrationArguments(**settings["calibration"]).resolved(adapter.sizes)
    return {**settings, "adapter": adapter.resolved(), "calibration": asdict(calibration)}
