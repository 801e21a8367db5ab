"""`sparsegrad export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from ..run.folder import RunFolder
from ..run.parsing import make_parser
from ..run.whole_files import check_writable, write_whole

EXAMPLE = (
    "sparsegrad export runs/glue-rte/sparsegrad --to lora --rank 8 --output runs/glue-rte/lora; prints the relative "
    "error of each layer's update, which is 0 if rank 8 is enough."
)

_LARGE_ERROR = 0.1


def main(argv: list[str]) -> None:
    """Export an adapter, and print the error of each layer."""
    parser = make_parser(
        "export",
        "Convert an adapter to an ordinary PEFT LoRA adapter, for servers that support LoRA only. Each layer's update "
        "becomes its best approximation of the given rank.",
        EXAMPLE,
    )
    parser.add_argument("adapter", type=str, help="folder of an adapter, or of a finished run")
    parser.add_argument("--to", type=Literal["lora"], default="lora", help="format to write")
    parser.add_argument("--rank", type=int | Literal["full"], default="full", help="LoRA rank; full: exact")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    options = parser.parse_args(argv)
    adapter = Path(options.adapter)
    if (adapter / "adapter").is_dir():
        adapter /= "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter}: expected the folder of an adapter, found no adapter_config.json")
    check_writable(Path(options.output))
    from sparsegrad_peft.tuner.export import export_lora

    from ..run.checkpoints import writing

    output = Path(options.output)
    with writing(output):
        errors = export_lora(adapter, output, options.rank)
        if RunFolder(adapter.parent).finished:
            from ..run.card import make_lora_card

            write_whole(output / "README.md", make_lora_card(RunFolder(adapter.parent).read_result(), output, errors))
    table = Table("layer", "relative error of the update")
    for layer, error in errors.items():
        table.add_row(layer, f"{error:.2e}")
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"written: {options.output}", highlight=False, soft_wrap=True)
    lossy = [layer for layer, error in errors.items() if error > _LARGE_ERROR]
    if lossy:
        console.print(
            f"{len(lossy)} of {len(errors)} layers lost more than a tenth of their update, at most "
            f"{max(errors.values()):.0%}. Evaluate the export before you use it, or raise --rank (full: exact).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
