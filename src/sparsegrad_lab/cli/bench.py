"""`sparsegrad bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..bench.settings import BenchArguments
from ..run.parsing import add_quiet, make_parser
from ..run.whole_files import check_file, write_whole

EXAMPLE = (
    "sparsegrad bench --workload mlp --tokens 512 --json bench.json; prints for each method the time of a step, its "
    "ratio to the floor and to LoRA, and memory."
)


def main(argv: list[str]) -> None:
    """Measure, print the table, write the result."""
    parser = make_parser(
        "bench",
        "Measure time and memory of a training step: SparseGrad in several forms, LoRA, GaLore, full fine-tuning, the "
        "published layer, and the floor (a frozen MLP). Each method runs in its own process; they take turns.",
        EXAMPLE,
    )
    parser.add_class_arguments(BenchArguments)
    parser.add_argument("--json", type=Path | None, default=None, help="result file to write")
    add_quiet(parser)
    options = parser.instantiate(parser.parse_args(argv))
    path, quiet = options.pop("json"), options.pop("quiet")
    arguments = BenchArguments(**vars(options))
    arguments.check()
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder {path.parent}")
    if path is not None:
        check_file(path)
    from ..bench.speed import measure
    from ..run.machine import slow_precision_warning

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)
    if warning := slow_precision_warning(arguments.precision):
        console.print(warning, soft_wrap=True)
    with console.status("starting") as status:
        result = measure(arguments, report=status.update)
    screen = Console(highlight=False, markup=False, emoji=False)
    Console(highlight=False, markup=False, emoji=False, width=max(screen.width, 110)).print(table(result))
    for name, row in result["methods"].items():
        for kind in ("skipped", "failed"):
            if kind in row:
                screen.print(f"{name} {kind}: {row[kind].strip().splitlines()[-1]}")
    if path is not None:
        write_whole(path, json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")


def table(result: dict[str, Any]) -> Table:
    """Return a table with a row for each method."""
    shown = Table(title=result["workload"], title_justify="left")
    for name in ("", "step, ms\np20 - p50 - p80", "÷ floor", "÷ lora", "peak,\nMB", "saved for\nbackward, MB",
                 "optimizer,\nMB", "trained\nentries"):  # fmt: skip
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in result["methods"].items():
        if "step_ms" not in row:
            shown.add_row(name, "failed" if "failed" in row else "skipped")
            continue
        ms, ratio, size = row["step_ms"], row["ratio_to"], row["bytes"]
        shown.add_row(
            name, f"{ms['p20']:.0f} - {ms['p50']:.0f} - {ms['p80']:.0f}",
            *(f"{ratio[other]:.2f}" if other in ratio else "" for other in ("floor", "lora")),
            f"{row['peak_bytes'] / 1e6:.0f}", f"{size['kept_for_backward'] / 1e6:.1f}",
            f"{size['optimizer'] / 1e6:.1f}", f"{size['trainable_entries']:,}",
        )  # fmt: skip
    return shown
