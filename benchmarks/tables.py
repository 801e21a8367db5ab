"""Write docs/results.md, and the tables in README.md and docs/, from the result files.

    python benchmarks/tables.py           # write
    python benchmarks/tables.py --check   # only compare; exit 1 if a table differs from its result file

A table stands between `<!-- table: PATH -->` and `<!-- end of table -->`. PATH is a result file; a folder of speed
results (one line for each workload); a study folder; `PATH short`, a shorter table of either folder;
`PATH calibration`, the share of calibration in a study's runs; `PATH costs`, a picture of its scores against costs;
`methods`, the methods of `sparsegrad bench`; `sizes`, the default adapter's sizes by model; `forms`, what each form of
the adapter takes by model; `calibration`, what its calibration takes by model; or `parts`, what each part of the
default form is worth.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from sparsegrad_lab.bench.methods import METHODS
from sparsegrad_lab.run.whole_files import write_whole
from sparsegrad_lab.study.plots import Plot, cost_plots
from sparsegrad_lab.study.report import bullets
from sparsegrad_lab.study.report import markdown as results_document
from sparsegrad_lab.study.report import origin as origin_of_runs
from sparsegrad_lab.study.sections import read_report
from sparsegrad_lab.study.statistics import compare_all
from sparsegrad_lab.study.tables import comparisons, scores
from sparsegrad_lab.study.verdict import verdict
from sparsegrad_peft.method.costs import LayerShape, saves_input, step_cost
from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.method.sum_sizes import SumsOf, projection_widths

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/method.md", "docs/performance.md", "docs/settings.md", "docs/study.md")
STUDY = "benchmarks/results/study"
GLUE_ROWS = {"sst2": 67349, "cola": 8551, "stsb": 5749, "mrpc": 3668, "rte": 2490}
"Of the whole train sets."
RESULTS_TITLE = "SparseGrad and its peers"
MARK = re.compile(r"(<!-- table: (\S+)( calibration| costs| short)? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(result: dict[str, Any]) -> str:
    e = result["environment"]
    return (f"{result['workload']}. {e['machine']}, torch {e['torch']}, Python {e['python']}, seed {e['seed']}, commit "
            f"{e['commit'][:10]}{' with changes' if e['dirty'] else ''}: `{e['command']}`")  # fmt: skip


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _measured(value: float) -> str:
    """A measured value in a sentence; large ones are bytes."""
    return f"{value / 1e6:.4g} MB" if value >= 1e6 else f"{value:.4g}"


def targets(result: dict[str, Any]) -> str:
    return "\n".join(
        f"- {'met' if outcome['reached'] else '**not met**'}: {target} (measured {_measured(outcome['found'])})"
        for target, outcome in result["targets"].items()
    )


def speed_methods() -> str:
    """What each method of `sparsegrad bench` is."""
    return markdown(["method", "description"], [[f"`{name}`", method.summary] for name, method in METHODS.items()])


def speed(result: dict[str, Any]) -> str:
    """Time, memory and multiply-adds of each method in one run of `sparsegrad bench`."""
    header = ["method", "step, ms (p20–p80)", "÷ floor", "÷ LoRA", "multiply-adds, 10⁹", "peak, MB",
              "saved for backward, MB", "optimizer, MB", "bases, MB", "trained entries"]  # fmt: skip
    rows = []
    for name, row in result["methods"].items():
        if name not in METHODS:  # of an earlier version
            continue
        if "step_ms" not in row:
            missing = "not installed" if "skipped" in row else "failed"
            rows.append([f"`{name}`", missing, *[""] * (len(header) - 2)])
            continue
        ms, to, size = row["step_ms"], row["ratio_to"], row["bytes"]
        rows.append([
            f"`{name}`", f"{ms['p50']:.0f} ({ms['p20']:.0f}–{ms['p80']:.0f})",
            *(f"{to[other]:.2f}" if other in to else "" for other in ("floor", "lora")),
            "" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e9:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            *(megabytes(size[of]) for of in ("kept_for_backward", "optimizer", "bases")),
            f"{size['trainable_entries']:,}",
        ])  # fmt: skip
    e = result["environment"]
    live = result["live_tokens"]
    padding = "" if live == result["arguments"]["tokens"] else f" ({live:,} of the tokens are not padding)"
    where = (
        f"{result['workload']}{padding}. {e['device']}, {e['threads']} threads, torch {e['packages']['torch']}, "
        f"transformers {e['packages']['transformers']}, peft {e['packages']['peft']}, seed "
        f"{result['arguments']['seed']}, commit {e['commit'][:10]}: `{result['command']}`"
    )
    blocks = part_of_model(result)
    part = f" with {blocks}" if blocks else ""
    verdicts = "\n".join(
        f"- {'met' if found <= most else '**not met**'}{part}: {what} (measured {found:.3g})"
        for what, found, most in speed_targets(result["methods"])
    )
    return f"{markdown(header, rows)}\n\n{where}\n\n{verdicts}"


def part_of_model(result: dict[str, Any]) -> str:
    """Return "4 of 12 blocks"; "" for a whole model."""
    depth = re.search(r"(\d+) of (\d+) blocks", result["workload"])
    return depth[0] if depth is not None and depth[1] != depth[2] else ""


def own_sizes(arguments: dict[str, Any]) -> str:
    """The size of the core where it is not the default, to tell workloads apart."""
    narrow, wide = arguments.get("narrow"), arguments.get("wide")
    return "" if narrow is None else f", core {wide} × {narrow}"


def speed_overview(path: Path, short: bool = False) -> str:
    """One line for each workload, whole models first; `short` leaves out parts of models, other sizes and columns."""

    def ratio(rows: dict[str, Any], of: str, to: str) -> str:
        return f"{rows[of]['ratio_to'][to]:.2f}" if of in rows else ""

    lines: list[tuple[bool, list[str]]] = []
    for file in sorted(path.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = {name: row for name, row in result["methods"].items() if "step_ms" in row}
        default, lora = rows["sparsegrad"], rows["lora"]
        lines.append((
            bool(part_of_model(result)),
            [result["workload"].removesuffix(", random weights") + own_sizes(result["arguments"]),
             ratio(rows, "sparsegrad", "floor"), ratio(rows, "sparsegrad", "lora"), ratio(rows, "full", "lora"),
             f"{default['peak_bytes'] / lora['peak_bytes']:.2f}",
             f"{default['bytes']['kept_for_backward'] / lora['bytes']['kept_for_backward']:.2f}",
             f"{default['bytes']['trainable_entries']:,}"],
        ))  # fmt: skip
    header = ["workload", "step ÷ floor", "step ÷ LoRA", "full fine-tuning ÷ LoRA",
              "peak memory ÷ LoRA", "saved for backward ÷ LoRA", "trained entries"]  # fmt: skip
    ordered = sorted(lines, key=lambda line: line[0])
    if not short:
        return markdown(header, [line for _, line in ordered])
    kept = [header.index(name) for name in SHORT_COLUMNS]
    whole = [[re.sub(r"; .* blocks(, [^ ]+ tokens).*$", r"\1", line[column]) for column in kept]
             for part, line in ordered if not part and ", core " not in line[0]]  # fmt: skip
    return markdown([header[column] for column in kept], whole)


SHORT_COLUMNS = ("workload", "step ÷ floor", "step ÷ LoRA", "peak memory ÷ LoRA", "trained entries")
"Columns of the short table of speed results."

SPEED_TARGETS: tuple[tuple[str, str, str, float, Callable[[Any, Any], float]], ...] = (
    ("the default takes at most LoRA's time",
     "sparsegrad", "lora", 1.0, lambda a, b: a["ratio_to"]["lora"]),
    ("the default takes at most 1.1 times the floor's time",
     "sparsegrad", "floor", 1.1, lambda a, b: a["ratio_to"]["floor"]),
    ("the default's peak memory is below LoRA's",
     "sparsegrad", "lora", 1.0, lambda a, b: a["peak_bytes"] / b["peak_bytes"]),
    ("`sparsegrad-paper` takes at most a third of the published layer's time",
     "sparsegrad-paper", "literal", 1 / 3, lambda a, b: a["ratio_to"]["literal"]),
    ("the optimizer state of `sparsegrad-paper` is at most a tenth of full fine-tuning's after these steps",
     "sparsegrad-paper", "full", 0.1, lambda a, b: a["bytes"]["optimizer"] / b["bytes"]["optimizer"]),
)  # fmt: skip
"""Target, the two methods that it compares, the largest ratio allowed, and how to compute the ratio from their rows."""


def speed_targets(rows: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (target, measured ratio, largest ratio allowed) for the targets whose methods were measured."""
    return [
        (target, ratio(rows[a], rows[b]), most)
        for target, a, b, most, ratio in SPEED_TARGETS
        if all("step_ms" in rows.get(name, {}) for name in (a, b))
    ]


