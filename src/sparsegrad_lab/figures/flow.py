"""Figure 1: where numbers go in a SparseGrad layer, forward and backward. Drawn from no data."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .drawing import Drawing

FROZEN, BASIS, TRAINED, GRADIENT, PLAIN = "#d9d9d9", "#cfe2f3", "#fce5cd", "#f4cccc", "#ffffff"
FORWARD, BACKWARD, SAVED = "#20508c", "#a61c00", "#6a6a6a"

BOXES = {  # name: (middle x, middle y, width, colour, first line, second line)
    "x": (1.2, 6.4, 1.6, PLAIN, "x", "(T, in)"),
    "W": (6.6, 8.2, 2.6, FROZEN, "x Wᵀ + b", "W (out, in), frozen"),
    "U": (4.2, 6.4, 2.2, BASIS, "x̃ = x Uᵀ", "U (c, in), frozen"),
    "S": (8.3, 6.4, 2.2, TRAINED, "x̃ Sᵀ", "S (r, c), trained"),
    "V": (11.5, 6.4, 2.2, BASIS, "(x̃ Sᵀ) V", "V (r, out), frozen"),
    "+": (13.9, 6.4, 0.7, PLAIN, "+", ""),
    "y": (15.8, 6.4, 1.6, PLAIN, "y", "(T, out)"),
    "G": (4.2, 4.1, 3.0, GRADIENT, "G̃ = (δVᵀ)ᵀ (xUᵀ)", "= V G Uᵀ   (r, c)"),
    "topk": (8.3, 4.1, 2.6, PLAIN, "top-k", "k largest of |G̃|"),
    "optimizer": (11.5, 4.1, 2.2, PLAIN, "SparseAdam", "step on k entries"),
    "dV": (11.5, 1.9, 2.2, BASIS, "δ̃ = δ Vᵀ", "(T, r)"),
    "delta": (15.8, 1.9, 1.6, GRADIENT, "δ = ∂L/∂y", "(T, out)"),
    "dx": (8.3, 0.1, 3.2, PLAIN, "δ W + δ̃ S U", "W frozen, S and U as above"),
    "dLdx": (1.2, 0.1, 1.6, GRADIENT, "∂L/∂x", "(T, in)"),
}  # fmt: skip
HALF = 0.5
"Half the height of a box."


def data_flow() -> Drawing:
    """The layer as a drawing."""
    figure = Figure(figsize=(13.5, 7.6))
    axes = figure.add_axes((0.005, 0.01, 0.99, 0.92))
    axes.set(xlim=(0, 17), ylim=(-1.35, 9.2))
    axes.axis("off")
    for x, y, width, colour, first, second in BOXES.values():
        axes.add_patch(FancyBboxPatch((x - width / 2, y - HALF), width, 2 * HALF, boxstyle="round,pad=0.02",
                                      facecolor=colour, edgecolor="#333333", linewidth=1.1))  # fmt: skip
        axes.text(x, y + (0.17 if second else 0), first, ha="center", va="center", fontsize=12)
        axes.text(x, y - 0.25, second, ha="center", va="center", fontsize=9, color="#333333")

    def arrow(points: list[tuple[float, float]], colour: str, dashed: bool = False, label: str = "",
              at: tuple[float, float] = (0, 0), align: str = "center") -> None:  # fmt: skip
        style: dict[str, Any] = {"color": colour, "linewidth": 1.7, "linestyle": (0, (5, 3)) if dashed else "-"}
        if len(points) > 2:
            axes.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **style)
        axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0,
                                                              "mutation_scale": 15, **style})  # fmt: skip
        if label:
            axes.text(*at, label, ha=align, va="center", fontsize=10, color=colour)

    def right(name: str) -> tuple[float, float]:
        return BOXES[name][0] + BOXES[name][2] / 2 + 0.04, BOXES[name][1]

    def left(name: str) -> tuple[float, float]:
        return BOXES[name][0] - BOXES[name][2] / 2 - 0.04, BOXES[name][1]

    def edge(name: str, side: int) -> tuple[float, float]:
        return BOXES[name][0], BOXES[name][1] + side * (HALF + 0.04)

    for a, b in (("x", "U"), ("U", "S"), ("S", "V"), ("V", "+"), ("+", "y")):
        arrow([right(a), left(b)], FORWARD)
    arrow([edge("x", 1), (1.2, 8.2), left("W")], FORWARD)
    arrow([right("W"), (13.9, 8.2), edge("+", 1)], FORWARD)
    arrow([edge("U", -1), edge("G", 1)], SAVED, dashed=True, label="x Uᵀ is saved\nfor backward", at=(4.05, 5.25),
          align="right")  # fmt: skip
    arrow([left("delta"), right("dV")], BACKWARD)
    arrow([left("dV"), (4.2, 1.9), edge("G", -1)], BACKWARD, label="δ Vᵀ", at=(7.4, 2.18))
    arrow([right("G"), left("topk")], BACKWARD)
    arrow([right("topk"), left("optimizer")], BACKWARD)
    # Into S from below: a short way to the left above the optimizer, so that nothing is crossed.
    arrow([edge("optimizer", 1), (11.5, 5.25), (8.3, 5.25), edge("S", -1)], BACKWARD, label="S ← S + Δ",
          at=(9.9, 5.5))  # fmt: skip
    arrow([edge("dV", -1), (11.5, 0.3), (right("dx")[0], 0.3)], BACKWARD)
    arrow([edge("delta", -1), (15.8, -0.1), (right("dx")[0], -0.1)], BACKWARD)
    arrow([left("dx"), right("dLdx")], BACKWARD)

    axes.text(0.3, 9.0, "forward", fontsize=12, color=FORWARD, weight="bold")
    axes.text(0.3, 2.9, "backward", fontsize=12, color=BACKWARD, weight="bold")
    legend = ((FROZEN, "frozen weight"), (BASIS, "frozen basis, shared by a group of layers"),
              (TRAINED, "trained core"), (GRADIENT, "gradient"))  # fmt: skip
    for place, (colour, words) in zip((0.5, 3.4, 9.2, 12.3), legend, strict=True):
        axes.add_patch(FancyBboxPatch((place, -1.2), 0.4, 0.26, boxstyle="round,pad=0.02", facecolor=colour,
                                      edgecolor="#333333", linewidth=0.8))  # fmt: skip
        axes.text(place + 0.6, -1.07, words, va="center", fontsize=10)
    title = "Data flow of a SparseGrad layer"
    figure.suptitle(f"{title}:  y = x (W + Vᵀ S U)ᵀ + b", fontsize=14)
    return Drawing(
        "data_flow", title,
        "Forward: x goes through the frozen W, and beside it through x Uᵀ, S and V; the two are added to y. Backward: "
        "delta = dL/dy becomes delta Vᵀ, which with the saved x Uᵀ gives G_tilde = (delta Vᵀ)ᵀ (x Uᵀ); its k largest "
        "entries go to the optimizer, which moves S; dL/dx = delta W + delta Vᵀ S U.",
        "What is kept for backward is x Uᵀ (T, c) in place of x (T, in), and only k entries of S move in a step.",
        figure,
    )  # fmt: skip
