"""`sparsegrad figures`."""

from __future__ import annotations

import shlex

from rich.console import Console

from ..figures.arguments import FiguresArguments
from .train import run_arguments, run_parser

EXAMPLE = (
    "sparsegrad figures --model minilm --task glue/rte --output figures/rte; prints a line for each picture, and "
    "writes them as SVG with index.md, which shows them all, and figures.json, from which they can be drawn again."
)


def main(argv: list[str]) -> None:
    """Measure, draw, say what each picture shows."""
    parser = run_parser("figures", FiguresArguments.__doc__ or "", EXAMPLE, argv)
    parser.add_class_arguments(FiguresArguments, "figures")
    found = vars(parser.instantiate(parser.parse_args(argv)))
    what: FiguresArguments = found.pop("figures")
    arguments = run_arguments(found)
    if arguments.output == type(arguments)().output:
        arguments.output = "figures/{task}"
    arguments.check()
    what.check(arguments)
    from ..figures.collect import collect
    from ..figures.write import check_output, read, write
    from ..run.train import output_folder

    folder = output_folder(arguments)
    if what.redraw:
        data = read(folder)
    else:
        check_output(folder)
        data = collect(arguments, what, command=shlex.join(["sparsegrad", "figures", *argv]))
    console = Console(highlight=False, soft_wrap=True)
    for drawing in write(data, folder):
        console.print(f"{drawing.name}.svg: {drawing.title}. {drawing.alt}", markup=False)
    console.print(f"\nwritten: {folder}/index.md, figures.json and an SVG each")