def decode(result: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", f"{row['token_ms']['p50']:.1f} ({row['token_ms']['p20']:.1f}–{row['token_ms']['p80']:.1f})",
         f"{row['ratio_to_base']:.2f}"]
        for name, row in result["methods"].items()
    ]  # fmt: skip
    header = ["model", "ms per token (p20–p80)", "÷ base"]
    return f"{markdown(header, rows)}\n\n{origin(result)}\n\n{targets(result)}"


def curves(result: dict[str, Any]) -> str:
    """Cost against one quantity at a time."""
    parts = []
    for sweep in result["sweeps"]:
        methods = [name for name in sweep["points"][0]["ratio_to_floor"] if name in METHODS]
        rows = [
            [str(point["at"]), f"{point['floor_ms']:.1f}", *(f"{point['ratio_to_floor'][m]:.2f}" for m in methods)]
            for point in sweep["points"]
        ]
        parts.append(f"{sweep['words']}:\n\n{markdown([sweep['of'], 'floor, ms', *(f'`{m}`' for m in methods)], rows)}")
    return "\n\n".join([*parts, f"Method columns: median of the step's time divided by the floor's. {origin(result)}"])


def calibration(result: dict[str, Any]) -> str:
    seconds, size = result["seconds"], result["bytes"]
    rows = [
        ["extra memory at the peak, MB", megabytes(size["peak_extra"]),
         f"{megabytes(size['paper_stack_one_group'])} (the paper's stack of 30 gradients, one group)"],
        ["decompositions for complete bases of both groups, s", f"{seconds['complete_bases']:.1f}", ""],
        ["decompositions for a tenth of each side, s", f"{seconds['leading_tenth']:.1f}", ""],
    ]  # fmt: skip
    if "svd_of_one_stack" in seconds:
        rows.append(["decomposition for one group of 30 gradients, s", f"{seconds['bases_of_one_stack']:.1f}",
                     f"{seconds['svd_of_one_stack']:.1f} (SVD of both unfoldings)"])  # fmt: skip
        rows.append(["Gram matrices of these 30 gradients, s", f"{seconds['gram_of_one_stack']:.1f}", ""])
    rows.append(["calibration without the decompositions, s", f"{seconds['calibrate']:.0f}",
                 f"{seconds['backpropagation_alone']:.0f} (backpropagation alone)"])  # fmt: skip
    default = result["default"]
    workload = f"LLaMA of {default['blocks']} blocks, {default['tokens']:,} tokens"
    rows += [
        [f"one step of the default's calibration, {workload}, s", f"{default['calibration_step']:.1f}",
         f"{default['backpropagation_step']:.1f} (backpropagation alone)"],
        ["the default's bases for it, s", f"{default['bases']:.1f}", ""],
        ["the default's sums for it, MB", megabytes(default["sums_bytes"]), ""],
    ]  # fmt: skip
    return f"{markdown(['', 'SparseGrad', 'compared with'], rows)}\n\n{origin(result)}\n\n{targets(result)}"


