"""Measure how the cost of a step grows with tokens, width and the size of the bases.

    python benchmarks/curves.py

The model is one MLP block. Each point is a run of `sparsegrad bench`. Writes a result file and a plot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from record import environment, parser, write
from sparsegrad_lab.bench.settings import BenchArguments
from sparsegrad_lab.bench.speed import measure

METHODS = ("floor", "sparsegrad", "lora", "full")
WIDTHS = ((256, 1024), (512, 2048), (768, 3072), (1024, 4096), (1536, 6144))


def sweeps(tokens: int) -> list[dict[str, Any]]:
    """Return what each sweep changes, and the settings of its points besides `--workload mlp`."""
    return [
        {"of": "tokens", "words": "Tokens of a step", "points": [(n, {"tokens": n}) for n in (64, 256, 1024, 4096)]},
        {"of": "hidden / wide", "words": f"Width, {tokens:,} tokens",
         "points": [(f"{h} / {w}", {"workload": f"mlp-{h}x{w}"}) for h, w in WIDTHS]},
        {"of": "narrow, wide", "words": f"Rows of the bases, {tokens:,} tokens (a share of each side)",
         "points": [(f"{n:g}, {w:g}", {"narrow": n, "wide": w}) for n, w in
                    ((0.1, 0.1), (0.33, 0.03), (0.66, 0.015), (0.33, 0.1), (0.66, 0.1), (1.0, 1.0))]},
    ]  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the ratio to the floor, a panel for each sweep."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(result["sweeps"]), figsize=(13, 4), sharey=True, layout="constrained")
    for panel, sweep in zip(panels, result["sweeps"], strict=True):
        at = [str(point["at"]) for point in sweep["points"]]
        for method in sweep["points"][0]["ratio_to_floor"]:
            panel.plot(at, [point["ratio_to_floor"][method] for point in sweep["points"]], marker="o", label=method)
        panel.set_title(sweep["words"], fontsize=10)
        panel.set_xlabel(sweep["of"])
        panel.grid(alpha=0.3)
        panel.tick_params(axis="x", labelrotation=20)
    panels[0].set_ylabel("time of a step / floor")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__, "curves.json")
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--repeats", type=int, default=7)
    options = arguments.parse_args()
    result: dict[str, Any] = {
        "benchmark": "curves", "workload": "one MLP block, float32, random weights",
        "environment": environment(options.seed), "sweeps": [],
    }  # fmt: skip
    for sweep in sweeps(options.tokens):
        points = []
        for at, changed in sweep["points"]:
            settings = {
                "workload": "mlp", "tokens": options.tokens, "methods": ",".join(METHODS), "repeats": options.repeats,
                "threads": options.threads, "seed": options.seed, **changed,
            }  # fmt: skip
            found = measure(BenchArguments(**settings))["methods"]
            ratios = {name: found[name]["ratio_to"]["floor"] for name in METHODS if name != "floor"}
            points.append({"at": at, "floor_ms": found["floor"]["step_ms"]["p50"], "ratio_to_floor": ratios})
            print(f"{sweep['of']} {at}: {ratios}", flush=True)
        result["sweeps"].append({"of": sweep["of"], "words": sweep["words"], "points": points})
    result["environment"]["machine"] = (
        result["environment"]["machine"].rpartition(",")[0] + f", {options.threads} threads"
    )
    write(options.json, result)
    draw(result, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
