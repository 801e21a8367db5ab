"""Write the tables of README.md, docs/method.md and docs/performance.md, and docs/results.md, from the result files.

    python benchmarks/tables.py           # write them
    python benchmarks/tables.py --check   # only say whether they are what the files give; exit 1 if not

A table stands between `<!-- table: PATH -->` and `<!-- end of table -->`; `PATH calibration` is another one of a study,
and a folder of speed results gives one line a workload.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from sparsegrad_lab.run.folder import write_whole
from sparsegrad_lab.study.report import bullets
from sparsegrad_lab.study.report import markdown as results_document
from sparsegrad_lab.study.report import origin as origin_of_runs
from sparsegrad_lab.study.sections import read_report, read_sections
from sparsegrad_lab.study.tables import comparisons, scores
from sparsegrad_lab.study.verdict import verdict

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/method.md", "docs/performance.md")
STUDY = "benchmarks/results/study"
GLUE_ROWS = {"sst2": 67349, "cola": 8551, "stsb": 5749, "mrpc": 3668, "rte": 2490}
"Of the whole train sets."
RESULTS_TITLE = "SparseGrad and its peers"
MARK = re.compile(r"(<!-- table: (\S+)( calibration)? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(result: dict[str, Any]) -> str:
    e = result["environment"]
    return (f"{result['workload']}. {e['machine']}, torch {e['torch']}, Python {e['python']}, seed {e['seed']}, commit "
            f"{e['commit'][:10]}{' with changes' if e['dirty'] else ''}: `{e['command']}`")  # fmt: skip


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def targets(result: dict[str, Any]) -> str:
    return "\n".join(
        f"- {'reached' if outcome['reached'] else '**missed**'}: {target} (found {outcome['found']:.4g})"
        for target, outcome in result["targets"].items()
    )


def speed(result: dict[str, Any]) -> str:
    """Time, memory and count of each method of one run of `sparsegrad bench`."""
    header = ["method", "step, ms (p20–p80)", "to floor", "to LoRA", "G multiply-adds, MLP", "peak, MB",
              "kept for backward, MB", "optimizer, MB", "bases, MB", "trained entries"]  # fmt: skip
    rows = []
    for name, row in result["methods"].items():
        words = f"`{name}`: {row['words']}"
        if "step_ms" not in row:
            rows.append([words, "not installed" if "skipped" in row else "failed", *[""] * (len(header) - 2)])
            continue
        ms, to, size = row["step_ms"], row["ratio_to"], row["bytes"]
        rows.append([
            words, f"{ms['p50']:.0f} ({ms['p20']:.0f}–{ms['p80']:.0f})",
            *(f"{to[other]:.2f}" if other in to else "" for other in ("floor", "lora")),
            "" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e9:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            *(megabytes(size[of]) for of in ("kept_for_backward", "optimizer", "bases")),
            f"{size['trainable_entries']:,}",
        ])  # fmt: skip
    e = result["environment"]
    live = result["live_tokens"]
    padding = "" if live == result["arguments"]["tokens"] else f" ({live:,} of them no padding)"
    where = (
        f"{result['workload']}{padding}. {e['device']}, {e['threads']} threads, torch {e['packages']['torch']}, "
        f"transformers {e['packages']['transformers']}, peft {e['packages']['peft']}, seed "
        f"{result['arguments']['seed']}, commit {e['commit'][:10]}: `{result['command']}`"
    )
    blocks = part_of_model(result)
    part = f" with {blocks}" if blocks else ""
    reached = "\n".join(
        f"- {'reached' if found <= most else '**missed**'}{part}: {what} (found {found:.3g})"
        for what, found, most in speed_targets(result["methods"])
    )
    return f"{markdown(header, rows)}\n\n{where}\n\n{reached}"


def part_of_model(result: dict[str, Any]) -> str:
    """ "4 of 12 blocks"; empty for all of them."""
    depth = re.search(r"(\d+) of (\d+) blocks", result["workload"])
    return depth[0] if depth is not None and depth[1] != depth[2] else ""


def speed_overview(path: Path) -> str:
    """The default next to the floor and to LoRA, one line a workload; whole models first."""

    def ratio(rows: dict[str, Any], of: str, to: str) -> str:
        return f"{rows[of]['ratio_to'][to]:.2f}" if of in rows else ""

    lines: list[tuple[bool, list[str]]] = []
    for file in sorted(path.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = {name: row for name, row in result["methods"].items() if "step_ms" in row}
        default, lora = rows["sparsegrad"], rows["lora"]
        lines.append((
            bool(part_of_model(result)),
            [result["workload"].removesuffix(", random weights"), ratio(rows, "sparsegrad", "floor"),
             ratio(rows, "sparsegrad", "lora"), ratio(rows, "sparsegrad-speed", "lora"), ratio(rows, "full", "lora"),
             f"{default['peak_bytes'] / lora['peak_bytes']:.2f}",
             f"{default['bytes']['kept_for_backward'] / lora['bytes']['kept_for_backward']:.2f}"],
        ))  # fmt: skip
    header = ["workload", "step to the floor's", "step to LoRA's", "with prefer=\"speed\"", "full fine-tuning's",
              "peak memory to LoRA's", "kept for backward to LoRA's"]  # fmt: skip
    return markdown(header, [line for _, line in sorted(lines, key=lambda line: line[0])])


def speed_targets(rows: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is aimed at, what was found, and the most that it may be."""
    found: list[tuple[str, float, float]] = []

    def ratio(what: str, a: str, b: str, most: float, of: Any) -> None:
        if all("step_ms" in rows.get(name, {}) for name in (a, b)):
            found.append((what, of(rows[a], rows[b]), most))

    ratio("default at most 1.0x LoRA's time", "sparsegrad", "lora", 1.0, lambda a, b: a["ratio_to"]["lora"])
    ratio("default at most 1.15x the floor's", "sparsegrad", "floor", 1.15, lambda a, b: a["ratio_to"]["floor"])
    ratio(
        "default's peak memory below LoRA's", "sparsegrad", "lora", 1.0, lambda a, b: a["peak_bytes"] / b["peak_bytes"]
    )
    ratio("published method at most a third of the literal layer's time", "sparsegrad-paper", "literal", 1 / 3,
          lambda a, b: a["ratio_to"]["literal"])  # fmt: skip
    ratio("published method's optimizer at most 0.1x full fine-tuning's (so far)", "sparsegrad-paper", "full", 0.1,
          lambda a, b: a["bytes"]["optimizer"] / b["bytes"]["optimizer"])  # fmt: skip
    return found


