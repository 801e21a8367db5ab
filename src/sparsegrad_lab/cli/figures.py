"""`sparsegrad figures`."""

from __future__ import annotations

import shlex

from rich.console import Console

from ..figures.settings import FiguresArguments
from ..run.parsing import run_arguments, run_parser

EXAMPLE = (
    "sparsegrad figures --model minilm --task glue/rte --output figures/rte; writes an SVG for each figure, index.md "
    "that shows them all, and the numbers, from which --figures.redraw draws them again."
)


def main(argv: list[str]) -> None:
    """Measure, draw, and print what each figure shows."""
    parser = run_parser("figures", FiguresArguments.__doc__ or "", EXAMPLE, argv)
    parser.add_class_arguments(FiguresArguments, "figures")
    options = vars(parser.instantiate(parser.parse_args(argv)))
    settings: FiguresArguments = options.pop("figures")
    arguments = run_arguments(options)
    if arguments.output == type(arguments)().output:
        arguments.output = "figures/{task}"
    arguments.check(parser.given)
    settings.check(arguments, parser.given)
    from ..figures.collect import collect
    from ..figures.folder import check_output, read, write
    from ..run.folder import output_folder

    folder = output_folder(arguments)
    if settings.redraw:
        data = read(folder)
    else:
        check_output(folder)
        command = shlex.join(["sparsegrad", "figures", *argv])
        data = collect(arguments, settings, command=command, progress=not options["quiet"])
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for drawing in write(data, folder):
        console.print(f"{drawing.name}.svg: {drawing.title}. {drawing.alt}")
    console.print(f"\nwritten: {folder}/index.md, figures.json, figures.npz and an SVG for each figure")