def energy(result: dict[str, Any]) -> str:
    steps = result["steps"]
    header = ["bases"]
    header += [f"step {step}: {what}" for step in steps for what in ("top 1 %", "leading block")]
    ways = list(next(iter(steps.values()))["shares"])
    rows = []
    for way in ways:
        row = [way]
        for step in steps.values():
            up, down = step["shares"][way]["up"], step["shares"][way]["down"]
            row += [f"{up[what]:.2f} / {down[what]:.2f}" for what in ("top", "block")]
        rows.append(row)
    return f"{markdown(header, rows)}\n\n{origin(result)}"


def study(path: Path, short: bool = False) -> str:
    """Verdict and scores of one experiment, its differences, and where it ran.

    `short`: scores of the methods that have run on all tasks, the ranking (whose seeds have no row then), and the
    comparison of the first method with the baseline; no note.
    """
    [section] = read_report([path]).sections
    sentences = verdict(section)
    if short:
        complete = {
            method: words
            for method, words in section.methods.items()
            if all(section.runs_of(task, method) for task in section.tasks)
        }
        table = scores(replace(section, methods=complete))
        rows = table.rows[:1] if len(section.tasks) == 1 else table.rows
        parts = [bullets(sentences[:2]), replace(table, note="", rows=rows).markdown()]
    else:
        parts = [
            bullets(sentences),
            scores(section).markdown(),
            comparisons(section).markdown(),
            origin_of_runs([section]),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts)