def decode(result: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", f"{row['token_ms']['p50']:.1f} ({row['token_ms']['p20']:.1f}–{row['token_ms']['p80']:.1f})",
         f"{row['ratio_to_base']:.2f}"]
        for name, row in result["methods"].items()
    ]  # fmt: skip
    header = ["model", "ms a token (p20–p80)", "to base"]
    return f"{markdown(header, rows)}\n\n{origin(result)}\n\n{targets(result)}"


def curves(result: dict[str, Any]) -> str:
    """How the cost grows with one thing at a time."""
    parts = []
    for sweep in result["sweeps"]:
        methods = list(sweep["points"][0]["ratio_to_floor"])
        rows = [
            [str(point["at"]), f"{point['floor_ms']:.1f}", *(f"{point['ratio_to_floor'][m]:.2f}" for m in methods)]
            for point in sweep["points"]
        ]
        parts.append(f"{sweep['words']}:\n\n{markdown([sweep['of'], 'floor, ms', *(f'`{m}`' for m in methods)], rows)}")
    return "\n\n".join([*parts, f"Times to the floor's, p50. {origin(result)}"])


def calibration(result: dict[str, Any]) -> str:
    seconds, size = result["seconds"], result["bytes"]
    rows = [
        ["extra memory at its peak, MB", megabytes(size["peak_extra"]),
         f"{megabytes(size['paper_stack_one_group'])} (stack of 30 gradients, one group)"],
        ["decompositions of both groups, complete bases, s", f"{seconds['complete_bases']:.1f}", ""],
        ["... the leading tenth of each side, s", f"{seconds['leading_tenth']:.1f}", ""],
    ]  # fmt: skip
    if "svd_of_one_stack" in seconds:
        rows.append(["one group of 30 gradients: decomposition, s", f"{seconds['bases_of_one_stack']:.1f}",
                     f"{seconds['svd_of_one_stack']:.1f} (SVD of both unfoldings)"])  # fmt: skip
        rows.append(["... Gram matrices of these 30 gradients, s", f"{seconds['gram_of_one_stack']:.1f}", ""])
    rows.append(["all of calibration but the decompositions, s", f"{seconds['calibrate']:.0f}",
                 f"{seconds['backpropagation_alone']:.0f} (the same backpropagation, gradients dropped)"])  # fmt: skip
    return f"{markdown(['', 'here', 'compared with'], rows)}\n\n{origin(result)}\n\n{targets(result)}"


