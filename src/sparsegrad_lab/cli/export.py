"""`sparsegrad export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad export runs/glue-rte/sparsegrad --to lora --rank 8 --output runs/glue-rte/lora; prints the relative "
    "error of each layer's update: 0 means that rank 8 holds all of it."
)


def main(argv: list[str]) -> None:
    """Export, and print the error of each layer."""
    parser = make_parser(
        "export",
        "Write an adapter in another form: the best rank-R approximation of each layer's update as an ordinary PEFT "
        "LoRA adapter, for servers that know only LoRA.",
        EXAMPLE,
    )
    parser.add_argument("adapter", type=str, help="folder of an adapter, or of a finished run")
    parser.add_argument("--to", type=Literal["lora"], default="lora", help="form to write")
    parser.add_argument("--rank", type=int | Literal["full"], default="full", help="of each layer; full: no error")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    found = parser.parse_args(argv)
    from sparsegrad_peft.tuner.export import export_lora

    from ..run.folder import RunFolder

    RunFolder(found.output).check_writable()
    adapter = Path(found.adapter)
    if (adapter / "adapter").is_dir():
        adapter /= "adapter"
    errors = export_lora(adapter, found.output, found.rank)
    table = Table("layer", "relative error of the update")
    for layer, error in errors.items():
        table.add_row(layer, f"{error:.2e}")
    console = Console()
    console.print(table)
    console.print(f"written: {found.output}", highlight=False, soft_wrap=True)