@cache
def costs(path: Path) -> Plot:
    """Score of each method of an experiment against its costs."""
    [section] = read_report([path]).sections
    [plot] = cost_plots(section)
    return plot


def picture_of(path: Path) -> str:
    """The file of the picture, from the root."""
    return f"benchmarks/results/costs/{path.name}.svg"


def calibration_share(path: Path, epochs: int = 3) -> str:
    """Time of calibration against training on the whole task, from runs on samples of the task."""
    header = ["task", "calibration, in training steps", f"steps of {epochs} epochs", "share"]
    rows = []
    for task, count in GLUE_ROWS.items():
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in path.glob(f"*/{task}/sparsegrad-[0-9]*.json")]
        if not runs:
            continue
        config = runs[0]["config"]
        batch, n_steps = config["training"]["batch_size"], config["calibration"]["n_steps"]
        taken = median(run["calibration"]["seconds"] / run["training"]["seconds"] * run["steps"] for run in runs)
        steps = epochs * -(-count // batch)
        rows.append([task, f"{taken:.0f}", f"{steps:,}", f"{100 * taken / steps:.1f} %"])
    source = (
        f"MiniLM, batches of {batch}; calibration: {n_steps} backward passes along a trajectory, bases for each layer. "
        "The time of a training step includes its share of the evaluations. Median over seeds."
    )
    return f"{markdown(header, rows)}\n\n{source}"


MODEL_SIZES = {
    "MiniLM-L6 (23 M)": (6, 2, 384, 1536),
    "BERT-base (110 M)": (12, 2, 768, 3072),
    "SmolLM2-135M": (30, 3, 576, 1536),
    "RoBERTa-large (355 M)": (24, 2, 1024, 4096),
    "Qwen2.5-0.5B": (24, 3, 896, 4864),
    "Llama-3.2-1B": (16, 3, 2048, 8192),
    "LLaMA-2-7B": (32, 3, 4096, 11008),
    "Llama-3-70B": (80, 3, 8192, 28672),
}
"Blocks, MLP layers in a block, hidden size and size of the MLP."


def sizes() -> str:
    """What the default adapter trains and stores, by model size."""
    header = ["model", "MLP layers", "core, neurons × directions", "trained, million", "cores + bases, MB",
              "cores + bases of the shared form, MB", "LoRA rank with as many trained entries"]  # fmt: skip
    rows = []
    for name, (blocks, layers, hidden, wide) in MODEL_SIZES.items():
        neurons, directions = map(int, Sizes(None, None, neurons=True).counts(wide, hidden))  # type: ignore[arg-type]
        shared_r, shared_c = map(int, Sizes(None, None).counts(wide, hidden))  # type: ignore[arg-type]
        trained = blocks * layers * neurons * directions
        bases = blocks * layers * (2 * directions * hidden + 4 * neurons)  # bfloat16 and int32
        shared = layers * 2 * (shared_c * hidden + shared_r * wide)
        rank = round(neurons * directions / (hidden + wide))
        shared_core = 4 * blocks * layers * shared_r * shared_c
        rows.append([name, f"{blocks * layers}", f"{neurons:,} × {directions}", f"{trained / 1e6:,.1f}",
                     f"{(4 * trained + bases) / 1e6:,.0f}", f"{(shared_core + shared) / 1e6:,.1f}",
                     f"{rank}"])  # fmt: skip
    return markdown(header, rows)


def forms(tokens: int = 2048) -> str:
    """What each form of the adapter, and LoRA, adds to the MLP layers of three models."""
    header = ["model", "form", "core, wide × hidden side", "multiply-adds added", "saved for backward, numbers a token",
              "cores + bases, MB"]  # fmt: skip
    rows = []
    for name in ("MiniLM-L6 (23 M)", "SmolLM2-135M", "LLaMA-2-7B"):
        blocks, layers, hidden, wide = MODEL_SIZES[name]
        plain = 2 * tokens * blocks * layers * hidden * wide
        lines = []
        for form, neurons, pairs in (
            ("neurons (default)", True, blocks), ("directions on both sides", False, blocks), ("shared", False, 1)
        ):  # fmt: skip
            r, c = map(int, Sizes(None, None, neurons=neurons).counts(wide, hidden))  # type: ignore[arg-type]
            up = LayerShape(wide, hidden, r, c, rotates_out=not neurons)
            down = LayerShape(hidden, wide, c, r, rotates_in=not neurons)
            shapes = blocks * [*(layers - 1) * [up], down]
            added = sum(step_cost(shape, tokens) for shape in shapes) - plain
            saved = sum(
                shape.in_ if saves_input(tokens, shape, "memory", formed=False) else shape.c for shape in shapes
            )
            basis = 2 * c * hidden + (4 * r if neurons else 2 * r * wide)  # bfloat16, and int32 for neurons
            stored = blocks * layers * 4 * r * c + pairs * layers * basis
            lines.append((form, f"{r:,} × {c}", added, saved, stored))
        rank = round(r * c / (hidden + wide))  # all forms train about as many entries
        entries = blocks * layers * rank * (hidden + wide)
        inputs = blocks * ((layers - 1) * (hidden + rank) + wide + rank)
        lines.append(("LoRA", f"rank {rank}", 3 * tokens * entries, inputs, 4 * entries))
        rows += [
            [name, form, core, f"{100 * added / plain:.1f} %", f"{saved:,}", f"{stored / 1e6:,.1f}"]
            for form, core, added, saved, stored in lines
        ]
    return markdown(header, rows)


def counted_calibration(tokens: int = 2048) -> str:
    """Memory and multiply-adds of the sums of the default's calibration, by model size."""
    header = ["model", "sums, MB", "random vectors a layer", f"multiply-adds ÷ backpropagation, {tokens:,} tokens"]
    rows = []
    for name, (blocks, layers, hidden, wide) in MODEL_SIZES.items():
        default = Sizes(None, None, neurons=True)
        shapes = [*[(wide, hidden)] * (layers - 1), (hidden, wide)]
        groups = {str(number): SumsOf(1, *shape, default, blocks) for number, shape in enumerate(shapes)}
        widths = projection_widths(groups)
        numbers = sum(
            group.projected(widths[role]) if role in widths else group.whole for role, group in groups.items()
        )
        vectors = sum(widths["0"]) if widths else 0
        # Of each entry: a product with every random vector, or with the other features of the hidden side.
        share = (vectors or hidden) / (3 * tokens)
        rows.append(
            [name, f"{4 * numbers / 1e6:,.0f}", f"{vectors:,}" if vectors else "none, whole sums", f"{share:.2f}"]
        )
    return markdown(header, rows)


PARTS = {
    "single-gradients": "single gradients, and so no scales",
    "unscaled": "no scales",
    "exponent-half": "exponent 0.5",
    "rotated": "directions on both sides",
    "shared": "directions on both sides, one pair of bases for all layers of a role",
    "at-start": "all gradients at the pretrained weights",
    "eight-steps": "8 steps of calibration instead of 30",
    "many-steps": "120 steps of calibration instead of 30",
}
"""Method of the experiments below -> what it changes in the default form."""
PARTS_COLUMNS = (
    ("SmolLM2, loss", "default-form", "oasst1"),
    ("BERT, MRPC", "default-form-glue", "mrpc"),
    ("BERT, STS-B", "default-form-glue", "stsb"),
    ("BERT, SST-2", "default-form-glue", "sst2"),
)
"Title, experiment and task."


def parts() -> str:
    """By how much each change of the default form changes the mean over three seeds; * if the interval leaves out 0."""

    def cell(experiment: str, task: str, method: str) -> str:
        [section] = read_report([ROOT / STUDY / experiment]).sections
        runs = [run for run in section.runs if run.task_name == task]
        [found] = compare_all(runs, [method], "sparsegrad") if section.runs_of(task, method) else [None]
        if found is None or found.pairs < 3:
            return ""
        digits = 2 if found.unit == "points" else 4
        return f"{found.difference:+.{digits}f}{'' if found.low <= 0 <= found.high else ' *'}"

    rows = [
        [words, *(cell(experiment, task, method) for _, experiment, task in PARTS_COLUMNS)]
        for method, words in PARTS.items()
    ]
    return markdown(["change", *(title for title, _, _ in PARTS_COLUMNS)], rows)


def repeats(result: dict[str, Any]) -> str:
    """Scores of runs that were repeated by `benchmarks/repeat.py`."""
    rows = []
    for row in result["repeats"].values():
        first, second = (
            f"{score:.4f} ({commit[:7]}, {device})"
            for score, commit, device in zip(row["scores"], row["commits"], row["devices"], strict=True)
        )
        rows.append([f"`{row['run']}`", row["metric"], first, second])
    e = result["environment"]
    machine = f"{e['machine']}, torch {e['torch']}, Python {e['python']}"
    return f"{markdown(['run', 'score', 'committed (commit, processor)', 'again'], rows)}\n\n{machine}."


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "speed": speed,
    "decode": decode,
    "curves": curves,
    "calibration": calibration,
    "energy": energy,
    "repeats": repeats,
}