def energy(result: dict[str, Any]) -> str:
    steps = result["steps"]
    header = ["bases calibrated by"]
    header += [f"after {step} steps: {what}" for step in steps for what in ("top 1 %", "leading block")]
    ways = list(next(iter(steps.values()))["shares"])
    rows = []
    for way in ways:
        row = [way]
        for step in steps.values():
            up, down = step["shares"][way]["up"], step["shares"][way]["down"]
            row += [f"{up[what]:.2f} / {down[what]:.2f}" for what in ("top", "block")]
        rows.append(row)
    return f"{markdown(header, rows)}\n\n{origin(result)}"


def study(path: Path) -> str:
    """Verdict, scores and differences of one experiment, from one result file a run."""
    [section] = read_sections([path])
    parts = [
        bullets(verdict(section)),
        scores(section).markdown(),
        comparisons(section).markdown(),
        origin_of_runs([section]),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def calibration_share(path: Path, epochs: int = 3) -> str:
    """What calibration takes next to training on a whole task, from the runs on samples of it."""
    header = ["task", "calibration, in training steps", f"steps of {epochs} epochs", "share of them"]
    rows = []
    for task, count in GLUE_ROWS.items():
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in path.glob(f"*/{task}/sparsegrad-[0-9]*.json")]
        batch = runs[0]["config"]["training"]["batch_size"]
        taken = median(run["calibration"]["seconds"] / run["training"]["seconds"] * run["steps"] for run in runs)
        steps = epochs * -(-count // batch)
        rows.append([task, f"{taken:.0f}", f"{steps:,}", f"{100 * taken / steps:.1f} %"])
    n_steps = runs[0]["config"]["calibration"]["n_steps"]
    words = f"{n_steps} backward passes along a trajectory and the bases of each layer, MiniLM, batches of {batch}"
    return f"{markdown(header, rows)}\n\n{words}; a training step with its part of the evaluations. Median over seeds."


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "speed": speed,
    "decode": decode,
    "curves": curves,
    "calibration": calibration,
    "energy": energy,
}


def filled(text: str) -> str:
    """The document with each table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        if path.is_dir():  # one file a run
            folder = speed_overview if path.name == "speed" else calibration_share if match[3] else study
            made = folder(path)
        else:
            result = json.loads(path.read_text(encoding="utf-8"))
            made = RENDER[result["benchmark"]](result)
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return MARK.sub(table, text)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if before != after:
            stale.append(document)
            if not check:
                path.write_text(after, encoding="utf-8")
    results = ROOT / "docs" / "results.md"
    whole = results_document(read_report([ROOT / STUDY]), RESULTS_TITLE)
    if not results.is_file() or results.read_text(encoding="utf-8") != whole:
        stale.append("docs/results.md")
        if not check:  # what `sparsegrad report benchmarks/results/study --markdown docs/results.md` writes
            write_whole(results, whole)
    if check and stale:
        sys.exit(f"{', '.join(stale)}: a table is not what its result file gives; run python benchmarks/tables.py")
    print("written: " + ", ".join(stale) if stale else "all tables are what the result files give")


if __name__ == "__main__":
    main()