FROM_CODE = {
    "methods": speed_methods, "sizes": sizes, "forms": forms, "calibration": counted_calibration, "parts": parts,
}  # fmt: skip
"Tables of no result file, or of several."


def filled(text: str) -> str:
    """Return the document with each table written again from its result file."""

    def table(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        if match[2] in FROM_CODE:
            content = FROM_CODE[match[2]]()
        elif path.is_dir():
            short = match[3] == " short"
            if match[3] == " calibration":
                content = calibration_share(path)
            elif match[3] == " costs":
                content = f"![{costs(path).description}](../{picture_of(path)})"
            else:
                content = speed_overview(path, short) if path.name == "speed" else study(path, short)
        else:
            result = json.loads(path.read_text(encoding="utf-8"))
            content = RENDER[result["benchmark"]](result)
        return f"{match[1]}\n{content}\n\n{match[4]}"

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
        for match in MARK.finditer(before):
            if match[3] == " costs" and not check:
                write_whole(ROOT / picture_of(ROOT / match[2]), costs(ROOT / match[2]).svg)
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
        sys.exit(f"{', '.join(stale)}: a table differs from its result file; run python benchmarks/tables.py")
    print("written: " + ", ".join(stale) if stale else "all tables agree with the result files")


if __name__ == "__main__":
    main()
